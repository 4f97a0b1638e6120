"""Pieces that the forward and the backward of the decayed outer product share.

    S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T        o_t = scale * q_t^T S_t

Device side: masked tile loads, decays in log space, the sweep over chunks that leaves the state at the start of each,
and the scores of a chunk under a decay over keys. Host side: what a launch needs to know, checked once.

Where the blocks of all states are too few programs to fill the device, a sweep's time is cut into segments: what each
adds is summed up, the sums are chained (`decay_segments`), and then all segments are swept at once.

Decays are never exponentiated on their own. With c_t the sum of g over a chunk up to row t, the kernels use only
exp(c_t), exp(c_last - c_t) and exp(c_i - c_j) with i >= j; all exponents are <= 0 when g <= 0. Such differences are
summed over just the rows between, or (one decay per row) from two sums that subtract exactly, so that a decay of -100
earlier in the chunk costs the later rows no digits.

RQ, RK, RV, RG: of the H heads of the output, how many neighbours share one of q, k, v and g, read where it lies.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from fla_compile.kernels.decay_configs import Config, configs_for
from fla_compile.kernels.decay_segments import LOG2_E, chain_segments, segment_count
from fla_compile.kernels.launch import Launch, multiprocessors, remember

NO_DECAY = tl.constexpr(0)
CONSTANT_DECAY = tl.constexpr(1)
ROW_DECAY = tl.constexpr(2)
KEY_DECAY = tl.constexpr(3)
KINDS = {"none": 0, "constant": 1, "scalar": 2, "vector": 3}
# Warps of sweeps that run side by side on a multiprocessor: with fewer they wait for memory, their state on chip.
# Under a gate a key a sweep computes more than it waits.
WARPS = 16
# Chunks from which on a sweep is worth the pass that sums up its segments.
LONG_SWEEP = 64

SUB = tl.constexpr(16)
# exp(-104) is 0 in fp32, so a larger drop in one step changes nothing; this also keeps -inf out of the sums.
LOWEST = tl.constexpr(-104.0)
# Sums of up to 128 multiples of 2^-10 no lower than -104 are exact in fp32.
GRID_STEPS = tl.constexpr(1024.0)


@triton.jit
def load_rows(p_x, o_row, o_col, m_row, WIDTH: tl.constexpr):
    """A tile [rows, columns] of an array whose rows hold WIDTH numbers; o_row counts rows."""
    m_x = m_row[:, None] & (o_col < WIDTH)[None, :]
    return tl.load(p_x + (o_row * WIDTH)[:, None] + o_col[None, :], mask=m_x, other=0.0)


@triton.jit
def load_columns(p_x, o_row, o_col, m_row, WIDTH: tl.constexpr):
    """The same tile transposed, [columns, rows], by its addresses: no computed operand is ever transposed."""
    m_x = m_row[None, :] & (o_col < WIDTH)[:, None]
    return tl.load(p_x + (o_row * WIDTH)[None, :] + o_col[:, None], mask=m_x, other=0.0)


@triton.jit
def store_rows(p_x, b_x, o_row, o_col, m_row, WIDTH: tl.constexpr):
    m_x = m_row[:, None] & (o_col < WIDTH)[None, :]
    tl.store(p_x + (o_row * WIDTH)[:, None] + o_col[None, :], b_x.to(p_x.dtype.element_ty), mask=m_x)


@triton.jit
def chunk_program(T, H, C: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """One program for each chunk and block of SIZE: block, chunk among all, head, first step, first row of T * H."""
    BLOCKS: tl.constexpr = tl.cdiv(SIZE, BLOCK)
    i_p = tl.program_id(0)
    n_t = tl.cdiv(T, C)
    i_bt = i_p // BLOCKS
    i_bh = i_bt // n_t
    i_h = i_bh % H
    t_0 = (i_bt % n_t) * C
    i_row = ((i_bh // H).to(tl.int64) * T + t_0) * H + i_h
    return i_p % BLOCKS, i_bt, i_h, t_0, i_row


@triton.jit
def sweep_program(T, H, L, n_s, C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    """One program for each segment of L chunks and block of a state: sequence, segment and head together, sequence,
    head, number of chunks, first chunk and the one after the last, K block and V block."""
    NK: tl.constexpr = tl.cdiv(K, BK)
    NV: tl.constexpr = tl.cdiv(V, BV)
    i_p = tl.program_id(0)
    i_nh = i_p // NV // NK
    i_n = i_nh // H
    n_t = tl.cdiv(T, C)
    i_a = (i_n % n_s) * L
    i_e = tl.minimum(i_a + L, n_t)
    return i_nh.to(tl.int64), (i_n // n_s).to(tl.int64), i_nh % H, n_t, i_a, i_e, (i_p // NV) % NK, i_p % NV


@triton.jit
def store_decay(p_gt, b_total, i_nh, i_k, i_v, K: tl.constexpr, BK: tl.constexpr, DECAY: tl.constexpr):
    """The log decay of a segment, as `chain_segments` takes it, from the programs of its first V block."""
    if DECAY == KEY_DECAY:
        o_k = i_k * BK + tl.arange(0, BK)
        tl.store(p_gt + i_nh * K + o_k, b_total * LOG2_E, mask=(o_k < K) & (i_v == 0))
    elif DECAY != NO_DECAY:
        tl.store(p_gt + i_nh, b_total, mask=(i_k == 0) & (i_v == 0))


@triton.jit
def as_decay(b_g):
    b_g = b_g.to(tl.float32)
    return tl.where(b_g < LOWEST, LOWEST, b_g)


@triton.jit
def row_decay(p_g, i_row, i_h, o_c, m_c, H, RG: tl.constexpr, DECAY: tl.constexpr, EXACT: tl.constexpr):
    """Running sums [C] of one decay per row, as a coarse and a fine part, and the two totals; RG heads share one.

    The coarse part lies on a grid where sums and differences are exact; the fine part is below 2^-11 a row. Operands
    narrower than float32 round more than a plain sum loses: for them (EXACT false) the fine part is zero.
    """
    if DECAY == CONSTANT_DECAY:
        b_g = tl.where(m_c, as_decay(tl.load(p_g + i_h // RG)), 0.0)
    else:
        b_g = as_decay(tl.load(p_g + i_row // RG + o_c * (H // RG), mask=m_c, other=0.0))
    if EXACT:
        b_coarse = tl.floor(b_g * GRID_STEPS + 0.5) / GRID_STEPS
        b_fine = b_g - b_coarse
        return tl.cumsum(b_coarse, 0), tl.cumsum(b_fine, 0), tl.sum(b_coarse, 0), tl.sum(b_fine, 0)
    else:
        b_zero = tl.zeros_like(b_g)
        return tl.cumsum(b_g, 0), b_zero, tl.sum(b_g, 0), tl.sum(b_zero, 0)


@triton.jit(do_not_specialize=["T", "H", "L", "n_s"])
def chunk_state_kernel(
    p_k, p_v, p_g, p_h0, p_h, p_ht, p_gt, T, H, L, n_s,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, HAS_H0: tl.constexpr, STORE_H: tl.constexpr, STORE_HT: tl.constexpr,
    PRECISION: tl.constexpr, RK: tl.constexpr, RV: tl.constexpr, RG: tl.constexpr,
):  # fmt: skip
    """One program per (b, segment, h, K block, V block) walks the segment's chunks, from a state of p_h0
    [B, segments, H, K, V] to one of p_ht; p_h [B*H, chunks, K, V] gets the state before each chunk, or p_gt, without
    STORE_H, the log decay of the segment."""
    i_nh, i_b, i_h, n_t, i_a, i_e, i_k, i_v = sweep_program(T, H, L, n_s, C, K, V, BK, BV)
    o_c = tl.arange(0, C)
    o_k = i_k * BK + tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_k = o_k < K

    b_s = tl.zeros((BK, BV), tl.float32)
    b_total = tl.zeros((BK,), tl.float32) if DECAY == KEY_DECAY else 0.0
    if STORE_H:
        p_h += ((i_b * H + i_h) * n_t + i_a) * (K * V)
    if HAS_H0:
        b_s += load_rows(p_h0 + i_nh * (K * V), o_k, o_v, m_k, V).to(tl.float32)
    for i_t in range(i_a, i_e):
        if STORE_H:
            store_rows(p_h, b_s, o_k, o_v, m_k, V)
            p_h += K * V
        t_0 = i_t * C
        i_row = (i_b * T + t_0) * H + i_h
        m_c = t_0 + o_c < T
        b_kt = load_columns(p_k + i_row // RK * K, o_c * (H // RK), o_k, m_c, K)
        b_v = load_rows(p_v + i_row // RV * V, o_c * (H // RV), o_v, m_c, V)
        if DECAY == KEY_DECAY:
            p_gr = p_g + i_row // RG * K
            m_next = (o_c + 1 < C) & (t_0 + o_c + 1 < T)
            b_next = as_decay(load_columns(p_gr, (o_c + 1) * (H // RG), o_k, m_next, K))
            b_first = as_decay(tl.load(p_gr + o_k, mask=m_k, other=0.0))
            b_kt = (b_kt * tl.exp(tl.cumsum(b_next, 1, reverse=True))).to(b_v.dtype)
            b_all = tl.sum(b_next, 1) + b_first
            b_total += b_all
            b_s *= tl.exp(b_all)[:, None]
        elif DECAY != NO_DECAY:
            b_hi, b_lo, s_hi, s_lo = row_decay(p_g, i_row, i_h, o_c, m_c, H, RG, DECAY, b_v.dtype == tl.float32)
            b_v = (b_v * tl.exp((s_hi - b_hi) + (s_lo - b_lo))[:, None]).to(b_v.dtype)
            b_total += s_hi + s_lo
            b_s *= tl.exp(s_hi + s_lo)
        b_s = tl.dot(b_kt, b_v, b_s, input_precision=PRECISION)
    if STORE_HT:
        store_rows(p_ht + i_nh * (K * V), b_s, o_k, o_v, m_k, V)
    if not STORE_H:
        store_decay(p_gt, b_total, i_nh, i_k, i_v, K, BK, DECAY)


@triton.jit(do_not_specialize=["T", "H"])
def chunk_key_scores_kernel(
    p_q, p_k, p_g, p_a, T, H,
    K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
    RQ: tl.constexpr, RK: tl.constexpr, RG: tl.constexpr,
):  # fmt: skip
    """A_ij = sum_k q_ik k_jk exp(c_ik - c_jk) for j <= i in a chunk; 16 rows a program; p_a is [B, T, H, C].

    Columns before the 16 rows are one product, both factors taken relative to the first of these rows; inside the
    16 x 16 block the exponents are summed column by column, going back from the diagonal.
    """
    NK: tl.constexpr = tl.cdiv(K, BK)
    i_s, _, _, t_0, i_row = chunk_program(T, H, C, C, SUB)
    r_0 = i_s * SUB
    o_r = r_0 + tl.arange(0, SUB)
    o_c = tl.arange(0, C)
    m_r = t_0 + o_r < T
    m_c = o_c < r_0
    b_a = tl.zeros((SUB, C), tl.float32)
    if t_0 + r_0 < T:
        for i_k in range(NK):
            o_k = i_k * BK + tl.arange(0, BK)
            m_k = o_k < K
            p_kr = p_k + i_row // RK * K
            p_gr = p_g + i_row // RG * K
            b_q = load_rows(p_q + i_row // RQ * K, o_r * (H // RQ), o_k, m_r, K)
            b_g = as_decay(load_rows(p_gr, o_r * (H // RG), o_k, m_r, K))
            b_kt = load_columns(p_kr, o_c * (H // RK), o_k, m_c, K)
            b_next = as_decay(load_columns(p_gr, (o_c + 1) * (H // RG), o_k, o_c + 1 < r_0, K))
            b_kt = (b_kt * tl.exp(tl.cumsum(b_next, 1, reverse=True))).to(b_q.dtype)
            b_qd = (b_q * tl.exp(tl.cumsum(b_g, 0))).to(b_q.dtype)
            b_a = tl.dot(b_qd, b_kt, b_a, input_precision=PRECISION)

            b_e = tl.zeros((SUB, BK), tl.float32)
            b_q = b_q.to(tl.float32)
            for i_c in range(SUB):
                j = r_0 + SUB - 1 - i_c
                m_j = m_k & (t_0 + j < T)
                b_kj = tl.load(p_kr + j * (H // RK) * K + o_k, mask=m_j, other=0.0).to(tl.float32)
                b_aj = tl.sum(b_q * b_kj[None, :] * tl.exp(b_e), 1)
                b_a += tl.where((o_c == j)[None, :] & (o_r >= j)[:, None], b_aj[:, None], 0.0)
                b_gj = as_decay(tl.load(p_gr + j * (H // RG) * K + o_k, mask=m_j, other=0.0))
                b_e += tl.where((o_r >= j)[:, None], b_gj[None, :], 0.0)
    store_rows(p_a + i_row * C, b_a, o_r * H, o_c, m_r, C)


@dataclass(frozen=True)
class SplitPlan:
    """What the launchers derive from the arguments once."""

    B: int
    T: int
    H: int
    K: int
    V: int
    kind: str
    config: Config
    block_k: int
    block_v: int
    precision: str
    device: torch.device
    segments: int = 1
    shared: tuple[int, ...] = (1, 1, 1, 1)  # RQ, RK, RV, RG

    @property
    def chunks(self) -> int:
        return triton.cdiv(self.T, self.config.chunk)

    @property
    def length(self) -> int:
        """Chunks of a segment, but for the last one's."""
        return triton.cdiv(self.chunks, self.segments)

    @property
    def key_blocks(self) -> int:
        return triton.cdiv(self.K, self.block_k)

    @property
    def value_blocks(self) -> int:
        return triton.cdiv(self.V, self.block_v)

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.config.num_warps, "num_stages": self.config.num_stages}


def pad_block(size: int, largest: int) -> int:
    """The tile side for `size` columns: a power of two, at least the 16 that a matrix product needs."""
    return min(largest, max(16, triton.next_power_of_2(size)))


def plan_launch(
    q: torch.Tensor, v: torch.Tensor, kind: str, config: Config | None, *, shared: tuple[int, ...] = (1, 1, 1, 1)
) -> SplitPlan:
    """The split launch of checked arguments, with the table's configuration unless one is given; `shared` as in it."""
    B, T, H, K = q.shape
    H *= shared[0]
    V = v.shape[-1]
    if config is None:
        arch, row = device_arch(q.device), (kind, q.element_size(), max(K, V), shared_limit(q.device))
        configs = configs_for(arch, "split", *row)
        if not configs:
            raise ValueError(f"no configuration for {q.dtype}, K={K}, V={V} fits {q.device}")
        config = configs[0]
    blocks = pad_block(K, config.block_k), pad_block(V, config.block_v)
    chunks = triton.cdiv(T, config.chunk)
    segments = 1
    if chunks >= LONG_SWEEP:
        resident = 1 if kind == "vector" else WARPS // config.num_warps
        segments = segment_count(
            T, steps=B * T, programs=H * triton.cdiv(K, blocks[0]) * triton.cdiv(V, blocks[1]), chunk=config.chunk,
            room=resident * multiprocessors(q.device), resident=resident,
        )  # fmt: skip
    segments = triton.cdiv(chunks, triton.cdiv(chunks, segments))
    return SplitPlan(B, T, H, K, V, kind, config, *blocks, precision(q), q.device, segments, shared)


def precision(q: torch.Tensor) -> str:
    """How products of float32 are taken, as torch is told to."""
    tf32 = q.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if tf32 else "ieee"


def device_arch(device: torch.device) -> int:
    """Compute capability as 80, 89, 90, ...; 90 where the interpreter stands in for a device."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def shared_limit(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    properties: Any = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin


_launches: dict[tuple[Any, ...], Launch] = {}


def launch_split(
    plan: SplitPlan, kernel: Any, programs: int, *first: torch.Tensor | float | None, **numbers: int | bool
) -> None:
    """One kernel of the split launch: its tensors and scale in order, and those of its numbers that no plan tells.

    All tensors are contiguous, and the plan tells their shapes.
    """
    aligned = (x if x is None else (x.dtype, x.data_ptr() % 16) for x in first if not isinstance(x, float))
    key = (kernel.fn, plan, programs, *numbers.values(), *aligned)
    launch = _launches.get(key)
    if launch is None:
        known: dict[str, Any] = dict(
            T=plan.T, H=plan.H, L=plan.length, n_s=plan.segments, K=plan.K, V=plan.V, C=plan.config.chunk,
            BK=plan.block_k, BV=plan.block_v, DECAY=KINDS[plan.kind], PRECISION=plan.precision,
        )  # fmt: skip
        known |= zip(("RQ", "RK", "RV", "RG"), plan.shared, strict=True)
        known |= numbers
        ordered = tuple(known[name] for name in kernel.arg_names[len(first) :])
        launch = Launch(kernel, plan.device, (programs,), ordered, **plan.options)
        remember(_launches, key, launch)
    launch(*first)


def launch_states(
    plan: SplitPlan, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor | None, h0: torch.Tensor | None, *, final: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """States before each chunk [B*H, chunks, K, V] in k's dtype, and, if asked for, the last one in float32."""
    B, H, K, V = plan.B, plan.H, plan.K, plan.V
    h = torch.empty(B * H, plan.chunks, K, V, dtype=k.dtype, device=k.device)
    ht = torch.empty(B, H, K, V, dtype=torch.float32, device=k.device) if final else None
    last = ht
    if plan.segments > 1:
        u, gt = new_sums(plan)
        launch_sweep(plan, chunk_state_kernel, k, v, g, None, None, u, gt, HAS_H0=False, STORE_H=False, STORE_HT=True)
        chain_segments(u, gt, h0, ht, KINDS[plan.kind], reverse=False, s_in=1.0, s_st=1.0)
        h0, last = u, None
    given = dict(HAS_H0=h0 is not None, STORE_H=True, STORE_HT=last is not None)
    launch_sweep(plan, chunk_state_kernel, k, v, g, h0, h, last, None, **given)
    return h, ht


def new_sums(plan: SplitPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """What a sweep leaves of each segment: what it adds to the state, and its log decay."""
    shape = plan.B, plan.segments, plan.H, plan.K
    wide: dict[str, Any] = dict(dtype=torch.float32, device=plan.device)
    return torch.empty(*shape, plan.V, **wide), torch.empty(shape if plan.kind == "vector" else shape[:3], **wide)


def launch_sweep(plan: SplitPlan, kernel: Any, *first: torch.Tensor | float | None, **flags: bool) -> None:
    programs = plan.B * plan.segments * plan.H * plan.key_blocks * plan.value_blocks
    launch_split(plan, kernel, programs, *first, **flags)


def launch_key_scores(plan: SplitPlan, q: torch.Tensor, k: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """Scores [B, T, H, C] of each row with the rows of its chunk, in q's dtype."""
    C = plan.config.chunk
    a = torch.empty(plan.B, plan.T, plan.H, C, dtype=q.dtype, device=q.device)
    programs = plan.B * plan.H * plan.chunks * (C // SUB.value)
    launch_split(plan, chunk_key_scores_kernel, programs, q, k, g, a, BK=min(plan.block_k, 32))
    return a
