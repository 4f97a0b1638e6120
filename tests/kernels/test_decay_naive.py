import pytest
import torch

from fla_compile import ops
from fla_compile.kernels.decay_naive import naive_gla, naive_rwkv6, retnet_gamma

B, T, H, K, V = 2, 5, 3, 4, 6


def _operands(dtype=torch.float64):
    torch.manual_seed(0)
    return [torch.randn(B, T, H, d, dtype=dtype) for d in (K, K, V)]


def _gates():
    torch.manual_seed(1)
    g = -torch.rand(B, T, H, K, dtype=torch.float64)
    gamma = torch.rand(H, dtype=torch.float64)
    return {
        "linear_attention": ([], torch.zeros_like(g)),
        "retention": ([gamma], gamma.log()[:, None].expand_as(g)),
        "simple_gla": ([g[..., 0]], g[..., :1].expand_as(g)),
        "gla": ([g], g),
    }


@pytest.mark.parametrize("family", _gates())
def test_is_the_sum_over_pairs(family):
    q, k, v = _operands()
    gate, g = _gates()[family]
    b = g.cumsum(1)
    pairs = torch.einsum("bihk,bjhk,bijhk->bijh", q, k, (b[:, :, None] - b[:, None]).exp())
    causal = torch.ones(T, T, dtype=torch.float64).tril()
    expected = 0.3 * torch.einsum("bijh,ij,bjhv->bihv", pairs, causal, v)
    o, final = getattr(ops, f"naive_{family}")(q, k, v, *gate, scale=0.3, output_final_state=True)
    torch.testing.assert_close(o, expected)
    torch.testing.assert_close(final, torch.einsum("bjhk,bjhv->bhkv", k * (b[:, -1:] - b).exp(), v))


@pytest.mark.parametrize("family", _gates())
def test_two_halves_make_a_whole(family):
    operands = _operands()
    gate = _gates()[family][0]
    naive = getattr(ops, f"naive_{family}")
    whole, state = naive(*operands, *gate, output_final_state=True)

    def part(rows):
        return [x[:, rows] if x.ndim > 1 else x for x in (*operands, *gate)]

    first, middle = naive(*part(slice(0, 2)), output_final_state=True)
    kept = middle.clone()
    second, last = naive(*part(slice(2, None)), initial_state=middle, output_final_state=True)
    torch.testing.assert_close(torch.cat((first, second), 1), whole)
    torch.testing.assert_close(last, state)
    assert torch.equal(middle, kept), "the initial state was written to"


@pytest.mark.parametrize("family", _gates())
def test_gradients_against_differences(family):
    gate = _gates()[family][0]
    h0 = torch.randn(B, H, K, V, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (*_operands(), *gate, h0)]

    def fn(*xs):
        return getattr(ops, f"naive_{family}")(*xs[:-1], initial_state=xs[-1], output_final_state=True)

    assert torch.autograd.gradcheck(fn, inputs, fast_mode=True)


def _wider():
    torch.manual_seed(2)
    g, gv = (-torch.rand(B, T, H, d, dtype=torch.float64) for d in (K, V))
    u = torch.randn(H, K, dtype=torch.float64)
    return {"values": {"gv": gv}, "both": {"g": g, "gv": gv}, "rwkv6": {"g": g, "u": u}, "rwkv6_no_bonus": {"g": g}}


@pytest.mark.parametrize("kind", _wider())
def test_wider_families_are_sums_over_pairs(kind):
    q, k, v = _operands()
    gates = _wider()[kind]
    zero = torch.zeros(B, T, H, K, dtype=torch.float64), torch.zeros(B, T, H, V, dtype=torch.float64)
    b, c = (gates.get(name, none).cumsum(1) for name, none in zip(("g", "gv"), zero, strict=True))
    rwkv6 = kind.startswith("rwkv6")
    read = b - gates["g"] if rwkv6 else b  # the decay of step t acts after it is read
    pairs = torch.einsum("bihk,bjhk,bijhk->bijh", q, k, (read[:, :, None] - b[:, None]).exp())
    causal = torch.ones(T, T, dtype=torch.float64).tril(-1 if rwkv6 else 0)
    across = (c[:, :, None] - c[:, None]).exp()
    expected = 0.3 * torch.einsum("bijh,ij,bijhv,bjhv->bihv", pairs, causal, across, v)
    if "u" in gates:
        expected += 0.3 * torch.einsum("bihk,hk,bihk,bihv->bihv", q, gates["u"], k, v)
    naive = naive_rwkv6 if rwkv6 else naive_gla
    o, final = naive(q, k, v, **gates, scale=0.3, output_final_state=True)
    torch.testing.assert_close(o, expected)
    written = torch.einsum("bjhk,bjhv->bhkv", k * (b[:, -1:] - b).exp(), v * (c[:, -1:] - c).exp())
    torch.testing.assert_close(final, written)


@pytest.mark.parametrize("kind", _wider())
def test_wider_families_in_two_halves(kind):
    operands, gates = _operands(), _wider()[kind]
    naive = naive_rwkv6 if kind.startswith("rwkv6") else naive_gla
    whole, state = naive(*operands, **gates, output_final_state=True)

    def part(rows):
        return [x[:, rows] for x in operands], {n: x[:, rows] if x.ndim == 4 else x for n, x in gates.items()}

    (first_operands, first_gates), (second_operands, second_gates) = part(slice(0, 2)), part(slice(2, None))
    first, middle = naive(*first_operands, **first_gates, output_final_state=True)
    second, last = naive(*second_operands, **second_gates, initial_state=middle, output_final_state=True)
    torch.testing.assert_close(torch.cat((first, second), 1), whole)
    torch.testing.assert_close(last, state)


def test_dtypes_and_defaults():
    q, k, v = _operands(torch.bfloat16)
    o, final = ops.naive_retention(q, k, v, output_final_state=True)
    assert (o.dtype, final.dtype) == (torch.bfloat16, torch.float32)
    assert ops.naive_retention(q, k, v)[1] is None
    torch.testing.assert_close(o, ops.naive_retention(q, k, v, retnet_gamma(H), scale=K**-0.5)[0])
    assert retnet_gamma(2).tolist() == [1 - 2**-5, 1 - 2**-6]
