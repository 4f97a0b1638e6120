import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fla_compile import ops
from fla_compile.kernels import decay_retnet
from fla_compile.kernels.decay_naive import retnet_gamma

CPU = torch.device("cpu")


@pytest.fixture
def known(monkeypatch):
    known = {}
    monkeypatch.setattr(decay_retnet, "_known", known)
    return known


def _operands():
    return [torch.randn(1, 3, 2, 4) for _ in range(3)]


def test_made_once(known):
    for dtype in (torch.float32, torch.float64):
        gamma, log = decay_retnet.retnet_decay(3, CPU, dtype)
        want = retnet_gamma(3, dtype=dtype)
        assert torch.equal(gamma, want) and torch.equal(log, want.log())
        again = decay_retnet.retnet_decay(3, CPU, dtype)
        assert again[0] is gamma and again[1] is log
    assert len(known) == 2


def test_made_in_inference_mode_serves_training(known):
    q, k, v = _operands()
    with torch.inference_mode():
        want, _ = ops.retention(q, k, v)
        ops.retention_step(q, k, v, torch.zeros(1, 2, 4, 4))
    assert len(known) == 1
    o, _ = ops.retention(q.requires_grad_(), k, v)
    o.sum().backward()
    assert torch.equal(o, want)


def _trace(name, operands):
    if name == "fake":
        with FakeTensorMode() as mode:
            ops.retention(*map(mode.from_tensor, operands))
    elif name == "make_fx":
        make_fx(lambda *x: ops.retention(*x)[0], tracing_mode="fake")(*operands)
    elif name == "compile":
        torch.compile(lambda *x: ops.retention(*x)[0], backend="aot_eager", fullgraph=True)(*operands)
    else:
        torch.func.functionalize(lambda *x: ops.retention(*x)[0])(*operands)


@pytest.mark.parametrize("name", ["fake", "make_fx", "compile", "functionalize"])
def test_traced_ones_are_neither_kept_nor_asked_for(known, name):
    operands = _operands()
    _trace(name, operands)
    assert not known
    want, _ = ops.retention(*operands)
    (kept,) = known.values()
    assert all(type(x) is torch.Tensor for x in kept)
    _trace(name, operands)
    assert torch.equal(ops.retention(*operands)[0], want)


@pytest.mark.gpu
def test_gpu_graph(known):
    """What a graph makes is its own; what is known already, it reads."""
    operands = [x.cuda() for x in _operands()]
    gamma = retnet_gamma(2, device=operands[0].device)
    want = ops.retention(*operands, gamma)[0]
    for kept in (0, 1):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            o = ops.retention(*operands)[0]
        assert len(known) == kept
        graph.replay()
        torch.testing.assert_close(o, want, rtol=0, atol=0)
        ops.retention(*operands)
        assert len(known) == 1
