"""Every kernel of the decayed outer product that a row of the table launches, compiled ahead of time."""

import dataclasses

import triton

from fla_compile.kernels import (
    decay_chunk_gates,
    decay_chunk_outputs,
    decay_chunk_states,
    decay_fused,
    decay_fused_gates,
    decay_scan,
    decay_scan_gates,
    decay_scan_grads,
    decay_scan_grown,
    decay_scan_sums,
    decay_tiles,
    decay_triton,
    decay_triton_bwd,
    decay_triton_common,
    decay_triton_grads,
    decay_triton_grown,
)
from fla_compile.kernels.decay_configs import KINDS, TABLE

POINTERS = {2: "*bf16", 4: "*fp32"}
WIDE = {"p_g", "p_h0", "p_ht", "p_dht", "p_dh0", "p_dg", "p_dqs", "p_dks", "p_dgs", "p_s0", "p_st", "p_gt", "p_range"}
WIDE |= {"p_u", "p_gv", "p_sums", "p_carry", "p_bonus", "p_own", "p_du", "p_f"}
NO_SUMS = "p_e", "p_h", "p_sums", "p_carry"
# Of the heads, how many share an operand; segments begin with states of their own, read after a step's update.
DEFAULTS = dict.fromkeys(("RX", "RZ", "RW", "RG", "RE", "RQ", "RK", "RV", "KEPT", "CHUNKS"), 1)
DEFAULTS |= dict(RUNUP=False, BEFORE=False)
# Narrow operands spill nothing but what the table says. Float32 products are unrolled into thousands of instructions,
# where ptxas may set aside up to four registers even when it has free ones; so are the elementwise products of the
# exact launch, where it sets aside up to twelve.
STACK = {2: 0, 4: 16}
# Of `chunk_grads_kernel`, whose elementwise products are three: with all values at once, and in blocks.
EXACT_STACK = 48, 56


def kinds_of(row):
    """The kinds of decay under which a row is launched."""
    absent = {"grads": ["none"], "dv": ["none", "constant"]}.get(row.launch, [])
    return [kind for kind, family in KINDS.items() if family == row.family and kind not in absent]


def name_of(row):
    return row.launch + "-few" * row.few


def kernels_of(row, kind, values=None):
    """(kernel, constants) for all that a row launches under this kind of decay, with `values` or as many as keys."""
    if row.launch != "split":
        return [*passes_of(row, kind, values), *sums_of(row, kind)]
    values = values or row.size
    config = TABLE[row][0]
    tile = dict(
        K=row.size, V=values, C=config.chunk, BK=min(config.block_k, row.size), BV=config.block_v,
        DECAY=decay_triton_common.KINDS[kind],
    )  # fmt: skip
    common, forward, backward, grads = decay_triton_common, decay_triton, decay_triton_bwd, decay_triton_grads
    found = [
        (common.chunk_state_kernel, dict(tile, HAS_H0=True, STORE_H=True, STORE_HT=True, p_gt=None)),
        (common.chunk_state_kernel, dict(tile, HAS_H0=False, STORE_H=False, STORE_HT=True, p_h0=None, p_h=None)),
        (forward.chunk_output_kernel, tile),
        (backward.chunk_state_grad_kernel, dict(tile, HAS_DHT=True, STORE_DH=True, STORE_DH0=True, p_gt=None)),
        (
            backward.chunk_state_grad_kernel,
            dict(tile, HAS_DHT=False, STORE_DH=False, STORE_DH0=True, p_dht=None, p_dh=None),
        ),
        (backward.chunk_value_grad_kernel, tile),
        (grads.chunk_query_key_grad_kernel, dict(tile, DQ_ONLY=False)),
    ]
    if kind == "scalar":
        found.append((decay_triton_grown.chunk_grown_row_grad_kernel, tile))
    if kind == "vector":
        inside = dict(K=row.size, C=config.chunk, BK=config.block_k)
        absent = dict.fromkeys(("p_dk", "p_dg"))
        found += [
            (common.chunk_key_scores_kernel, dict(K=row.size, C=config.chunk, BK=min(config.block_k, 32))),
            (grads.chunk_value_scores_kernel, dict(V=values, C=config.chunk, BV=config.block_v)),
            (grads.chunk_key_grad_kernel, dict(inside, DQ_ONLY=False)),
            (decay_triton_grown.chunk_grown_decay_grad_kernel, dict(inside, V=values, BV=config.block_v)),
            # the output under a decay over values
            (grads.chunk_query_key_grad_kernel, dict(tile, DQ_ONLY=True, **absent)),
            (grads.chunk_key_grad_kernel, dict(inside, DQ_ONLY=True, p_dks=None, p_dgs=None, **absent)),
        ]
    return found


def sums_of(row, kind):
    """What makes the gradient of one decay a head or row from what the passes for dq and dk leave."""
    if row.launch == "grads" and kind in ("constant", "scalar"):
        config = TABLE[row][0]
        turned = config.chunk < decay_scan.LONG.value
        side = config.block_v if turned else decay_tiles.product_threads(config.block_k)
        meta = dict(H=32, C=config.chunk, NW=row.size // config.block_v, N=side, BH=16, p_table=None)
        yield decay_scan_sums.row_decay_grad_kernel, meta
        if kind == "scalar":
            block_k, block_v = decay_fused.GROWN_BLOCKS
            meta |= dict(K=row.size, V=row.size, BK=block_k, BV=block_v, TURNED=turned)
            meta |= dict(SX=config.block_k, SW=config.block_v)
            yield decay_scan_grown.grown_row_decay_grad_kernel, meta


def gates_of(row, values=None, packed=False, bonus=False):
    """What a row of a gate a key launches; the output under a decay over values is what `tall` has without p_d. With a
    bonus: as RWKV-6 does."""
    config, gates, states = TABLE[row][0], decay_chunk_gates, decay_chunk_states.chunk_states_kernel
    table = (
        dict(BEFORE=bonus) | ({} if bonus else dict(p_bonus=None, p_own=None)) | ({} if packed else dict(p_table=None))
    )
    joints = {} if packed else dict(p_u=None)
    if row.launch == "tall":
        tile = dict(H=4, K=row.size, V=values or row.size, C=config.chunk, BK=config.block_v, BV=config.block_k)
        tile |= dict(EVEN=not (packed or row.few)) | table  # packed has no few
        tile |= dict(p_du=None) if not bonus else {}
        alone = dict.fromkeys(("p_q", "p_d", "p_dk", "p_dg"))
        for exact in (False, True):
            yield gates.chunk_grads_kernel, dict(tile, EXACT=exact)
            if not bonus:
                yield gates.chunk_grads_kernel, dict(tile, EXACT=exact, **alone)
        return
    if row.launch == "walk":
        tile = dict(H=4, K=row.size, V=values or row.size, C=config.chunk, BK=config.block_v, BV=config.block_k)
        tile |= dict(HAS_S0=True, EVEN=not packed, CHUNKS=2) | table | joints | ({} if bonus else dict(p_du=None))
        for exact in (False, True):
            yield decay_scan_grads.chunk_scan_grads_kernel, dict(tile, EXACT=exact)
            yield decay_scan_grads.chunk_scan_grads_kernel, dict(tile, EXACT=exact, HAS_S0=False, p_s0=None, p_u=None)
            if not bonus:
                yield decay_scan_grads.chunk_scan_grads_kernel, dict(tile, EXACT=exact, p_dg=None)
        return
    tile = dict(H=4, X=row.size, W=values or row.size, C=config.chunk, BX=config.block_k, BW=config.block_v, **table)
    if row.launch == "kept":
        tile |= dict(REVERSE=False, FINAL=False, HAS_S0=True, EVEN=not packed, CHUNKS=2, p_st=None, p_gt=None, **joints)
        yield states, tile
        return
    for reverse in (False, True):
        tile |= dict(REVERSE=reverse, EVEN=not reverse and not packed)
        walk = dict(tile, FINAL=True, HAS_S0=True, SPARE=config.spare, **joints)
        if row.launch == "states":
            yield states, dict(walk, p_gt=None, p_f=None)
            yield states, dict(walk, HAS_S0=False, p_h=None, p_f=None, p_s0=None, p_u=None)
            continue
        for exact in (False, True):
            if row.launch == "chunks":
                yield decay_chunk_outputs.chunk_outputs_kernel, dict(tile, EXACT=exact)
            else:
                yield decay_scan_gates.chunk_scan_rows_kernel, dict(walk, EXACT=exact, p_h=None)
                if dataclasses.replace(row, launch="chunks") not in TABLE:  # the pass leaves the states as well
                    kept = TABLE[dataclasses.replace(row, launch="tall")][0].chunk // config.chunk
                    yield decay_scan_gates.chunk_scan_rows_kernel, dict(walk, EXACT=exact, KEPT=kept)


def passes_of(row, kind, values=None, packed=False, runup=False):
    if kind == "vector":
        return list(gates_of(row, values, packed))
    config, tall = TABLE[row][0], row.launch in ("tall", "grads")
    found = []
    for reverse in (False, True) if row.launch != "dv" else (True,):
        part = (1 + reverse) * tall
        meta = dict(
            H=4, X=row.size, W=values or row.size, C=config.chunk, BX=row.size, BW=config.block_v, HAS_S0=True,
            REVERSE=reverse, TRANSPOSED=tall, FINAL=not tall, EVEN=not reverse and not packed, RUNUP=runup,
        )  # fmt: skip
        if not packed:
            meta.update(p_table=None, p_u=None)
        meta.update(DECAY=decay_triton_common.KINDS[kind], OUTPUT=True)
        if row.launch != "grads":
            meta |= dict(PART=0, **dict.fromkeys(NO_SUMS))
        elif kind != "none":
            meta |= dict(PART=part)
        else:
            continue
        found.append((decay_scan.chunk_scan_kernel, meta))
        if not (packed or runup):  # as in training
            found.append((decay_scan.chunk_scan_kernel, meta | dict(HAS_S0=False, p_s0=None, EVEN=True)))
    return found


def compile_kernel(kernel, constants, row, kind, precision):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    config, constants = TABLE[row][0], DEFAULTS | dict(constants, PRECISION=precision)
    wide = set(WIDE)
    if kind == "vector" and kernel is decay_triton_grads.chunk_query_key_grad_kernel:
        wide |= {"p_dq", "p_dk"}
    unused = {"none": {"p_g", "p_a", "p_dg"}, "vector": set()}.get(kind, {"p_a"})
    signature, values, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants or name in unused:
            signature[name], values[(i,)] = "constexpr", constants.get(name)
        elif name.startswith("p_"):
            signature[name] = "*i32" if name == "p_table" else "*fp32" if name in wide else POINTERS[row.nbytes]
            if name == "p_h" and row.launch in ("kept", "walk"):
                signature[name] = "*fp16"
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name in ("scale", "s_in", "s_y", "s_st", "limit") else "i32"
    source = ASTSource(kernel, signature, values, attributes)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    if constants.get("EXACT"):
        options = decay_fused_gates.EXACT_OPTIONS
    elif kernel is decay_scan_sums.row_decay_grad_kernel:
        options = decay_fused.ROW_GRAD_OPTIONS
    elif kernel is decay_scan_grown.grown_row_decay_grad_kernel:
        options = decay_fused.GROWN_OPTIONS
    return triton.compile(source, target=GPUTarget("cuda", row.arch, 32), options=options)


def most_stack(row, kernel, constants):
    """The exact launch has a tile of its own."""
    if constants.get("EXACT"):
        if kernel is decay_chunk_gates.chunk_grads_kernel:
            return EXACT_STACK[constants["V"] > constants["BV"]]
        return STACK[4]
    return STACK[row.nbytes] + TABLE[row][0].stack
