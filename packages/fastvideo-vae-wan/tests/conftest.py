"""What several test files share: the published networks with the weights of the golden files, and diffusers' twins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import fastvideo_vae_core as fvae
from fastvideo_vae_core.config import VAEConfig
from fastvideo_vae_core.testing.golden import Golden, fill, golden_path, load_golden
from fastvideo_vae_wan import AutoencoderKLWan, WanArchConfig


@dataclass(frozen=True)
class Published:
    """A golden file, its checkpoint on the disk in the official layout, and that checkpoint loaded."""

    golden: Golden
    path: Path
    model: AutoencoderKLWan


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Published]:
    """Published networks by variant, "wan2.1" or "wan2.2", one at a time: 127 and 705 million numbers."""
    built: dict[str, Published] = {}

    def get(variant: str) -> Published:
        if variant not in built:
            for other in built.values():
                other.path.unlink()
            built.clear()
            golden = load_golden(golden_path({"wan2.1": "wan21", "wan2.2": "wan22"}[variant] + ".safetensors"))
            # The official names of the files. There is no configuration beside them.
            path = tmp_path_factory.mktemp(variant) / f"{variant.capitalize()}_VAE.pth"
            torch.save(golden.state_dict(), path)
            # Two cases have sizes that only the official code takes.
            model = fvae.load(path, config=VAEConfig(illegal_sizes="official"))
            assert isinstance(model, AutoencoderKLWan)
            built[variant] = Published(golden, path, model)
        return built[variant]

    return get


@pytest.fixture(scope="session")
def random_model() -> Callable[[WanArchConfig], AutoencoderKLWan]:
    """A model with random weights of the golden rule, as `load` gives it."""

    def build(arch: WanArchConfig) -> AutoencoderKLWan:
        model = AutoencoderKLWan(VAEConfig(arch_config=arch))
        fill(model, gains={"decoder.conv_out.weight": 0.5})
        return model.eval().requires_grad_(False)

    return build


@pytest.fixture(scope="session")
def diffusers_twin() -> Callable[[AutoencoderKLWan], Any]:
    """diffusers' own model with the configuration and the weights of ours."""
    diffusers = pytest.importorskip("diffusers", reason="this machine has no diffusers to compare with")

    def build(model: AutoencoderKLWan) -> Any:
        arch = model.arch.to_dict()
        ours_alone = ("scaling_factor", "clip_output")
        with torch.device("meta"):
            twin = diffusers.AutoencoderKLWan(**{name: each for name, each in arch.items() if name not in ours_alone})
        twin.load_state_dict(model.state_dict(), strict=True, assign=True)
        return twin.eval().requires_grad_(False)

    return build
