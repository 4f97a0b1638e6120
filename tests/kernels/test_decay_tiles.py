"""Tiles in the order in which threads have them: written, read, found by row and column, and summed; interpreted.

Run as a script (with TRITON_INTERPRET=1) this file is the interpreted part, as for `test_decay_triton`.
"""

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton has no build for this system")

import triton.language as tl  # noqa: E402
from interpreted import interpreted  # noqa: E402

from fla_compile.kernels.decay_tiles import (  # noqa: E402
    by_thread_at,
    load_product,
    product_threads,
    product_warps,
    store_product,
    thread_sums,
)

TILES = (16, 16), (32, 16), (64, 32), (64, 64), (128, 64), (256, 64)


@triton.jit
def tile_kernel(p_x, p_s, p_y, p_at, p_sums, BX: tl.constexpr, BW: tl.constexpr, N: tl.constexpr):
    """A tile is stored as the second; then read back, its addresses and its threads' sums written."""
    o_x, o_w = tl.arange(0, BX), tl.arange(0, BW)
    o_t = (o_x * BW)[:, None] + o_w[None, :]
    b_x = tl.load(p_x + o_t)
    store_product(p_s, 1, b_x, BX, BW)
    tl.store(p_y + o_t, load_product(p_s, 1, BX, BW))
    tl.store(p_at + o_t, by_thread_at(o_x, o_w, BX, BW))
    tl.store(p_sums + tl.arange(0, N), thread_sums(b_x, BX, BW, N))


def owner(row, column, warps):
    """The thread, of four warps or eight, that the hardware gives this number of a product, 16 rows a warp."""
    return row // 16 % max(4, warps) * 32 + row % 8 * 4 + column % 8 // 2


def interpret() -> None:
    for BX, BW in TILES:
        x = torch.randn(BX, BW)
        s, y, at = torch.full((2, BX * BW), torch.nan), torch.empty_like(x), torch.empty(BX, BW, dtype=torch.int32)
        threads = product_threads(BX)
        sums = torch.empty(threads)
        tile_kernel[(1,)](x, s, y, at, sums, BX, BW, threads)
        assert s[0].isnan().all() and torch.equal(y, x)
        assert torch.equal(at.flatten().sort().values, torch.arange(BX * BW, dtype=torch.int32))
        assert torch.equal(s[1][at.long()], x)
        row, column = torch.meshgrid(torch.arange(BX), torch.arange(BW), indexing="ij")
        thread = owner(row, column, product_warps(BX))
        assert torch.equal(at // 8 % threads, thread), "eight side by side are of one thread, then come the next one's"
        torch.testing.assert_close(sums, torch.zeros(threads).index_add_(0, thread.flatten(), x.flatten()))
        print("ok", BX, BW)


def test_interpreted():
    assert interpreted(__file__) == len(TILES)


if __name__ == "__main__":
    interpret()
