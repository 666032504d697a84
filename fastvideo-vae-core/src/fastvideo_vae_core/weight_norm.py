"""Weight norm, folded: a weight that is stored as direction and norm appears as the one tensor that it stands for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastvideo_vae_core.checkpoint import Checkpoint

# The ends of the names of norm and direction, as torch.nn.utils.weight_norm and its parametrization spell them.
_SPELLINGS = (
    (".weight_g", ".weight_v"),
    (".parametrizations.weight.original0", ".parametrizations.weight.original1"),
)


def folded(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with `x.weight` for every pair of `x.weight_g` and `x.weight_v`, computed when it is read."""
    infos, sources = dict(checkpoint.infos), dict(checkpoint._sources)
    for norm in checkpoint.infos:
        for end, other in _SPELLINGS:
            stem = norm.removesuffix(end)
            if stem != norm and _fits(checkpoint, norm, stem + other):
                infos[f"{stem}.weight"] = infos.pop(stem + other)
                sources[f"{stem}.weight"] = NormedWeight(checkpoint, norm, stem + other)
                del infos[norm]
    return replace(checkpoint, infos=infos, _sources=sources)


def fold(norm: Tensor, direction: Tensor) -> Tensor:
    """The weight in float64: each slice of the direction along the first axis, scaled to its norm (N, 1, ...)."""
    direction = direction.double()
    length = torch.linalg.vector_norm(direction, dim=tuple(range(1, direction.ndim)), keepdim=True)
    # A slice of zeros with a norm of zero stands for zeros.
    return direction * (norm.double() / length.clamp_min(torch.finfo(torch.float64).tiny))


@dataclass(frozen=True)
class NormedWeight:
    """A weight that is not in the file, but its norm and direction are."""

    checkpoint: Checkpoint
    norm: str
    direction: str

    def get_tensor(self, name: str) -> Tensor:
        """The whole weight."""
        return fold(self.checkpoint.read(self.norm), self.checkpoint.read(self.direction))

    def head(self, values: int) -> Tensor:
        """As many slices of the weight as have that many values."""
        direction = self.checkpoint.read(self.direction)
        slices = -(-values * len(direction) // direction.numel())
        return fold(self.checkpoint.read(self.norm)[:slices], direction[:slices])


def _fits(checkpoint: Checkpoint, norm: str, direction: str) -> bool:
    if direction not in checkpoint.infos:
        return False
    first, *rest = checkpoint.infos[direction].shape
    return checkpoint.infos[norm].shape == (first, *[1] * len(rest))
