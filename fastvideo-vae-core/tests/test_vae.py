"""The base class, through the contract of every family: laid on miniature image, video and audio families."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fastvideo_vae_core.testing.conformance import ConformanceSuite
from fastvideo_vae_core.testing.plugins import installed
from fastvideo_vae_core.testing.toys import POINTS, Toy, ToyAudio, ToyImage, ToyVideo, toy


@pytest.fixture(autouse=True)
def _toys_are_installed() -> Iterator[None]:
    with installed(*POINTS):
        yield


class TestToyImage(ConformanceSuite):
    latent_grids = ((1, 1), (3, 1), (5, 7))

    def tiny(self) -> Toy:
        return toy(ToyImage)


class TestToyVideo(ConformanceSuite):
    latent_grids = ((1, 1, 1), (1, 2, 3), (4, 3, 2), (5, 3, 4))
    stream_axis = 2
    shares_streams = False

    def tiny(self) -> Toy:
        return toy(ToyVideo)


class TestToyAudio(ConformanceSuite):
    latent_grids = ((1,), (2,), (9,))

    def tiny(self) -> Toy:
        return toy(ToyAudio)
