"""What a CUDA graph takes and gives, with what stands for a GPU; the graphs themselves are in the GPU suites."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastvideo_vae_core.errors import ConfigError
from fastvideo_vae_core.plan import Direction
from fastvideo_vae_core.testing.golden import make_input
from fastvideo_vae_core.testing.graphs import captured_on_cpu, without_a_gpu
from fastvideo_vae_core.testing.toys import ToyImage, toy


class Clamped(ToyImage):
    """A family with a last touch, of which plans have another shape than calls: rows and columns change places."""

    def _as_planned(self, x: Tensor) -> Tensor:
        return x.mT if x.shape[3] == 5 else x

    def _finish(self, direction: Direction, y: Tensor) -> Tensor:
        return y.clamp_(-0.01, 0.01)


def test_a_graph_gives_what_a_call_gives() -> None:
    vae = toy(Clamped).requires_grad_(False)
    z = make_input("graph", (1, 4, 6, 5), "latent")
    captured = captured_on_cpu(vae, vae.plan_decode((1, 4, 5, 6)))
    with without_a_gpu():
        for each in (z, z.mT, -z):
            assert torch.equal(captured(each).sample, vae.decode(each).sample)
        assert float(captured(z).sample.abs().max()) == pytest.approx(0.01)
        with pytest.raises(ConfigError, match="make a new one"):
            captured(z[:, :, :3])


def test_what_overflows_is_computed_again() -> None:
    vae = toy(Clamped).half().requires_grad_(False)
    vae.config = replace(vae.config, fp16="retry")
    z = torch.full((1, 4, 6, 5), 6e4, dtype=torch.float16)
    captured = captured_on_cpu(vae, vae.plan_decode((1, 4, 5, 6)))
    with without_a_gpu(), pytest.warns(UserWarning, match="overflowed in float16"):
        made = captured(z).sample
    with pytest.warns(UserWarning, match="overflowed in float16"):
        assert torch.equal(made, vae.decode(z).sample)
