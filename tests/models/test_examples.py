"""The examples that use the models, small."""

import generate
import hybrid
import pytest
import torch


def test_generate_times_prompt_and_decoding_and_takes_checkpoints(tmp_path, capsys) -> None:
    small = ["--dim=16", "--layers=2", "--heads=2", "--new=4"]
    generate.new_model(generate.parse_args([*small, "--model=RetNet"])).save_pretrained(tmp_path)
    fresh = generate.main([*small, "--model=RetNet", "--text=def "])["eager"]
    loaded = generate.main([*small, f"--checkpoint={tmp_path}", "--text=def "])["eager"]
    assert torch.equal(loaded["tokens"], fresh["tokens"]) and loaded["tokens"].shape == (1, 4)
    assert min(fresh["prompt tokens/s"], fresh["decode tokens/s"]) > 0 and "def " in capsys.readouterr().out
    beams = generate.main([*small, "--beams=2", "--batch=3", "--prompt=5", "--sample"])["eager"]
    assert beams["tokens"].shape == (3, 4)
    with pytest.raises(SystemExit):
        generate.parse_args(["--new=1"])


def test_hybrid_learns_saves_and_continues_a_text(tmp_path, capsys) -> None:
    small = ["--dim=32", "--layers=2", "--heads=2", "--batch=4", "--seq-len=16", "--steps=16", "--eager", "--lr=1e-2"]
    losses = hybrid.main([*small, "--window=8", f"--out={tmp_path}"])
    assert len(losses) == 16 and losses[0] > 5 and losses[-1] < losses[0] - 1
    said = capsys.readouterr().out
    assert "3 rewritten, 0 refused" in said and "linear_cross_entropy" in said
    assert (tmp_path / "model.safetensors").is_file()
