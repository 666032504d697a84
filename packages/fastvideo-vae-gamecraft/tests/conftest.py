"""What several test files share: the published network with the weights of the golden file, and diffusers' twins."""

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
from fastvideo_vae_gamecraft import AutoencoderKLHunyuanVideo, HunyuanVideoArchConfig

# What diffusers' class has no name for.
OURS_ALONE = ("mid_block_causal_attn", "sample_size", "sample_tsize")


@dataclass(frozen=True)
class Published:
    """The golden file, its checkpoint on the disk in the official layout, and that checkpoint loaded."""

    golden: Golden
    path: Path
    model: AutoencoderKLHunyuanVideo


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    """The published network: 246 million numbers, built once in a run."""
    golden = load_golden(golden_path("gamecraft.safetensors"))
    # The official name of the file and its outer entry. There is no configuration beside it.
    path = tmp_path_factory.mktemp("gamecraft") / "pytorch_model.pt"
    torch.save({"state_dict": golden.state_dict()}, path)
    # One case has sizes that only the official code takes.
    model = fvae.load(path, config=VAEConfig(illegal_sizes="official"))
    assert isinstance(model, AutoencoderKLHunyuanVideo)
    return Published(golden, path, model)


@pytest.fixture(scope="session")
def random_model() -> Callable[[HunyuanVideoArchConfig], AutoencoderKLHunyuanVideo]:
    """A model with random weights of the golden rule, as `load` gives it."""

    def build(arch: HunyuanVideoArchConfig) -> AutoencoderKLHunyuanVideo:
        model = AutoencoderKLHunyuanVideo(VAEConfig(arch_config=arch))
        fill(model, gains={"decoder.conv_out.conv.weight": 0.5})
        return model.eval().requires_grad_(False)

    return build


@pytest.fixture(scope="session")
def diffusers_twin() -> Callable[[AutoencoderKLHunyuanVideo], Any]:
    """diffusers' own model with the configuration and the weights of ours, whole clips at once."""
    diffusers = pytest.importorskip("diffusers", reason="this machine has no diffusers to compare with")

    def build(model: AutoencoderKLHunyuanVideo) -> Any:
        arch = {name: each for name, each in model.arch.to_dict().items() if name not in OURS_ALONE}
        with torch.device("meta"):
            twin = diffusers.AutoencoderKLHunyuanVideo(**arch)
        twin.load_state_dict(model.state_dict(), strict=True, assign=True)
        # They are on by default, and give another video from 17 frames on.
        twin.use_framewise_encoding = twin.use_framewise_decoding = False
        return twin.eval().requires_grad_(False)

    return build
