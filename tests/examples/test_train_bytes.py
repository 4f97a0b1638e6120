"""The demo, small: its state carries over, its data split holds still, its weights survive the disk, its loss falls."""

import math

import pytest
import torch
import train_bytes as demo


@pytest.fixture
def model():
    torch.manual_seed(0)
    return demo.ByteLM(dim=32, layers=2, heads=2)


def arguments(*more: str):
    return demo.parse_args(["--batch=2", "--seq-len=24", "--dim=32", "--layers=2", "--heads=2", "--quiet", *more])


def test_a_byte_at_a_time_from_the_state_equals_all_at_once(model):
    tokens = torch.randint(256, (2, 17))
    whole, last = model(tokens)
    logits, state = model(tokens[:, :9])
    parts = [logits]
    for t in range(9, 17):
        logits, state = model(tokens[:, t : t + 1], state)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    torch.testing.assert_close(state, last)


def test_a_prediction_sees_no_later_byte(model):
    tokens = torch.randint(256, (1, 12))
    changed = tokens.clone()
    changed[:, 7:] += 1
    before, after = model(tokens)[0], model(changed % 256)[0]
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert not torch.equal(before[:, 7:], after[:, 7:])


def test_the_split_is_by_file_and_the_same_every_time():
    train, validation = demo.standard_library()
    again = demo.standard_library()
    assert torch.equal(train, again[0]) and torch.equal(validation, again[1])
    assert len(train) > 5 * len(validation) > 100_000


def test_windows_hold_one_byte_more_than_the_sequence():
    data = torch.arange(100, dtype=torch.uint8)
    tokens = demo.windows(data, 4, 10, torch.Generator().manual_seed(0))
    assert tokens.shape == (4, 11) and tokens.dtype == torch.int64
    assert (tokens.diff(dim=1) == 1).all()


def test_learning_rate_rises_and_falls():
    rates = [demo.learning_rate(i, 100, 1.0) for i in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == 1.0 and rates[-1] == pytest.approx(0.1, abs=0.01)


def test_weights_read_back_equal(model, tmp_path):
    torch.manual_seed(1)
    fresh = demo.save_and_reload(model, demo.ByteLM(dim=32, layers=2, heads=2), tmp_path / "weights.safetensors")
    tokens = torch.randint(256, (1, 5))
    assert torch.equal(fresh(tokens)[0], model(tokens)[0])


def test_a_sample_continues_its_prompt_and_repeats_with_its_seed(model):
    texts = [demo.sample(model, b"def ", 8, 0.7, torch.Generator().manual_seed(0)) for _ in range(2)]
    assert texts[0] == texts[1] and len(texts[0]) == 12 and texts[0].startswith(b"def ")


def test_training_lowers_the_validation_loss_and_is_logged(model, tmp_path):
    log = demo.train(demo.model_loss, model, demo.standard_library(), arguments("--steps=12", "--lr=0.01"))
    (first, before), *_, (last, after) = log["validation"]
    assert (first, last) == (0, 12) and len(log["train"]) == len(log["seconds"]) == 12
    assert after < before - 0.2 and before == pytest.approx(math.log(256), abs=0.7)
    demo.plot(log, "a title", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_compiled_and_eager_train_alike():
    data, losses = demo.standard_library(), {}
    for backend in ("eager", "fla"):
        torch.manual_seed(0)
        model = demo.ByteLM(dim=32, layers=2, heads=2)
        step = (
            demo.model_loss if backend == "eager" else torch.compile(demo.model_loss, backend=backend, fullgraph=True)
        )
        losses[backend] = [loss for _, loss in demo.train(step, model, data, arguments("--steps=5"))["train"]]
    assert losses["fla"] == pytest.approx(losses["eager"], rel=1e-3)


PATTERNS = {
    "recurrence": ["gla"] * 2,
    "norm_gate": ["rms_norm(x) * silu(gate)"] * 2,
    "linear_cross_entropy": ["linear_cross_entropy"],
}


def test_every_layer_of_the_demo_is_recognised(model):
    import fla_compile

    report = fla_compile.explain(demo.model_loss, model, torch.randint(256, (2, 25)))
    families = {pattern: [r.family for r in report.rewrites if r.pattern == pattern] for pattern in PATTERNS}
    assert families == PATTERNS
    assert not report.refusals


def test_heads_that_do_not_divide_the_width_are_named(capsys):
    with pytest.raises(SystemExit):
        demo.parse_args(["--dim=30", "--heads=4"])
    assert "30 and 4" in capsys.readouterr().err
