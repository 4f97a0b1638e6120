import pytest
import torch
from budget import check_budget
from torch._dynamo.testing import CompileCounterWithBackend

from fla_compile import ops
from fla_compile.kernels import decay_ops, decay_values, delta_ops, linear_scan, packed, rwkv6_ops, selective_scan

# The operands of each family, in order, as axes.
OPERANDS = {
    "linear_attention": {"q": "THK", "k": "THK", "v": "THV"},
    "retention": {"q": "THK", "k": "THK", "v": "THV", "gamma": "H"},
    "simple_gla": {"q": "THK", "k": "THK", "v": "THV", "g": "TH"},
    "gla": {"q": "THK", "k": "THK", "v": "THV", "g": "THK"},
    "gla_values": {"q": "THK", "k": "THK", "v": "THV", "gv": "THV"},
    "gla_both": {"q": "THK", "k": "THK", "v": "THV", "g": "THK", "gv": "THV"},
    "rwkv6": {"q": "THK", "k": "THK", "v": "THV", "g": "THK", "u": "HK"},
    "delta_rule": {"q": "THK", "k": "THK", "v": "THV", "beta": "TH"},
    "gated_delta_rule": {"q": "THK", "k": "THK", "v": "THV", "g": "TH", "beta": "TH"},
    "kda": {"q": "THK", "k": "THK", "v": "THV", "g": "THK", "beta": "TH"},
    "dplr": {"q": "THK", "k": "THK", "v": "THV", "g": "THK", "b": "THK", "c": "THK"},
    "linear_scan": {"x": "TD", "a": "TD"},
    "selective_scan": {"x": "TD", "dt": "TD", "A": "DN", "B": "TN", "C": "TN"},
}
STATES = {"linear_scan": "D", "selective_scan": "DN"}
SIZES = {"H": 2, "K": 6, "V": 9, "D": 10, "N": 7}
LENGTHS = {
    "several": (1, 64, 5, 130, 65, 7, 1, 2),
    "equal": (20, 20, 20),
    "one": (37,),
    "ones": (1, 1, 1, 1),
}
OPERATORS = {
    **decay_ops.PACKED,
    "gla_values": decay_values.gla_values_packed,
    "gla_both": decay_values.gla_values_packed,
    "rwkv6": rwkv6_ops.rwkv6_packed,
    **delta_ops.PACKED,
    "linear_scan": linear_scan.linear_scan_packed,
    "selective_scan": selective_scan.selective_scan_packed,
}


def _public(family):
    return getattr(ops, family.removesuffix("_values").removesuffix("_both"))


def _naive(family):
    return getattr(ops, f"naive_{family.removesuffix('_values').removesuffix('_both')}")


def _operands(family, lengths, dtype):
    torch.manual_seed(0)
    sizes = SIZES | {"T": sum(lengths)}

    def make(name, axes):
        x = torch.randn([1] * ("T" in axes) + [sizes[axis] for axis in axes])
        if name in ("g", "gv"):
            return torch.nn.functional.logsigmoid(x)
        if name == "gamma":
            return torch.sigmoid(x + 3)
        if name in ("a", "beta", "dt"):
            return torch.sigmoid(x)
        if name == "A":
            return -x.exp()
        return torch.nn.functional.normalize(x, dim=-1) if name in ("k", "b", "c") else x

    found = {name: make(name, axes) for name, axes in OPERANDS[family].items()}
    found["initial_state"] = make("h0", "") + torch.randn(
        len(lengths), *(SIZES[axis] for axis in STATES.get(family, "HKV"))
    )
    wide = ("g", "gv", "gamma", "beta", "u", "A", "dt", "initial_state")
    return {
        name: x.to(torch.promote_types(dtype, torch.float32) if name in wide else dtype) for name, x in found.items()
    }


def _bounds(lengths, dtype=torch.int64):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=dtype)


def _results(fn, operands, cu_seqlens):
    leaves = {name: x.detach().clone().requires_grad_() for name, x in operands.items()}
    out = fn(**leaves, output_final_state=True, cu_seqlens=cu_seqlens)
    torch.manual_seed(1)
    grads = torch.autograd.grad(out, list(leaves.values()), [torch.randn(y.shape).to(y.dtype) for y in out])
    return dict(zip(("o", "final_state", *(f"d{name}" for name in leaves)), (*out, *grads), strict=True))


def _segments(family, operands, lengths):
    """The naive loop on each sequence by itself: nothing here knows of packing."""
    o, final = [], []
    for n, (start, end) in enumerate(zip(_bounds(lengths)[:-1].tolist(), _bounds(lengths)[1:].tolist(), strict=True)):
        steps = {
            name: x[n : n + 1] if name == "initial_state" else x[:, start:end] if "T" in OPERANDS[family][name] else x
            for name, x in operands.items()
        }
        y, state = _naive(family)(**steps, output_final_state=True)
        o.append(y)
        final.append(state)
    return torch.cat(o, 1), torch.cat(final)


def _check(family, lengths, dtype, cu_dtype=torch.int64):
    def segments(output_final_state, cu_seqlens, **leaves):
        return _segments(family, leaves, lengths)

    operands = _operands(family, lengths, dtype)
    got = _results(_public(family), operands, _bounds(lengths, cu_dtype))
    eager = _results(segments, operands, None)
    truth = eager if dtype == torch.float64 else _results(segments, {n: x.double() for n, x in operands.items()}, None)
    for name, y in got.items():
        kind = "forward" if name in ("o", "final_state") else "backward"
        check_budget(f"{family} {name}", y, truth[name], eager[name], kind)


def test_the_table_is_complete():
    """All recurrences: the short convolution packs by itself (test_short_conv.py), rows and steps know no sequences."""
    others = {"short_conv", "short_conv_step", "norm_gate", "norm_gate_linear"}
    others |= {"cross_entropy", "linear_cross_entropy", "linear_kl_div"}
    others |= {f"{family}_step" for family in ("linear_attention", "retention", "simple_gla", "gla", "rwkv6")}
    names = {name.removeprefix("naive_") for name in ops.__all__} - others
    assert names == {family.removesuffix("_values").removesuffix("_both") for family in OPERANDS}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("family", OPERANDS)
def test_each_sequence_by_itself(family, lengths):
    _check(family, lengths, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", OPERANDS)
def test_narrow(family, dtype):
    _check(family, LENGTHS["several"], dtype, torch.int32)


@pytest.mark.slow
@pytest.mark.parametrize("family", OPERANDS)
def test_every_length(family):
    _check(family, tuple(range(1, 201)), torch.float64)


@pytest.mark.parametrize("family", OPERANDS)
def test_the_naive_twin(family):
    lengths = (5, 1, 9)
    operands = _operands(family, lengths, torch.float64)
    o, final = _naive(family)(**operands, output_final_state=True, cu_seqlens=_bounds(lengths))
    expected = _segments(family, operands, lengths)
    assert torch.equal(o, expected[0]) and torch.equal(final, expected[1])
    del operands["initial_state"]
    o, final = _naive(family)(**operands, cu_seqlens=_bounds(lengths))
    assert final is None
    got, final = _public(family)(**operands, cu_seqlens=_bounds(lengths))
    assert final is None
    torch.testing.assert_close(got, o)


@pytest.mark.parametrize("family", OPERATORS)
def test_opcheck(family):
    lengths = (3, 1, 9)
    operands = {name: x.requires_grad_() for name, x in _operands(family, lengths, torch.float32).items()}
    schema = OPERATORS[family]._opoverload._schema
    operands |= {"scale": 0.3, "cu_seqlens": _bounds(lengths), "u": operands.get("u", operands.get("x"))}
    operands |= {"g": operands.get("g", operands.get("gamma"))}
    args = [operands.get(argument.name) for argument in schema.arguments]
    torch.library.opcheck(OPERATORS[family], args)
    args[[argument.name for argument in schema.arguments].index("initial_state")] = None
    torch.library.opcheck(OPERATORS[family], args)


@pytest.mark.parametrize("family", ["gla_values", "rwkv6", "kda", "linear_scan"])
def test_opcheck_backward(family):
    lengths = (3, 1, 9)
    operands = _operands(family, lengths, torch.float32)
    op = getattr(torch.ops.fla_compile, OPERATORS[family]._opoverload._schema.name.split("::")[1] + "_backward").default
    o, final = _public(family)(**operands, output_final_state=True, cu_seqlens=_bounds(lengths))
    tensors = [a.name for a in op._schema.arguments if "Tensor" in str(a.type)][:-4]
    operands |= {"scale": 0.3, "cu_seqlens": _bounds(lengths), "o": o, "do": o, "dht": final}
    for needs in ([True] * len(tensors), [False] * len(tensors)):
        needs = [need and name in operands for need, name in zip(needs, tensors, strict=True)]
        args = [needs if a.name == "needs" else operands.get(a.name) for a in op._schema.arguments]
        torch.library.opcheck(op, args)


@pytest.mark.parametrize("family", ["rwkv6", "selective_scan"])
def test_one_graph_serves_every_packing(family):
    counter = CompileCounterWithBackend("aot_eager")

    def run(operands, cu_seqlens):
        return _public(family)(**operands, output_final_state=True, cu_seqlens=cu_seqlens)

    fn = torch.compile(run, fullgraph=True, dynamic=True, backend=counter)
    for lengths in ((3, 20, 5), (65, 2), (30, 30, 30, 4)):
        operands = _operands(family, lengths, torch.float64)
        got = _results(
            lambda output_final_state, cu_seqlens, **leaves: fn(leaves, cu_seqlens), operands, _bounds(lengths)
        )
        expected = _results(_public(family), operands, _bounds(lengths))
        for name, y in got.items():
            torch.testing.assert_close(y, expected[name])
    assert counter.frame_count == 1
    with pytest.raises(ValueError, match="must rise"):
        fn(_operands(family, (3, 2, 4), torch.float64), torch.tensor([0, 3, 3, 9]))


def test_batches_are_little_larger_than_what_they_hold():
    lengths = [*range(1, 400), 100_000]
    x = torch.empty(1, sum(lengths), device="meta")
    batches = [*packed._batches(_bounds(lengths), x)]
    assert sorted(n for batch in batches for n in batch.sequences) == [*range(400)]
    for batch in batches:
        held = sum(lengths[n] for n in batch.sequences)
        assert batch.rows.numel() <= 1.25 * held
    assert len(batches) <= 4 * 17


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        (torch.tensor([0, 3, 3, 9]), "cu_seqlens must rise: sequence 1 is from 3 to 3"),
        (torch.tensor([0, 5, 3, 9]), "cu_seqlens must rise: sequence 1 is from 5 to 3"),
        (torch.tensor([1, 3, 5, 9]), "cu_seqlens must run from 0 to T=9, it runs from 1 to 9"),
        (torch.tensor([0, 3, 5, 8]), "cu_seqlens must run from 0 to T=9, it runs from 0 to 8"),
        (torch.tensor([0, 3, 9]), "initial_state has N=3, cu_seqlens has N=2"),
        (torch.tensor([[0, 9]]), r"cu_seqlens must be \[N \+ 1\]"),
        (torch.tensor([0]), r"cu_seqlens must be \[N \+ 1\]"),
        (torch.tensor([0.0, 3.0, 5.0, 9.0]), "cu_seqlens must be int32 or int64, got torch.float32"),
        (torch.zeros(4, dtype=torch.int64, device="meta"), "cu_seqlens is on meta, [qx] is on cpu"),
    ],
)
@pytest.mark.parametrize("family", OPERANDS)
def test_bad_input_is_named(family, cu_seqlens, message):
    operands = _operands(family, (3, 2, 4), torch.float32)
    with pytest.raises(ValueError, match=message):
        _public(family)(**operands, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("family", OPERANDS)
def test_one_row_only(family):
    operands = _operands(family, (3, 2, 4), torch.float32)
    two = {
        name: x.expand(2, *x.shape[1:]) if "T" in OPERANDS[family].get(name, "") else x for name, x in operands.items()
    }
    with pytest.raises(ValueError, match="has B=2, cu_seqlens needs B=1"):
        _public(family)(**two, cu_seqlens=_bounds((3, 2, 4)))
