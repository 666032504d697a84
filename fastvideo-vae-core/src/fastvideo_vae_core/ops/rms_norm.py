"""RMS normalisation over the channels of each position, and the SiLU behind it.

Rows legend: (..., C), channels innermost, as feature maps lie in memory under `torch.channels_last_3d`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The official floor of a row's length, far below anything that a network makes.
EPS = 1e-12


class RMSNorm(nn.Module):
    """x / |x| * sqrt(C) * gamma, with |x| over the channels.

    gamma is stored as (C, 1, ...), with `axes` ones, so that it stands before channels-first grids.
    """

    def __init__(self, channels: int, axes: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * axes))

    # The floor is of the length, not a term under its root.
    eps = None

    @property
    def scale(self) -> Tensor:
        """gamma (C)."""
        return self.gamma.flatten()

    def forward(self, rows: Tensor) -> Tensor:
        return rms_norm(rows, self.scale)

    def silu(self, rows: Tensor, modulation: Modulation | None = None) -> Tensor:
        """The norm and its activation."""
        assert modulation is None, "only a pixel norm is modulated"
        return rms_norm_silu(rows, self.scale)


class PixelNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps), with the mean over the channels; no parameters."""

    scale = None

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, rows: Tensor) -> Tensor:
        return pixel_norm(rows, self.eps)

    def silu(self, rows: Tensor, modulation: Modulation | None = None) -> Tensor:
        """The norm, the modulation and the activation."""
        return pixel_norm_silu(rows, self.eps, modulation)


class Modulation(NamedTuple):
    """What a norm is followed by, for each item of the batch: y * (1 + scale) + shift; each (B, C)."""

    scale: Tensor
    shift: Tensor


def rms_norm(rows: Tensor, gamma: Tensor) -> Tensor:
    """Normalise rows (..., C), in at least float32: the definition."""
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).clamp_min(EPS)
    normal = wide * (wide.shape[-1] ** 0.5 / length)
    gamma = gamma.to(normal.dtype)
    return (normal * gamma if normal.requires_grad or gamma.requires_grad else normal.mul_(gamma)).to(rows.dtype)


def rms_norm_silu(rows: Tensor, gamma: Tensor) -> Tensor:
    """The norm and its activation: the definition. The normalised rows are new, so SiLU overwrites them unless a
    gradient needs them."""
    wide = rms_norm(rows.to(torch.promote_types(rows.dtype, torch.float32)), gamma)
    return F.silu(wide, inplace=not wide.requires_grad).to(rows.dtype)


def pixel_norm(rows: Tensor, eps: float) -> Tensor:
    """Normalise rows (..., C), in at least float32: the definition."""
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    length = (wide.square().mean(-1, keepdim=True) + eps).sqrt_()
    return (wide / length).to(rows.dtype)


def pixel_norm_silu(rows: Tensor, eps: float, modulation: Modulation | None = None) -> Tensor:
    """The norm, its modulation and the activation: the definition. rows are (B, ..., C)."""
    wide = pixel_norm(rows.to(torch.promote_types(rows.dtype, torch.float32)), eps)
    if modulation is not None:
        scale, shift = (each.to(wide.dtype).view(len(rows), *[1] * (rows.ndim - 2), -1) for each in modulation)
        wide = torch.addcmul(shift, wide, 1 + scale)
    return F.silu(wide, inplace=not wide.requires_grad).to(rows.dtype)
