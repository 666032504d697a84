"""What a family tells the suite, and what the tests of every theme share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from fastvideo_vae_core.plan import Direction, Plan
from fastvideo_vae_core.testing.golden import InputKind, make_input
from fastvideo_vae_core.testing.threads import single_thread
from fastvideo_vae_core.vae import ParallelTiledVAE

VAE = ParallelTiledVAE[Any]

both_directions = pytest.mark.parametrize("direction", ["encode", "decode"])


class Hooks(ABC):
    """What a family gives, and helpers that read the rest off the model.

    Attributes:
        latent_grids: sizes of latents behind (B, C) to try: the smallest, odd ones, unequal ones. The last is tiled.
        stream_axis: along which the pieces of a stream are put together: 0 for images, 2 for video and audio.
        shares_streams: several devices can compute a stream together.
        blends: there are blended tiles, of pictures.
        fp32_bound, fp64_bound: largest absolute difference between two ways of computing one answer; outputs of
            `tiny()` should be near unit size, for which `testing.golden.fill` cares.
        bf16_bound: largest relative error of bfloat16 against float32: 8 bits of mantissa through a deep network.
    """

    latent_grids: ClassVar[tuple[tuple[int, ...], ...]]
    stream_axis: ClassVar[int] = 0
    shares_streams: ClassVar[bool] = True
    blends: ClassVar[bool] = False
    fp32_bound: ClassVar[float] = 1e-5
    fp64_bound: ClassVar[float] = 1e-12
    bf16_bound: ClassVar[float] = 0.1

    @abstractmethod
    def tiny(self) -> VAE:
        """A new tiny model of the family in float32, with the same random weights every time."""

    @pytest.fixture(autouse=True)
    def _one_thread(self) -> Iterator[None]:
        with single_thread():
            yield

    @pytest.fixture
    def vae(self) -> VAE:
        """As `load` gives it: frozen."""
        return self.tiny().eval().requires_grad_(False)

    @pytest.fixture
    def vae64(self, vae: VAE) -> VAE:
        return vae.double()

    def example(self, vae: VAE, direction: Direction, batch: int = 2, grid: tuple[int, ...] | None = None) -> Tensor:
        """An input in the model's type: of the last of `latent_grids`, if no grid of latents is given."""
        z_shape = (batch, vae.channels[1], *(grid or self.latent_grids[-1]))
        if direction == "decode":
            return make_input("conformance", z_shape, "latent").to(vae.dtype)
        kinds: tuple[InputKind, ...] = ("audio", "image", "video")
        return make_input("conformance", vae.decoded_shape(z_shape), kinds[len(z_shape) - 3]).to(vae.dtype)

    def run(self, vae: VAE, direction: Direction, x: Tensor, plan: Plan | None = None) -> Tensor:
        """The samples, or the mean and the deviation of the posterior in one tensor."""
        if direction == "decode":
            return vae.decode(x, plan=plan).sample
        return moments(vae.encode(x, plan=plan).latent_dist)

    def plan(self, vae: VAE, direction: Direction, shape: tuple[int, ...], **options: Any) -> Plan:
        return (vae.plan_encode if direction == "encode" else vae.plan_decode)(shape, **options)

    def illegal_shapes(self, vae: VAE) -> list[tuple[int, ...]]:
        """Sample shapes that the architecture does not map to whole latents: one for each axis that has a law."""
        legal = vae.decoded_shape((1, vae.channels[1], *self.latent_grids[-1]))
        return [
            (*legal[:index], legal[index] + 1, *legal[index + 1 :])
            for index, axis in enumerate(vae.sample_axes, start=2)
            if axis.up > 1
        ]


def moments(posterior: Any) -> Tensor:
    """Mean and deviation of a posterior in one tensor."""
    return torch.cat([posterior.mean, posterior.std], 1)


def distance(ours: Tensor, reference: Tensor) -> float:
    """Largest absolute difference; infinite where the shapes differ or either holds a NaN."""
    if ours.shape != reference.shape:
        return math.inf
    gap = float((ours.double() - reference.double()).abs().max())
    return math.inf if math.isnan(gap) else gap
