"""The elementwise recurrence h_t = a_t h_{t-1} + x_t on one CUDA device: ours beside fla's hgrn, and the copy floor.

    python benchmarks/linear_scan.py

x and a [B, T, D] in bfloat16; fla takes the logarithm of a. "ms" are of calls, "kernels ms" what the GPU takes for
forward and backward without the launches it may wait for; "to floor" is its ratio to a copy of what must move once
(forward: x and a read, h written; backward: x, a and dh read, dx and da written) at 3.0 TB/s.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import save, table
from timing import floors, measure, peer
from torch import Tensor

from fla_compile.ops import linear_scan, naive_linear_scan

SHAPES = [(8, 2048, 4096), (8, 2048, 512), (1, 16384, 2048)]  # B, T, D
FLA = {"fla chunk": ("fla.ops.hgrn", "chunk_hgrn"), "fla recurrent": ("fla.ops.hgrn", "fused_recurrent_hgrn")}


def output_of(theirs: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, g: theirs(x, g)[0]


def contestants() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    found: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"ours": lambda x, g: linear_scan(x, g.exp())[0]}
    for name, where in FLA.items():
        theirs = peer(*where)
        if theirs is not None:
            found[name] = output_of(theirs)
    found["ours, factors given"] = lambda x, a: linear_scan(x, a)[0]
    return found


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("a CUDA device is needed, and torch sees none")
    rows: list[dict[str, Any]] = []
    for shape in SHAPES:
        torch.manual_seed(0)
        x, g = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        g = F.logsigmoid(g)
        truth, _ = naive_linear_scan(x.double(), g.double().exp())
        dh, least = torch.randn_like(x), floors([x, g], x)
        for name, f in contestants().items():
            leaves = [y.detach().requires_grad_() for y in (x, g.exp() if "factors" in name else g)]
            row = {"B,T,D": ",".join(map(str, shape)), "by": name, **measure(f, leaves, dh), **least}
            if "kernels ms" in row:
                row["to floor"] = row["kernels ms"] / row["floor fwd+bwd"]
                with torch.no_grad():
                    row["error of h"] = ((f(*leaves).double() - truth).norm() / truth.norm()).item()
            rows.append(row)
            print(row, flush=True)
            save("linear_scan", "cuda", "linear scan", rows, {"shapes": SHAPES})
    print(table(rows))


if __name__ == "__main__":
    main()
