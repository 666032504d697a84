"""RMS normalisation over the channels of each position, and the SiLU behind it.

Rows legend: (..., C), channels innermost, as feature maps lie in memory under `torch.channels_last_3d`.
"""

from __future__ import annotations

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

    def forward(self, rows: Tensor) -> Tensor:
        return rms_norm(rows, self.gamma.flatten())


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
