"""Every model learns: plain steps, LoRA, the Trainer, accelerate."""

import json

import accelerate
import peft
import pytest
import torch
from support.models import MODELS, Case, corpus, tokens
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from fla_compile.models.loss import pull_of_largest

every_model = pytest.mark.parametrize("case", MODELS, ids=str)
one_of_each = pytest.mark.parametrize("case", [case for case in MODELS if not case.label], ids=str)
some_models = pytest.mark.parametrize("case", MODELS[:2], ids=str)


class Windows(Dataset):
    """Consecutive pieces of the standard library's source, as a Trainer takes them."""

    def __init__(self, count: int, length: int) -> None:
        self.rows = corpus(count * length).view(count, length)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, list[int]]:
        return {"input_ids": self.rows[i].tolist(), "labels": self.rows[i].tolist()}


def train(case: Case, steps: int, batch: int, length: int) -> list[float]:
    model = case.model_class(case.new_config())  # as initialised, unlike in the other tests
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rows = corpus(steps * batch * length).view(steps, batch, length)
    losses = []
    for ids in rows:
        loss = model(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    return losses


@one_of_each
def test_the_loss_falls(case: Case) -> None:
    losses = train(case, steps=12, batch=8, length=12)
    assert sum(losses[-3:]) / 3 < losses[0] - 1.0, losses


@pytest.mark.slow
@every_model
def test_the_loss_falls_far(case: Case) -> None:
    """From 5.5, all bytes alike; how often each occurs, learned from the same text, gives 3.0."""
    losses = train(case, steps=300, batch=16, length=32)
    assert losses[0] > 5.3 and sum(losses[-10:]) / 10 < 2.4, losses


@one_of_each
def test_the_loss_alone_is_that_beside_the_logits(case: Case) -> None:
    model, ids = case.new_model(use_l2warp=True).double(), tokens(2, 6)
    found = []
    for fused in (False, True):
        model.zero_grad()
        model.config.fuse_linear_cross_entropy = fused
        out = model(ids, labels=ids, output_hidden_states=True)
        out.loss.backward()
        assert (out.logits is None) == fused and out.hidden_states is not None
        found.append([out.loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for alone, beside in zip(*reversed(found), strict=True):
        torch.testing.assert_close(alone, beside)
    assert model(ids, labels=ids, skip_logits=False).logits.shape == (2, 6, 256) == model(ids).logits.shape
    assert [x.ndim for x in model(ids, labels=ids, return_dict=False)] == [0]
    model.eval()
    assert model(ids, labels=ids).logits.shape == (2, 6, 256)
    assert model(ids, labels=ids, skip_logits=True).logits is None


@some_models
def test_labels_may_be_shifted_and_logits_few(case: Case) -> None:
    model, ids = case.new_model().eval(), tokens(2, 6)
    whole = model(ids, labels=ids)
    shifted = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], 1)
    for given in ({"labels": ids}, {"shift_labels": shifted}, {"labels": ids, "shift_labels": shifted}):
        out = model(ids, **given, logits_to_keep=2)
        assert torch.equal(out.loss, whole.loss) and torch.equal(out.logits, whole.logits[:, -2:])
    with pytest.raises(ValueError, match="skip_logits"):
        model(ids, skip_logits=True)


@pytest.mark.parametrize("kind", ["plain", "biased", "adapted"])
def test_the_pull_of_the_largest_logit(kind: str) -> None:
    x, head = torch.randn(2, 5, 8, requires_grad=True), torch.nn.Linear(8, 20, bias=kind == "biased")
    if kind == "adapted":
        adapter = peft.LoraConfig(target_modules=["0"], r=2, init_lora_weights=False)
        head = peft.inject_adapter_in_model(adapter, torch.nn.Sequential(head))[0]
    leaves = [x, *(p for p in head.parameters() if p.requires_grad)]
    top = head(x).amax(-1)
    expected = torch.autograd.grad(1e-4 / 10 * (top.detach() * top).sum(), leaves)
    for logits in (None, head(x)):
        pull = pull_of_largest(head, x, logits)
        assert pull == 0
        torch.testing.assert_close(torch.autograd.grad(pull, leaves), expected)


@one_of_each
def test_lora_trains_only_its_adapters(case: Case) -> None:
    model, ids = case.new_model(), tokens(2, 6)
    before = model(ids).logits.detach()
    # Not `all-linear`: peft refuses any `out_proj` under the model types mamba and mamba2.
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    wanted = [name for name in linear if name.split(".")[-1] not in ("lm_head", "out_proj")]
    adapters = peft.LoraConfig(target_modules=wanted, r=2, task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(model, adapters)
    assert torch.equal(tuned(ids).logits, before)
    tuned(ids, labels=ids).loss.backward()
    graded = {name for name, p in tuned.named_parameters() if p.grad is not None}
    assert graded and graded == {name for name, _ in tuned.named_parameters() if "lora_" in name}
    tuned.generate(input_ids=ids, max_new_tokens=2, do_sample=False)


@some_models
@pytest.mark.parametrize("fused", [False, True])
def test_the_trainer_trains_and_saves(case: Case, fused: bool, tmp_path) -> None:
    model, rows = case.new_model(fuse_linear_cross_entropy=fused), Windows(16, 12)
    options = TrainingArguments(
        tmp_path,
        max_steps=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        logging_steps=1,
        save_steps=3,
        eval_strategy="steps",
        eval_steps=3,
    )
    trainer = Trainer(model, options, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    history = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert len(losses) == 3 and losses[-1] < losses[0] and any("eval_loss" in entry for entry in history)
    assert trainer.predict(rows).predictions.shape == (16, 12, 256)
    loaded = type(model).from_pretrained(tmp_path / "checkpoint-3").eval()
    assert loaded.config.fuse_linear_cross_entropy == fused
    ids = tokens(1, 5)
    assert torch.equal(loaded(ids).logits, model.cpu().eval()(ids).logits)


@some_models
def test_a_padded_batch_has_the_loss_of_its_rows(case: Case) -> None:
    model, rows = case.new_model(), [tokens(1, n)[0] for n in (4, 7)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    labels = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
    batch = {"input_ids": ids, "attention_mask": (labels >= 0).long(), "labels": labels}
    alone = [model(row[None], labels=row[None]).loss * (len(row) - 1) for row in rows]
    torch.testing.assert_close(model(**batch).loss, sum(alone) / 9)
    torch.testing.assert_close(model(**batch, num_items_in_batch=18).loss, sum(alone) / 18)


@some_models
def test_accelerate_prepares_and_accumulates(case: Case) -> None:
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = case.new_model()
    model, optimiser = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    first, ids = next(model.parameters()).clone(), tokens(2, 6)
    for _ in range(2):
        with accelerator.accumulate(model):
            accelerator.backward(model(ids, labels=ids).loss)
            optimiser.step()
            optimiser.zero_grad()
    assert not torch.equal(next(model.parameters()), first)
