"""Every model under `torch.compile(model, backend="fla", fullgraph=True)`: what is recognised, how often compiled."""

import pytest
import torch
from support.models import MODELS, Case, tokens
from torch._dynamo.utils import counters

import fla_compile

every_model = pytest.mark.parametrize("case", MODELS, ids=str)


# The norm with a gate of a layer, by model; others have none.
NORM_GATES = {
    **dict.fromkeys(("RetNet", "GLA", "GLA-hybrid", "ABC", "HGRN", "GatedDeltaNet"), ("rms_norm(x) * silu(gate)",)),
    "GSA": ("rms_norm(x * sigmoid(gate))",),  # of silu(x)
    "RWKV6": ("layer_norm(x) * silu(gate)",),
    "KDA": ("rms_norm(x) * sigmoid(gate)",),
    "Mamba2": ("rms_norm(x * silu(gate))",),
}
LOSS = ("linear_cross_entropy",)


def families(report: fla_compile.Report, case: Case, refused: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The families of the layers' recurrences, once each layer's convolutions are found too."""
    assert tuple(refusal.reason for refusal in report.refusals) == refused, report
    layers = of_pattern(report, "recurrence")
    assert of_pattern(report, "short_conv") == ("short_conv",) * (case.convolutions * len(layers)), report
    return layers


def of_pattern(report: fla_compile.Report, pattern: str) -> tuple[str, ...]:
    return tuple(rewrite.family for rewrite in report.rewrites if rewrite.pattern == pattern)


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.parametrize("case", [case for case in MODELS if not case.label or "attn" in case.config], ids=str)
def test_a_training_step_is_recognised_completely(case: Case) -> None:
    """One layer, as all are alike; both where attention takes one."""
    layers = 2 if "attn" in case.config else 1
    model, ids = case.new_model(num_hidden_layers=layers, fuse_linear_cross_entropy=True), tokens(2, 6)
    report = fla_compile.explain(model, ids, labels=ids)
    assert families(report, case) == case.families[: len(case.families) * layers // 2]
    assert of_pattern(report, "norm_gate") == NORM_GATES.get(str(case), ())
    assert of_pattern(report, "linear_cross_entropy") == LOSS


def test_a_loss_beside_its_logits_is_refused() -> None:
    """Hugging Face's models return both, and so do ours unless they are told."""
    case = MODELS[-2]
    model, ids = case.new_model(num_hidden_layers=1, tie_word_embeddings=True), tokens(2, 6)
    beside = fla_compile.explain(model, ids, labels=ids)
    assert families(beside, case, ("logits_used",)) == ()
    assert [r.kernel for r in beside.rewrites if r.pattern == "cross_entropy"] == ["as written (Inductor)"]
    alone = fla_compile.explain(model, ids, labels=ids, skip_logits=True, num_items_in_batch=torch.tensor(9))
    assert families(alone, case) == () and of_pattern(alone, "linear_cross_entropy") == LOSS


def assert_the_loss_trains_alone(case: Case, **changes: object) -> None:
    """Compiled, with no refusal allowed: loss and gradients of the eager model that forms its logits."""
    ids, gradients = tokens(2, 9), []
    model, plain = (case.new_model(fuse_linear_cross_entropy=fused, **changes) for fused in (True, False))
    for run in (torch.compile(model, backend="fla", fullgraph=True, options={"strict": True}), plain):
        out = run(ids, labels=ids)
        out.loss.backward()
        assert (out.logits is None) == (run is not plain)
        gradients.append([out.loss.detach(), *(p.grad for p in (model if out.logits is None else plain).parameters())])
    for ours, eager in zip(*gradients, strict=True):
        assert (ours - eager).abs().max() <= 1e-4 * eager.abs().max() + 1e-6


@pytest.mark.slow
def test_the_loss_alone_trains_tied_weights_that_are_pulled() -> None:
    changes = {"num_hidden_layers": 1, "tie_word_embeddings": True, "use_l2warp": True}
    assert_the_loss_trains_alone(MODELS[-2], **changes)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in MODELS if not case.label], ids=str)
def test_the_loss_alone_trains_every_model(case: Case) -> None:
    assert_the_loss_trains_alone(case, num_hidden_layers=2 if "attn" in case.config else 1)


@pytest.mark.slow
@every_model
@torch.no_grad()
def test_training_prefill_padding_and_decoding_are_recognised(case: Case) -> None:
    model, ids = case.new_model(), tokens(2, 6)
    with torch.enable_grad():
        report = fla_compile.explain(model, ids, labels=ids)
        assert families(report, case, ("logits_used",)) == case.families
    model.eval()
    masked = case.families if case.masked_families is None else case.masked_families
    assert families(fla_compile.explain(model, ids, use_cache=True), case) == case.families
    assert (
        families(fla_compile.explain(model, ids, attention_mask=torch.ones_like(ids), use_cache=True), case) == masked
    )
    cache = model(ids, use_cache=True).past_key_values
    assert (
        families(fla_compile.explain(model, ids[:, :1], past_key_values=cache, use_cache=True), case) == case.families
    )


@pytest.mark.slow
@every_model
def test_one_compilation_trains_every_length(case: Case) -> None:
    model = case.new_model()
    step = torch.compile(model, backend="fla", fullgraph=True, dynamic=True)
    for length in (17, 40, 70):
        ids, gradients = tokens(2, length, seed=length), []
        for run in (step, model):
            model.zero_grad()
            loss = run(ids, labels=ids).loss
            loss.backward()
            gradients.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
        for ours, eager in zip(*gradients, strict=True):
            assert (ours - eager).abs().max() <= 1e-4 * eager.abs().max() + 1e-6
    assert graphs() == 1


@torch.no_grad()
def assert_two_graphs_generate(case: Case, device: str) -> None:
    model = case.new_model().eval().to(device)
    run = torch.compile(model, backend="fla", fullgraph=True, dynamic=True)
    for length in (17, 40, 70):
        ids = tokens(2, length, seed=length).to(device)
        ours, eager = run(ids, use_cache=True), model(ids, use_cache=True)
        assert (ours.logits - eager.logits).abs().max() <= 1e-4 * eager.logits.abs().max()
    assert graphs() == 1
    for i in range(4):
        ids = tokens(2, 1, seed=i).to(device)
        ours, eager = (
            f(ids, past_key_values=out.past_key_values, use_cache=True) for f, out in ((run, ours), (model, eager))
        )
        assert (ours.logits - eager.logits).abs().max() <= 1e-4 * eager.logits.abs().max()
    assert graphs() == 2
    assert ours.past_key_values.get_seq_length() == 74


@pytest.mark.slow
@every_model
def test_one_compilation_reads_prompts_of_every_length_and_one_writes(case: Case) -> None:
    assert_two_graphs_generate(case, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("case", [case for case in MODELS if str(case) in ("GLA", "KDA", "Mamba2")], ids=str)
def test_prompts_and_tokens_on_a_gpu(case: Case) -> None:
    assert_two_graphs_generate(case, "cuda")


@torch.no_grad()
def test_a_token_is_a_step_without_a_kernel() -> None:
    case = MODELS[1]
    model, ids = case.new_model(num_hidden_layers=1).eval(), tokens(2, 6)
    cache = model(ids, use_cache=True).past_key_values
    report = fla_compile.explain(model, ids[:, :1], past_key_values=cache, use_cache=True)
    kernels = [rewrite.kernel for rewrite in report.rewrites if rewrite.pattern == "recurrence"]
    assert kernels == ["step (Inductor)"]
    assert "torch.ops.fla_compile" not in report.graph("after")
