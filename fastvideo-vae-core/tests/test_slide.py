"""Networks that slide along an axis, and weight norm that is folded."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastvideo_vae_core.tiling import Axis, slide
from fastvideo_vae_core.weight_norm import fold, unfold

KERNEL = torch.randn(1, 1, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def same(x: Tensor) -> Tensor:
    return F.conv1d(x, KERNEL, padding=2)


def halved(x: Tensor) -> Tensor:
    return F.conv1d(x, KERNEL[..., :4], stride=2, padding=1)


def tripled(x: Tensor) -> Tensor:
    return F.conv_transpose1d(x, KERNEL[..., :4].repeat(1, 1, 2)[..., :6], stride=3, padding=2)


NETWORKS = [
    (same, Axis(before=2, after=2)),
    (halved, Axis(down=2, before=2, after=2)),
    (tripled, Axis(up=3, lead=1, before=1, after=1)),
]


@pytest.mark.parametrize(("run", "axis"), NETWORKS)
@pytest.mark.parametrize("size", [1, 3, 7, 50])
@pytest.mark.parametrize("tile", [1, 4, 100])
def test_sliding_is_running(run: object, axis: Axis, size: int, tile: int) -> None:
    assert callable(run)
    x = torch.randn(2, 1, 24, dtype=torch.float64)
    pieces = list(slide(axis, x.split(size, 2), run, tile))
    assert max(piece.shape[2] for piece in pieces) <= tile
    assert torch.allclose(torch.cat(pieces, 2), run(x), rtol=0, atol=1e-14)


def test_a_piece_comes_when_its_context_is_there_and_nothing_older_is_kept() -> None:
    seen = []

    def run(x: Tensor) -> Tensor:
        seen.append(x.shape[2])
        return same(x)

    def endless() -> Iterator[Tensor]:
        while True:
            yield torch.zeros(1, 1, 1)

    axis, pieces = Axis(before=2, after=2), slide(Axis(before=2, after=2), endless(), lambda x: run(x.double()), 8)
    for _ in range(20):
        assert next(pieces).shape == (1, 1, 1)
    assert max(seen) == 1 + axis.before + axis.after


def test_no_chunks_give_no_pieces() -> None:
    assert not list(slide(Axis(), [], same, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_unfolding_is_undone_by_folding(dtype: torch.dtype) -> None:
    weight = torch.randn(16, 7, 5, dtype=torch.float64).to(dtype)
    weight[3] = 0
    norm, direction = unfold(weight)
    assert norm.shape == (16, 1, 1)
    assert torch.equal(fold(norm, direction, torch.promote_types(dtype, torch.float32)).to(dtype), weight)
