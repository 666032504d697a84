"""Squares of pixels as channels."""

from __future__ import annotations

import pytest
import torch

from fastvideo_vae_core.ops.patches import patchify, unpatchify


def test_channels_are_ordered_by_channel_column_and_row() -> None:
    x = torch.arange(2 * 3 * 4 * 6, dtype=torch.float32).view(1, 2, 3, 4, 6)
    made = patchify(x, 2)
    assert made.shape == (1, 8, 3, 2, 3)
    for channel in range(2):
        for column in range(2):
            for row in range(2):
                assert torch.equal(made[:, 4 * channel + 2 * column + row], x[:, channel, :, row::2, column::2])


@pytest.mark.parametrize("patch", [1, 2, 4])
@pytest.mark.parametrize("frames", [0, 1, 3])
def test_there_and_back(patch: int, frames: int) -> None:
    x = torch.randn(2, 3, frames, 8, 12, generator=torch.Generator().manual_seed(0))
    assert torch.equal(unpatchify(patchify(x, patch), patch), x)
