"""What is particular to RWKV-6 and RWKV-7: token shift, their recurrences, shared values, sizes and first values."""

import pytest
import torch
from support.models import tokens
from support.peers import peer
from torch import Tensor

from fla_compile.models import RWKV7Attention, RWKV7Config, RWKV7ForCausalLM, StateCache
from fla_compile.models.cache import Context
from fla_compile.models.rwkv import token_shift
from fla_compile.models.rwkv6 import rwkv6_recurrence
from fla_compile.models.rwkv7 import rwkv7_recurrence

RANKS = {f"{name}_low_rank_dim": 8 for name in ("decay", "gate", "a", "v")}


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def tiny(**changes: object) -> RWKV7ForCausalLM:
    fields = {"hidden_size": 32, "head_dim": 16, "num_hidden_layers": 3, "vocab_size": 256, **RANKS, **changes}
    torch.manual_seed(0)
    return RWKV7ForCausalLM(RWKV7Config(**fields))


@pytest.mark.parametrize("cuts", [(), (1,), (2, 5), (3, 4, 6)], ids=str)
def test_token_shift_subtracts_from_the_real_token_before(cuts: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, cache = random(2, 8, 3), StateCache()
    mask = torch.tensor([[0, 0, 1, 1, 0, 0, 1, 1], [1, 0, 0, 0, 1, 1, 1, 0]])
    pieces = []
    for start, stop in zip((0, *cuts), (*cuts, 8), strict=True):
        context = Context(x[:, start:stop], mask[:, :stop], cache, 0)
        pieces.append(token_shift(x[:, start:stop], context, "shift"))
    delta = torch.cat(pieces, 1)
    for row in range(2):
        real = x[row, mask[row].bool()]
        before = torch.cat([torch.zeros_like(real[:1]), real[:-1]])
        assert torch.equal(delta[row, mask[row].bool()], before - real)


def test_the_recurrence_of_rwkv6_is_the_papers() -> None:
    """wkv_t = diag(u) k_t^T v_t + sum over i < t of diag(w_{i+1} .. w_{t-1}) k_i^T v_i, o_t = r_t wkv_t."""
    torch.manual_seed(0)
    B, T, H, K, V = 2, 7, 2, 4, 6
    r, k, v, w, u = random(B, T, H, K), random(B, T, H, K), random(B, T, H, V), -random(B, T, H, K).exp(), random(H, K)
    o, S = rwkv6_recurrence(r, k, v, w, u, torch.zeros(B, H, K, V, dtype=torch.float64))

    def held(t: int) -> Tensor:
        parts = [w[:, i + 1 : t].sum(1).exp()[..., None] * k[:, i, ..., None] * v[:, i, ..., None, :] for i in range(t)]
        return torch.stack([torch.zeros_like(S), *parts]).sum(0)

    for t in range(T):
        now = u[..., None] * k[:, t, ..., None] * v[:, t, ..., None, :]
        torch.testing.assert_close(o[:, t], (r[:, t, ..., None, :] @ (held(t) + now))[..., 0, :])
    torch.testing.assert_close(S, held(T))


def test_the_recurrence_of_rwkv7_is_the_papers() -> None:
    """S_t = S_{t-1} (diag(w_t) - kk_t^T (a_t kk_t)) + v_t^T k_t in rows of values, o_t = r_t S_t^T."""
    torch.manual_seed(0)
    B, T, H, K, V = 2, 7, 2, 4, 6
    r, k, kk, a, v = random(B, T, H, K), random(B, T, H, K), random(B, T, H, K), random(B, T, H, K), random(B, T, H, V)
    w, S = -random(B, T, H, K).exp(), random(B, H, V, K)
    o, final = rwkv7_recurrence(r, w, k, v, kk, kk * a, S.mT)
    for t in range(T):
        transition = torch.diag_embed(w[:, t].exp()) - kk[:, t, ..., None] * (a * kk)[:, t, ..., None, :]
        S = S @ transition + v[:, t, ..., None] * k[:, t, ..., None, :]
        torch.testing.assert_close(o[:, t], (S @ r[:, t, ..., None])[..., 0])
    torch.testing.assert_close(final, S.mT)


def test_the_values_of_the_first_layer_reach_the_others() -> None:
    first, second = (RWKV7Attention(hidden_size=32, head_dim=16, layer_idx=i) for i in range(2))
    for p in (*first.parameters(), *second.parameters()):
        torch.nn.init.normal_(p, std=0.3)
    x = torch.randn(2, 5, 32)
    *_, v_first = first(x)
    alone, *_ = second(x)
    shared, _, _, kept = second(x, v_first=v_first)
    assert v_first.shape == (2, 5, 32) and torch.equal(kept, v_first) and not torch.allclose(alone, shared)


def test_softmax_attention_below_the_first_rwkv7_layer() -> None:
    model, ids = tiny(attn={"layers": [0], "num_heads": 2}), tokens(2, 6)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("size", [(512, 64), (2048, 64), (2048, 128), (768, 32)], ids=str)
@pytest.mark.parametrize("layer_idx", [0, 1])
@pytest.mark.filterwarnings("ignore:According to Bo")
def test_ranks_by_default_are_those_of_fla(size: tuple[int, int], layer_idx: int) -> None:
    arguments = {"hidden_size": size[0], "head_dim": size[1], "layer_idx": layer_idx, "num_hidden_layers": 2}
    with torch.device("meta"):
        ours, theirs = RWKV7Attention(**arguments), peer("fla.layers.rwkv7.RWKV7Attention")(**arguments)
    shapes = [{name: x.shape for name, x in layer.state_dict().items()} for layer in (ours, theirs)]
    assert shapes[0] == shapes[1]


def test_sizes_that_do_not_fit_are_refused() -> None:
    config = RWKV7Config(hidden_size=64, head_dim=None, num_heads=4, num_hidden_layers=2, value_dim=128)
    assert (config.head_dim, config.num_heads, config.value_dim) == (16, 4, [128, 128])
    with pytest.raises(ValueError, match="heads of 48"):
        RWKV7Attention(hidden_size=64, head_dim=48)
    with pytest.raises(ValueError, match="101"):
        RWKV7Attention(hidden_size=64, head_dim=16, value_dim=101)


def test_first_values_let_the_embeddings_through() -> None:
    model = tiny()
    layer = model.model.layers[1]
    assert model.model.embeddings.weight.abs().max() <= 1e-4
    assert not layer.attn.o_proj.weight.any() and not layer.ffn.value.weight.any()
    decay = layer.attn.w_lora.lora[2].bias
    assert decay.min() < -5 and decay.max() > 1 and layer.attn.x_r[0, 0, 0] == 1 > layer.attn.x_r[0, 0, -1] >= 0
    weight = model.lm_head.weight.double()
    gram = weight.T @ weight
    torch.testing.assert_close(gram, gram[0, 0] * torch.eye(32, dtype=torch.float64), atol=1e-4, rtol=1e-4)
