"""Every model as a Hugging Face user uses it: gradients, caches, padding, generation, saving, checkpointing."""

import pytest
import torch
from support.models import MODELS, TINY, Case, tokens
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from fla_compile.models import StateCache

every_model = pytest.mark.parametrize("case", MODELS, ids=str)
one_of_each = pytest.mark.parametrize("case", [case for case in MODELS if not case.label], ids=str)


def close(a: Tensor, b: Tensor, tolerance: float = 2e-5) -> None:
    assert (a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1)


def by_chunks(model: PreTrainedModel, ids: Tensor, cuts: tuple[int, ...], mask: Tensor | None = None) -> Tensor:
    """The logits of a sequence given in pieces, each continuing the cache of the one before."""
    cache, logits = None, []
    for start, stop in zip((0, *cuts), (*cuts, ids.shape[1]), strict=True):
        seen = None if mask is None else mask[:, :stop]
        step = model(ids[:, start:stop], attention_mask=seen, past_key_values=cache, use_cache=True)
        cache = step.past_key_values
        logits.append(step.logits)
    assert cache.get_seq_length() == ids.shape[1]
    return torch.cat(logits, 1)


@every_model
def test_every_parameter_gets_a_finite_gradient(case: Case) -> None:
    model = case.new_model()
    ids = tokens(2, 9)
    out = model(ids, labels=ids)
    out.loss.backward()
    assert out.logits.shape == (2, 9, TINY["vocab_size"]) and out.past_key_values is None
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@every_model
@torch.no_grad()
def test_the_cache_continues_a_sequence_wherever_it_is_cut(case: Case) -> None:
    model, ids = case.new_model().eval(), tokens(2, 13)
    close(by_chunks(model, ids, (5, 6, 7)), model(ids).logits)


@one_of_each
@torch.no_grad()
def test_the_cache_may_be_given_under_its_newer_name(case: Case) -> None:
    model, ids = case.new_model().eval(), tokens(2, 5)
    cache = StateCache()
    pieces = [model(piece, cache=cache, use_cache=True).logits for piece in ids.split([3, 2], 1)]
    close(torch.cat(pieces, 1), model(ids).logits)


@every_model
@torch.no_grad()
def test_padding_anywhere_changes_nothing(case: Case) -> None:
    model, ids = case.new_model().eval(), tokens(2, 11)
    mask = torch.tensor([list(map(int, "01100111011110110")), list(map(int, "11110001101111010"))])
    padded = torch.full_like(mask, 7)
    counts = mask.sum(1).tolist()
    for row, count in enumerate(counts):
        padded[row, mask[row].bool()] = ids[row, :count]
    whole, pieces = model(padded, attention_mask=mask).logits, by_chunks(model, padded, (3, 4, 9), mask)
    for row, count in enumerate(counts):
        alone = model(ids[row : row + 1, :count]).logits[0]
        close(whole[row, mask[row].bool()], alone)
        close(pieces[row, mask[row].bool()], alone)


@every_model
def test_generation_with_the_cache_gives_the_same_tokens(case: Case) -> None:
    model, ids = case.new_model().eval(), tokens(2, 5)
    mask = torch.ones_like(ids)
    mask[0, :2] = ids[0, :2] = 0
    for how in ({}, {"num_beams": 3}):
        given = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, **how}
        plain = model.generate(ids, use_cache=False, **given)
        assert torch.equal(model.generate(ids, **given), plain)
    greedy = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert torch.equal(model.generate(ids[:1, 2:], max_new_tokens=6, do_sample=False)[0, 3:], greedy[0, 5:])
    chunked = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, prefill_chunk_size=2)
    assert torch.equal(chunked, greedy)


@one_of_each
@torch.no_grad()
def test_saved_models_load_with_the_same_weights_and_config(case: Case, tmp_path) -> None:
    model, ids = case.new_model(tie_word_embeddings=True).eval(), tokens(1, 6)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model) and loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == {**model.config.to_dict(), "dtype": "float32"} | {
        name: value for name, value in loaded.config.to_dict().items() if name in ("_name_or_path", "dtype")
    }
    base = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(base(ids).last_hidden_state, model.base_model(ids).last_hidden_state)


@one_of_each
def test_gradient_checkpointing_gives_the_same_gradients(case: Case) -> None:
    model, ids = case.new_model(), tokens(2, 6)
    model(ids, labels=ids).loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(ids, labels=ids, use_cache=True).loss.backward()
    for name, p in model.named_parameters():
        close(p.grad, expected[name], 1e-6)


@one_of_each
@torch.no_grad()
def test_hidden_states_logits_to_keep_and_tuples(case: Case) -> None:
    model, ids = case.new_model().eval(), tokens(1, 5)
    out = model(ids, output_hidden_states=True, use_cache=False)
    assert len(out.hidden_states) == TINY["num_hidden_layers"] + 1
    assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)
    assert torch.equal(out.hidden_states[0], model.get_input_embeddings()(ids))
    close(model(inputs_embeds=out.hidden_states[0]).logits, out.logits, 1e-6)
    close(model(ids, logits_to_keep=2).logits, out.logits[:, -2:], 1e-6)
    loss, logits = model(ids, labels=ids, return_dict=False, use_cache=False)
    assert torch.equal(logits, out.logits) and loss.ndim == 0


@every_model
def test_a_layer_alone_mixes_tokens(case: Case) -> None:
    block = case.new_model().base_model.layers[0]
    mixer = getattr(block, block.mixer_name)
    x = torch.randn(2, 7, TINY["hidden_size"])
    o, weights, cache, *_ = mixer(x)
    assert o.shape == x.shape and weights is None and cache is None
    cache = StateCache()
    pieces = [mixer(piece, past_key_values=cache, use_cache=True)[0] for piece in x.split([3, 1, 3], 1)]
    close(torch.cat(pieces, 1), o)


@one_of_each
def test_what_would_be_mixed_up_is_refused(case: Case) -> None:
    model, ids = case.new_model(), tokens(1, 4)
    with pytest.raises(ValueError, match="position_ids"):
        model(ids, position_ids=torch.zeros_like(ids))
    with pytest.raises(ValueError, match="StateCache"):
        model(ids, past_key_values=object())
    with pytest.raises(ValueError, match="mems"):
        model(ids, mems=StateCache())
    with pytest.raises(ValueError, match="got both"):
        model(ids, past_key_values=StateCache(), cache=StateCache())
    with pytest.raises(ValueError, match="attention_mask"):
        model(ids, attention_mask=torch.ones(1, 1, 4, 4))
