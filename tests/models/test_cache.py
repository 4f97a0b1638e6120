"""The parts that padding and caches rest on, each against its plain definition."""

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache

from fla_compile.models import Attention, GatedLinearAttention, GLAConfig, StateCache
from fla_compile.models.cache import Context, pack_right
from fla_compile.models.layers import GatedMLP, Rotary, ShortConvolution

MASK = torch.tensor([[0, 1, 1, 0, 1, 0], [1, 1, 0, 0, 0, 1]])


def test_pack_right_keeps_the_order_of_real_entries() -> None:
    x = torch.arange(12).view(2, 6)
    place, (packed,) = pack_right(MASK.bool(), x)
    assert packed[0, 3:].tolist() == [1, 2, 4] and packed[1, 3:].tolist() == [6, 7, 11]
    assert torch.equal(packed.gather(1, place), x)


@pytest.mark.parametrize("bias", [False, True])
def test_short_convolution_is_the_causal_convolution_of_what_is_real(bias: bool) -> None:
    conv, x = ShortConvolution(3, 4, bias=bias).double(), torch.randn(2, 6, 3).double()
    y, state = conv(x, MASK.bool())
    again, _ = conv(x, MASK.bool(), state)
    for row in range(2):
        real = x[row, MASK[row].bool()].T[None]
        twice = F.silu(F.conv1d(F.pad(torch.cat([real, real], 2), (3, 0)), conv.weight, conv.bias, groups=3))[0].T
        torch.testing.assert_close(y[row, MASK[row].bool()], twice[:3])
        torch.testing.assert_close(again[row, MASK[row].bool()], twice[3:])


def test_a_convolution_of_one_tap_keeps_no_state() -> None:
    x = torch.randn(1, 5, 3)
    conv = ShortConvolution(3, 1, activation=None)
    y, state = conv(x, torch.tensor([[1, 0, 1, 1, 0]]).bool())
    assert state.shape == (1, 0, 3)
    torch.testing.assert_close(y[0, [0, 2, 3]], x[0, [0, 2, 3]] * conv.weight[:, 0, 0])


def test_shift_gives_the_real_token_before() -> None:
    x, cache = torch.arange(1.0, 13).view(2, 6, 1), StateCache()
    before = Context(x, MASK, cache, 0).shift(x, "last")
    assert before[0, MASK[0].bool(), 0].tolist() == [0, 2, 3] and before[1, MASK[1].bool(), 0].tolist() == [0, 7, 8]
    after = Context(x, None, cache, 0).shift(x, "last")
    assert after[:, 0, 0].tolist() == [5, 12] and torch.equal(after[:, 1:], x[:, :-1])


def test_positions_count_real_tokens_only() -> None:
    cache = StateCache()
    x = torch.zeros(2, 6, 1)
    first = Context(x, MASK, cache, 0).positions()
    assert first[0, MASK[0].bool()].tolist() == first[1, MASK[1].bool()].tolist() == [0, 1, 2]
    assert Context(x, None, cache, 0).positions()[:, 0].tolist() == [3, 3]


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_softmax_over_the_real_tokens_in_reach(window: int | None, masked: bool) -> None:
    layer = Attention(16, 4, 2, qkv_bias=True, qk_norm=True, window_size=window, layer_idx=0).double()
    x = torch.randn(2, 6, 16).double()
    mask = MASK if masked else torch.ones_like(MASK)
    o = layer(x, attention_mask=mask if masked else None)[0]
    for row in range(2):
        real = x[row, mask[row].bool()][None]
        n = real.shape[1]
        q, k, v = (f(real).unflatten(-1, (-1, 4)) for f in (layer.q_proj, layer.k_proj, layer.v_proj))
        q, k = Rotary(4)(torch.arange(n)[None], layer.q_norm(q), layer.k_norm(k))
        scores = torch.einsum("bthk,bshk->bhts", q, k.repeat_interleave(2, 2)) / 2
        ahead = torch.arange(n)[:, None] - torch.arange(n)
        hidden = (ahead < 0) | (ahead >= (window or n))
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        expected = torch.einsum("bhts,bshk->bthk", weights, v.repeat_interleave(2, 2)).flatten(2)
        torch.testing.assert_close(o[row, mask[row].bool()], layer.o_proj(expected)[0])


@torch.no_grad()
def test_caches_are_of_constant_size_but_for_full_attention() -> None:
    def sizes(**attention) -> list[int]:
        torch.manual_seed(0)
        layer = (
            Attention(16, 2, layer_idx=0, **attention)
            if attention
            else GatedLinearAttention(hidden_size=16, num_heads=2, use_short_conv=True, layer_idx=0)
        )
        cache, found = StateCache(), []
        for length in (3, 1, 9):
            layer(torch.randn(1, length, 16), past_key_values=cache, use_cache=True)
            # What is allocated, not only what is seen: a slice would keep the whole prompt alive.
            found.append(sum(x.untyped_storage().nbytes() for x in cache.layer(0).tensors.values()))
        return found

    linear, window, full = sizes(), sizes(window_size=4), sizes(window_size=None)
    assert len(set(linear)) == len(set(window)) == 1 and full[0] < full[1] < full[2]


def test_caches_reorder_repeat_select_and_reset() -> None:
    cache = StateCache(1)
    Context(torch.zeros(3, 2, 1), None, cache, 0).store("x", torch.arange(3.0))
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert cache.layer(0).tensors["x"].tolist() == [2, 0, 0]
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3]))
    assert cache.layer(0).tensors["x"].tolist() == [2, 0]
    cache.reset()
    assert not cache.layer(0).tensors and cache.get_seq_length() == 0
    with pytest.raises(ValueError, match="cropped"):
        cache.crop(1)
    with pytest.raises(ValueError, match="layer_idx"):
        Context(torch.zeros(1, 1, 1), None, cache, None)


def test_attention_of_a_hybrid_is_checked_and_completed() -> None:
    config = GLAConfig(num_hidden_layers=3, attn={"layers": (0, 2), "num_heads": 4})
    filled = {"num_heads": 4, "num_kv_heads": 4, "qkv_bias": False, "window_size": None, "rope_theta": 10000.0}
    assert config.attn == {"layers": [0, 2], **filled}
    assert config.attention_at(2) == filled and config.attention_at(1) is None
    two = [{"layers": [0], "num_heads": 4}, {"layers": [2], "num_heads": 2, "window_size": 8}]
    assert GLAConfig(num_hidden_layers=3, attn=two).attention_at(2)["window_size"] == 8
    for wrong in ({"layers": [3], "num_heads": 4}, {"layers": [0]}, [two[0], two[0]]):
        with pytest.raises(ValueError, match="attn"):
            GLAConfig(num_hidden_layers=3, attn=wrong)
    with pytest.raises(ValueError, match="attnres"):
        GLAConfig(attnres_block_size=2)


def test_what_a_model_cannot_do_it_says() -> None:
    with pytest.raises(ValueError, match="num_heads"):
        GatedLinearAttention(hidden_size=30, num_heads=4)
    with pytest.raises(ValueError, match="num_kv_heads"):
        Attention(16, 4, 3)
    with pytest.raises(ValueError, match="activation"):
        ShortConvolution(4, 2, activation="relu")
    cache = DynamicCache()
    with pytest.raises(AttributeError):
        Context(torch.zeros(1, 1, 1), None, cache, 0)  # type: ignore[arg-type]


def test_the_width_of_the_feed_forward() -> None:
    assert GatedMLP(1024, 4).gate_proj.out_features == 2816
    assert GatedMLP(64, None, 100).down_proj.in_features == 100
