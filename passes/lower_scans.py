"""Lower what is no matrix-valued recurrence: delays, windows, elementwise and selective scans, and plain loops.

delay         S_t is the stream of new values, one step later
window        views of that stream, W steps long
elementwise   h, h_T = torch.ops.fla_compile.linear_scan(x, a, h_0), over the state as one long row
selective     y, h_T = torch.ops.fla_compile.selective_scan(u, dt, A, B, C, h_0)
generic       the loop operator on the part of the step that needs the state
"""

import operator
from collections.abc import Sequence

import torch
from torch import fx

from fla_compile.kernels.loop_ops import register_step
from fla_compile.passes.fission import Delay, Window
from fla_compile.passes.lowering import TIME, Layout, Looped, Lowering, extract, factor_dtype
from fla_compile.passes.normal_form import Factor
from fla_compile.passes.records import Refused
from fla_compile.passes.recurrence import Elementwise, Generic, Selective
from fla_compile.passes.step import original, shape_of


def lower_delay(low: Lowering, stage: Delay, final: dict[int, fx.Node]) -> None:
    new = low.stream(low.step.next_carries[stage.carry])
    final[stage.carry] = last(low, new)
    low.node[low.step.carries[stage.carry]] = delayed(low, low.init[stage.carry], new)


def delayed(low: Lowering, first: fx.Node, new: fx.Node) -> fx.Node:
    """The stream that begins with `first` and then repeats `new` one step later."""
    past = low.call(torch.narrow, new, 0, 0, low.call(operator.sub, low.length, 1))
    return low.call(torch.cat, [low.call(torch.unsqueeze, first, 0), past], 0)


def last(low: Lowering, stream: fx.Node) -> fx.Node:
    return low.call(torch.clone, low.call(torch.select, stream, 0, -1))


def lower_window(low: Lowering, stage: Window, final: dict[int, fx.Node]) -> None:
    step, dim = low.step, stage.dim
    carry, new = step.carries[stage.carry], low.stream(stage.new)
    width = shape_of(carry)[dim]
    if len(shape_of(stage.new)) == len(shape_of(carry)):
        new = low.call(torch.select, new, dim + 1, 0)
    past = low.call(torch.movedim, low.init[stage.carry], dim, 0)
    if stage.newest_first:
        past = low.call(torch.flip, past, [0])
    values = low.call(torch.cat, [past, new], 0)
    windows = low.call(torch.Tensor.unfold, values, 0, width, 1)  # [T + 1, ..., W]
    if stage.newest_first:
        windows = low.call(torch.flip, windows, [-1])
    windows = low.call(torch.movedim, windows, -1, dim + 1)
    low.node[carry] = low.call(torch.narrow, windows, 0, 0, low.length)
    after = low.call(torch.narrow, windows, 0, 1, low.length)
    for node in (step.next_carries[stage.carry], original(step.next_carries[stage.carry])):
        low.node[node] = after
    low.shared |= {low.node[carry], after}
    final[stage.carry] = low.call(torch.clone, low.call(torch.select, windows, 0, -1))


def lower_elementwise(low: Lowering, stage: Elementwise, final: dict[int, fx.Node]) -> None:
    step = low.step
    carry, new = step.carries[stage.carry], original(step.next_carries[stage.carry])
    init, dtype = low.init[stage.carry], carry.meta["val"].dtype
    # What is written is the new state for an old state of zero.
    zero = low.call(torch.zeros_like, init)
    written = low.given(new, carry, zero)
    dims = Layout(((TIME,), *stage.dims))
    x = low.call(torch.reshape, written, [1, low.length, -1])
    decay = low.operand(stage.decay, dims, dtype, carry.meta["val"].device)
    decay = low.cast(decay, factor_dtype(low.step, stage.decay, dtype), dtype)
    if stage.decay_coef != 1.0:
        decay = low.call(torch.mul, decay, stage.decay_coef)
    a = low.call(torch.reshape, decay, [1, low.length, -1])
    start = None if low.zero_init[stage.carry] else low.call(torch.reshape, init, [1, -1])
    call = low.call(torch.ops.fla_compile.linear_scan.default, x, a, start)
    shape = [low.product(axis) for axis in stage.dims]
    h = low.call(torch.reshape, low.call(operator.getitem, call, 0), [low.length, *shape])
    end = low.call(torch.reshape, low.call(operator.getitem, call, 1), shape)
    final[stage.carry] = low.cast(end, None, dtype)
    low.node[new] = h
    low.node[carry] = delayed(low, init, h)


def lower_selective(low: Lowering, stage: Selective, final: dict[int, fx.Node]) -> None:
    state = low.step.carries[stage.carry].meta["val"]
    wide = torch.float64 if state.dtype == torch.float64 else torch.float32
    over_time = (stage.batch, (TIME,))

    def operand(factors: Sequence[Factor], roles: tuple, coef: float = 1.0) -> fx.Node:
        tensor = low.cast(low.operand(factors, Layout(roles), wide, state.device), None, wide)
        return tensor if coef == 1.0 else low.call(torch.mul, tensor, coef)

    u = operand(stage.u, (*over_time, stage.values), stage.write_coef)
    dt = operand(stage.dt, (*over_time, stage.values), stage.coef)
    A = operand(stage.A, (stage.values, stage.keys))
    B, C = operand(stage.B, (*over_time, stage.keys)), operand(stage.C, (*over_time, stage.keys), stage.scale)
    states = Layout((stage.batch, stage.values, stage.keys))
    start = None
    if not low.zero_init[stage.carry]:
        own = {label for axis in stage.state_dims for label in axis}
        start = low.full(low.laid_out(low.init[stage.carry], stage.state_dims, False, states.order), states, own)
        start = low.cast(start, state.dtype, wide)
    call = low.call(torch.ops.fla_compile.selective_scan.default, u, dt, A, B, C, start)
    end = low.restored(low.call(operator.getitem, call, 1), states, stage.state_dims, timed=False)
    final[stage.carry] = low.cast(end, wide, state.dtype)
    y = low.restored(low.call(operator.getitem, call, 0), Layout((*over_time, stage.values)), stage.read_dims, True)
    own_type = stage.read.meta["val"].dtype
    low.node[stage.read] = low.plus(low.cast(y, wide, own_type), stage.rest, stage.read_dims, own_type)


def lower_generic(low: Lowering, stage: Generic, final: dict[int, fx.Node]) -> None:
    step = low.step
    low.parallel(stage.inputs)
    carries = [step.carries[i] for i in stage.carries]
    reads = [n for n in stage.inputs if n in step.timed]
    invariants = [n for n in stage.inputs if n not in step.timed]
    results = [step.next_carries[i] for i in stage.carries] + list(stage.emitted)
    part = extract(step, [*carries, *reads, *invariants], results)
    try:
        register_step(part, len(carries), len(reads))
    except ValueError as error:
        raise Refused("unsupported_op", f"the step cannot be looped: {error}", stage.why.source) from error
    target = f"loop_{len(low.root._modules)}"
    low.root.add_module(target, Looped(part, len(carries), len(reads)))
    operands = (*(low.init[i] for i in stage.carries), *(low.node[n] for n in (*reads, *invariants)))
    call = low.graph.call_module(target, (low.length, *operands))
    for i, carry in enumerate(stage.carries):
        final[carry] = low.call(operator.getitem, call, i)
    for i, node in enumerate(stage.emitted):
        low.node[node] = low.call(operator.getitem, call, len(carries) + i)
