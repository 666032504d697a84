"""Attention over all positions of a grid, with a single head, as the middle blocks of autoencoders have it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fastvideo_vae_core.ops.norm import group_norm


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
        tokens = group_norm(x, self.group_norm).flatten(2).transpose(1, 2)
        q, k, v = (layer(tokens).unsqueeze(1) for layer in (self.to_q, self.to_k, self.to_v))
        mixed = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        return self.to_out[0](mixed).transpose(1, 2).reshape(x.shape) + x
