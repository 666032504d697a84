"""Snake, the periodic activation of audio networks: x + sin(alpha x)^2 / beta, with alpha and beta for each channel.

Source: Ziyin, Hartwig and Ueda 2020; with beta, NVIDIA/BigVGAN `activations.py`.
"""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvideo_vae_core.ops.conv1d import conv1d
from fastvideo_vae_core.ops.sums import Sum
from fastvideo_vae_core.rehearsal import device_of


class Snake(nn.Module):
    """Snake over the channels of a sum of tensors (B, C, S). The parameters alpha and beta (1, C, 1) are logarithms."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(1, channels, 1))
        self.beta = nn.Parameter(torch.zeros(1, channels, 1))

    def forward(self, x: Sum) -> Tensor:
        return self._sum_and_snake(x, keep=False)[1]

    def fork(self, x: Sum, room: int = 0) -> tuple[Tensor, Tensor]:
        """The sum, and Snake of it with so many zeros behind."""
        total, y = self._sum_and_snake(x, keep=True, room=room)
        assert total is not None
        return total, y

    def _sum_and_snake(self, x: Sum, keep: bool, room: int = 0) -> tuple[Tensor | None, Tensor]:
        if _fused(x.x, self):
            # Imported here because Triton takes a second to import and only GPUs need it.
            from fastvideo_vae_core.ops.kernels.snake import snake_of_sum

            return snake_of_sum(x, self.alpha, self.beta, keep, room)
        total = x.value()
        y = snake(total, self.alpha, self.beta)
        return total, F.pad(y, (0, room)) if room else y


def snake(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """x + sin(e^alpha x)^2 / (e^beta + 1e-9) for x (B, C, S) and logarithms (1, C, 1)."""
    scale = (beta.exp() + 1e-9).reciprocal()
    y = x * alpha.exp()
    if y.requires_grad:
        return x + scale * y.sin().square()
    # The product is new, so the rest needs no further buffer.
    return y.sin_().square_().mul_(scale).add_(x)


def snake_pointwise(x: Sum, act: Snake, conv: nn.Conv1d, skip: Tensor) -> Sum:
    """skip + conv(snake(x)), for a convolution of one tap that keeps the number of channels."""
    if _fused(x.x, act) and x.branch is None and x.x.dtype != torch.float32:
        from fastvideo_vae_core.ops.kernels import snake as kernels

        if kernels.takes_pointwise(conv.in_channels):
            return Sum(kernels.snake_pointwise(x, act.alpha, act.beta, conv, skip))
    return conv1d(act(x), conv)._replace(branch=skip)


def _fused(x: Tensor, act: Snake) -> bool:
    """Whether the Triton kernels take this: on a GPU, at most float32, and nothing to differentiate."""
    if device_of(x).type != "cuda" or x.dtype == torch.float64 or not _TRITON:
        return False
    return not (torch.is_grad_enabled() and (x.requires_grad or act.alpha.requires_grad))


_TRITON = importlib.util.find_spec("triton") is not None
