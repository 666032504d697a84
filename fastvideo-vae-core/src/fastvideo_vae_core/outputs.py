"""Containers that encode and decode return: diffusers' names, so that a model drops into its pipelines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

Distribution = TypeVar("Distribution")


@dataclass(frozen=True)
class EncoderOutput(Generic[Distribution]):
    """What `encode` returns; `encode(..., return_dict=False)` gives the tuple `(latent_dist,)`.

    latent_dist: the posterior over un-normalised latents.
    """

    latent_dist: Distribution

    def __getitem__(self, index: int) -> Distribution:
        return (self.latent_dist,)[index]


@dataclass(frozen=True)
class DecoderOutput:
    """What `decode` returns; `decode(..., return_dict=False)` gives the tuple `(sample,)`.

    sample: images (B, C, H, W), video (B, C, T, H, W) or audio (B, C, S), nominally in [-1, 1], not clamped
    unless the official decoder clamps.
    """

    sample: Tensor

    def __getitem__(self, index: int) -> Tensor:
        return (self.sample,)[index]
