"""More values than keys: the split launch for up to 512, the fused one wherever its rows hold what they must."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton has no build for this system")

from decay_ahead import compile_kernel, kernels_of, kinds_of, most_stack  # noqa: E402
from decay_cases import FAMILIES, Case, make_inputs  # noqa: E402
from machine_code import check_memory  # noqa: E402
from test_decay_triton import check_results, on_gpu, run_kernels  # noqa: E402

from fla_compile.kernels import decay_chunk_gates, decay_triton_grads  # noqa: E402
from fla_compile.kernels.decay_configs import KINDS, TABLE, all_configs  # noqa: E402

# Bytes that gradients of so many values spill beyond what their row says.
GRADS = decay_chunk_gates.chunk_grads_kernel, decay_triton_grads.chunk_query_key_grad_kernel
MORE = {("constant", 90): 56, ("scalar", 90): 72, ("vector", 90): 16}


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("kind", list(KINDS))
def test_many_values_compile(arch, kind):
    """512 values: the split launch for up to 256 keys, and what the fused one has for them."""
    for row in (row for row, _ in all_configs() if row.arch == arch and kind in kinds_of(row)):
        if row.launch in ("grads", "kept", "walk") or (row.launch in ("tall", "split") and row.size < 256):
            continue
        for kernel, constants in kernels_of(row, kind, 512):
            compiled = compile_kernel(kernel, constants, row, kind, "ieee")
            # what seldom runs may wait for memory
            stack = 96 if constants.get("EXACT") else most_stack(row, kernel, constants)
            if kernel in GRADS and not constants.get("EXACT"):
                stack += MORE.get((kind, arch), 0)
            check_memory(compiled, TABLE[row][0].shared, stack, row)


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("dtype", "K", "V"),
    [(torch.bfloat16, 64, 512), (torch.bfloat16, 128, 256), (torch.bfloat16, 256, 512), (torch.float32, 40, 300)],
)
def test_gpu_many_values(family, dtype, K, V):
    """As the tables choose: outputs by passes where there are up to 128 keys, a gate a key fused, the rest split."""
    case = Case(family, 130, "weak", B=1, H=2, K=K, V=V)
    x = on_gpu(make_inputs(case, dtype))
    got, again = run_kernels(x), run_kernels(x)
    assert all(torch.equal(y, again[name]) for name, y in got.items())
    check_results(case, x, got, dtype)
