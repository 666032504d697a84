"""Attention over all positions of a grid, with a single head, as the middle blocks of autoencoders have it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvideo_vae_core.ops.norm import group_norm

# Queries, keys and values (B, 1, N, C) to what the values mix to.
Mix = Callable[[Tensor, Tensor, Tensor], Tensor]


class GridAttention(nn.Module):
    """Residual self-attention of one head over the positions of x (B, C, ...), behind a group norm.

    Parameters have diffusers' names: group_norm, to_q, to_k, to_v, to_out.0.
    """

    def __init__(self, channels: int, groups: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=eps)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        return self._attend(x, F.scaled_dot_product_attention)

    def _attend(self, x: Tensor, mix: Mix) -> Tensor:
        tokens = group_norm(x, self.group_norm).flatten(2).transpose(1, 2)
        q, k, v = (layer(tokens).unsqueeze(1) for layer in (self.to_q, self.to_k, self.to_v))
        mixed = mix(q, k, v).squeeze(1)
        return self.to_out[0](mixed).transpose(1, 2).reshape(x.shape) + x


class FrameCausalAttention(GridAttention):
    """The same over a clip (B, C, T, H, W), where a position sees its own frame and the frames before it."""

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        frame = x_BCTHW.shape[3] * x_BCTHW.shape[4]
        return self._attend(x_BCTHW, lambda q, k, v: prefix_attention(q, k, v, frame))


def prefix_attention(q: Tensor, k: Tensor, v: Tensor, block: int) -> Tensor:
    """Attention (B, heads, N, C) in which a position sees its own block of positions and the blocks before it.

    A mask would have N^2 entries. Each block attends to its prefix instead, which is half the work and no memory.
    """
    starts = range(0, q.shape[-2], block)
    return torch.cat(
        [
            F.scaled_dot_product_attention(
                q[..., start : start + block, :], k[..., : start + block, :], v[..., : start + block, :]
            )
            for start in starts
        ],
        dim=-2,
    )
