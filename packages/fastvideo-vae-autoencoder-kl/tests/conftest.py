"""What several test files share: the published networks with the weights of the golden files, and diffusers' twins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import fastvideo_vae_core as fvae
from fastvideo_vae_autoencoder_kl import AutoencoderKL, AutoencoderKLArchConfig
from fastvideo_vae_core.config import VAEConfig
from fastvideo_vae_core.testing.golden import Golden, fill, golden_path, load_golden


@dataclass(frozen=True)
class Published:
    """A golden file, its checkpoint on the disk in the official layout, and that checkpoint loaded."""

    golden: Golden
    path: Path
    model: AutoencoderKL


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Published]:
    """Published networks by variant, "sd1" or "flux1". Each is built once in a run: 84 million numbers."""
    built: dict[str, Published] = {}

    def get(variant: str) -> Published:
        if variant not in built:
            name = {"sd1": "autoencoder_kl", "flux1": "autoencoder_flux"}[variant]
            golden = load_golden(golden_path(f"{name}.safetensors"))
            # The official name of FLUX.1's file, by which it is told from SD3's.
            file = "ae.safetensors" if variant == "flux1" else "first_stage.safetensors"
            path = tmp_path_factory.mktemp(name) / file
            save_file(golden.state_dict(), path)
            model = fvae.load(path, variant=variant)
            assert isinstance(model, AutoencoderKL)
            built[variant] = Published(golden, path, model)
        return built[variant]

    return get


@pytest.fixture(scope="session")
def random_model() -> Callable[[AutoencoderKLArchConfig], AutoencoderKL]:
    """A model with random weights of the golden rule, as `load` gives it."""

    def build(arch: AutoencoderKLArchConfig) -> AutoencoderKL:
        model = AutoencoderKL(VAEConfig(arch_config=arch))
        fill(model, gains={"decoder.conv_out.weight": 0.5})
        return model.eval().requires_grad_(False)

    return build


@pytest.fixture(scope="session")
def diffusers_twin() -> Callable[[AutoencoderKL], Any]:
    """diffusers' own model with the configuration and the weights of ours."""
    diffusers = pytest.importorskip("diffusers", reason="this machine has no diffusers to compare with")

    def build(model: AutoencoderKL) -> Any:
        with torch.device("meta"):
            twin = diffusers.AutoencoderKL(**model.arch.to_dict())
        twin.load_state_dict(model.state_dict(), strict=True, assign=True)
        return twin.eval().requires_grad_(False)

    return build
