import pytest
import torch

from fla_compile.kernels import delta_naive
from fla_compile.kernels.delta_ops import FAMILIES

B, T, H, K, V = 2, 5, 3, 4, 6


def _operands(dtype=torch.float64):
    torch.manual_seed(0)
    q, k, b, c = torch.randn(4, B, T, H, K, dtype=dtype)
    v = torch.randn(B, T, H, V, dtype=dtype)
    return q, k, v, b, c


def _own(family):
    """The family's operands beside q, k and v."""
    *_, b, c = _operands()
    torch.manual_seed(1)
    g = -torch.rand(B, T, H, K, dtype=torch.float64)
    beta = 2.5 * torch.rand(B, T, H, dtype=torch.float64) - 0.5
    gate = g[..., 0] if family == "gated_delta_rule" else g
    return [{"g": gate, "beta": beta, "b": b, "c": c}[name] for name in FAMILIES[family]]


def _transition(family, k, own, t):
    """What S_{t-1} is multiplied by, [B, H, K, K], and the factor of k_t v_t^T."""
    x = {name: y[:, t] for name, y in zip(FAMILIES[family], own, strict=True)}
    eye = torch.eye(K, dtype=torch.float64)
    if family == "dplr":
        return x["g"].exp().diag_embed() + torch.einsum("bhi,bhj->bhij", x["b"], x["c"]), 1.0
    beta = x["beta"][..., None, None]
    erase = eye - beta * torch.einsum("bhi,bhj->bhij", k[:, t], k[:, t])
    if family == "gated_delta_rule":
        erase = x["g"].exp()[..., None, None] * erase
    if family == "kda":
        erase = erase @ x["g"].exp().diag_embed()
    return erase, beta


@pytest.mark.parametrize("family", FAMILIES)
def test_is_the_equation_in_matrices(family):
    q, k, v, *_ = _operands()
    own, S = _own(family), torch.randn(B, H, K, V, dtype=torch.float64)
    o, final = getattr(delta_naive, f"naive_{family}")(
        q, k, v, *own, scale=0.3, initial_state=S, output_final_state=True
    )
    for t in range(T):
        matrix, factor = _transition(family, k, own, t)
        S = matrix @ S + factor * torch.einsum("bhi,bhj->bhij", k[:, t], v[:, t])
        torch.testing.assert_close(o[:, t], 0.3 * torch.einsum("bhij,bhi->bhj", S, q[:, t]))
    torch.testing.assert_close(final, S)


def test_families_contain_each_other():
    q, k, v, *_ = _operands()
    g, beta = _own("kda")
    plain, _ = delta_naive.naive_delta_rule(q, k, v, beta)
    torch.testing.assert_close(delta_naive.naive_kda(q, k, v, 0 * g, beta)[0], plain)
    one, many = g[..., 0], g[..., :1].expand_as(g)
    gated, _ = delta_naive.naive_gated_delta_rule(q, k, v, one, beta)
    torch.testing.assert_close(delta_naive.naive_kda(q, k, v, many, beta)[0], gated)
    write = beta[..., None] * k
    kimi, _ = delta_naive.naive_kda(q, k, v, g, beta)
    torch.testing.assert_close(delta_naive.naive_dplr(q, write, v, g, -write, g.exp() * k)[0], kimi)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_halves_make_a_whole(family):
    q, k, v, *_ = _operands()
    operands = [q, k, v, *_own(family)]
    naive = getattr(delta_naive, f"naive_{family}")
    whole, state = naive(*operands, output_final_state=True)
    first, middle = naive(*(x[:, :2] for x in operands), output_final_state=True)
    kept = middle.clone()
    second, last = naive(*(x[:, 2:] for x in operands), initial_state=middle, output_final_state=True)
    torch.testing.assert_close(torch.cat((first, second), 1), whole)
    torch.testing.assert_close(last, state)
    assert torch.equal(middle, kept), "the initial state was written to"


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_against_differences(family):
    q, k, v, *_ = _operands()
    h0 = torch.randn(B, H, K, V, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for x in (q, k, v, *_own(family), h0)]

    def fn(*xs):
        return getattr(delta_naive, f"naive_{family}")(*xs[:-1], initial_state=xs[-1], output_final_state=True)

    assert torch.autograd.gradcheck(fn, inputs, fast_mode=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_dtypes_and_defaults(family):
    q, k, v, *_ = _operands(torch.bfloat16)
    own, naive = _own(family), getattr(delta_naive, f"naive_{family}")
    o, final = naive(q, k, v, *own, output_final_state=True)
    assert (o.dtype, final.dtype) == (torch.bfloat16, torch.float32)
    o, final = naive(q, k, v, *own)
    assert final is None
    torch.testing.assert_close(o, naive(q, k, v, *own, scale=K**-0.5)[0])
