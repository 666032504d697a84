"""Attention over all positions of a grid, with a single head, as the middle blocks of autoencoders have it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvideo_vae_core.ops.norm import group_norm
from fastvideo_vae_core.rehearsal import device_of

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
        return self._attend(x, x, F.scaled_dot_product_attention)

    def excerpt(self, x: Tensor, region: Sequence[slice]) -> Tensor:
        """A region of the result, along the axes behind (B, C), for its share of the work."""
        return self._attend(x, x[(slice(None), slice(None), *region)], F.scaled_dot_product_attention, region)

    def _attend(self, x: Tensor, asking: Tensor, mix: Mix, region: Sequence[slice] = ()) -> Tensor:
        normed = group_norm(x, self.group_norm)
        tokens = normed.flatten(2).transpose(1, 2)
        asked = normed[(slice(None), slice(None), *region)].flatten(2).transpose(1, 2) if region else tokens
        q, k, v = self.to_q(asked).unsqueeze(1), self.to_k(tokens).unsqueeze(1), self.to_v(tokens).unsqueeze(1)
        mixed = mix(q, k, v).squeeze(1)
        made = self.to_out[0](mixed).transpose(1, 2).reshape(asking.shape)
        # A sum takes the layout of what comes first: on a GPU that of the grid, on a CPU as the reference has it.
        return asking + made if device_of(x).type == "cuda" else made + asking


class FrameCausalAttention(GridAttention):
    """The same over a clip (B, C, T, H, W), where a position sees its own frame and the frames before it."""

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        frame = x_BCTHW.shape[3] * x_BCTHW.shape[4]
        return self._attend(x_BCTHW, x_BCTHW, lambda q, k, v: prefix_attention(q, k, v, frame))

    def excerpt(self, x_BCTHW: Tensor, region: Sequence[slice]) -> Tensor:
        frame = x_BCTHW.shape[3] * x_BCTHW.shape[4]
        asking = x_BCTHW[(slice(None), slice(None), *region)]
        first, asked = region[0].indices(x_BCTHW.shape[2])[0], asking.shape[3] * asking.shape[4]
        return self._attend(x_BCTHW, asking, lambda q, k, v: prefix_attention(q, k, v, frame, asked, first), region)


def prefix_attention(q: Tensor, k: Tensor, v: Tensor, block: int, asked: int | None = None, first: int = 0) -> Tensor:
    """Attention (B, heads, N, C) in which a position sees its own block of positions and the blocks before it.

    asked: queries for each block, if not all of it asks; they begin with the block number `first`.

    A mask would have N^2 entries. Each block attends to its prefix instead, which is half the work and no memory.
    """
    queries = q.split(block if asked is None else asked, dim=-2)
    ends = range((first + 1) * block, k.shape[-2] + 1, block)
    return torch.cat(
        [
            F.scaled_dot_product_attention(part, k[..., :end, :], v[..., :end, :])
            for part, end in zip(queries, ends, strict=False)
        ],
        dim=-2,
    )
