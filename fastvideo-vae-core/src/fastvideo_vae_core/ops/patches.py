"""Squares of pixels as channels, in the order of the official video autoencoders."""

from __future__ import annotations

from torch import Tensor


def patchify(x_BCTHW: Tensor, patch: int) -> Tensor:
    """(B, C, T, H, W) -> (B, C * patch^2, T, H / patch, W / patch), channels in the order (channel, column, row)."""
    if patch == 1:
        return x_BCTHW
    cells = x_BCTHW.unflatten(4, (-1, patch)).unflatten(3, (-1, patch))
    return cells.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)


def unpatchify(x_BCTHW: Tensor, patch: int) -> Tensor:
    """The inverse of `patchify`."""
    if patch == 1:
        return x_BCTHW
    # Spelt out, because a piece may have no frames.
    cells = x_BCTHW.unflatten(1, (x_BCTHW.shape[1] // patch**2, patch, patch))
    return cells.permute(0, 1, 4, 5, 3, 6, 2).flatten(5, 6).flatten(3, 4)
