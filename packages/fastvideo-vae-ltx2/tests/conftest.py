"""What several test files share: networks with the weights of the golden files, and diffusers' twins of tiny ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import fastvideo_vae_core as fvae
from fastvideo_vae_core.config import VAEArchConfig, VAEConfig
from fastvideo_vae_core.testing.golden import Golden, fill, golden_path, load_golden
from fastvideo_vae_ltx2 import AutoencoderKLLTX2Audio, AutoencoderKLLTX2Video, LTX2Vocoder


@dataclass(frozen=True)
class Published:
    """A golden file, its checkpoint as one official file with its configuration in the metadata, and that loaded."""

    golden: Golden
    path: Path
    model: Any


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Networks of the golden files by name, for as long as a block runs: up to 1,222 million numbers."""

    @contextmanager
    def build(name: str) -> Iterator[Published]:
        golden = load_golden(golden_path(f"{name}.safetensors"))
        path = tmp_path_factory.mktemp(name) / "ltx-2.safetensors"
        save_file(golden.state_dict(), path, {"config": json.dumps(golden.meta["config"])})
        # Some cases have sizes that only the official code takes.
        halves = {"load_encoder": name != "ltx2_video_timestep"}
        model = fvae.load(path, config=VAEConfig(illegal_sizes="official"), family="ltx2", **halves)
        try:
            yield Published(golden, path, model)
        finally:
            path.unlink()

    return build


@pytest.fixture(scope="session")
def random_model() -> Callable[[VAEArchConfig], Any]:
    """A model with random weights of the golden rule, as `load` gives it."""

    def build(arch: VAEArchConfig) -> Any:
        return fill(MODELS[type(arch).__name__](VAEConfig(arch_config=arch))).eval().requires_grad_(False)

    return build


@pytest.fixture(scope="session")
def diffusers_twin() -> Callable[[Any], Any]:
    """diffusers' own model with the configuration and the weights of ours."""
    diffusers = pytest.importorskip("diffusers", reason="this machine has no diffusers to compare with")
    from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder as Plain
    from diffusers.pipelines.ltx2.vocoder import LTX2VocoderWithBWE as Extended

    def build(model: Any) -> Any:
        values = model.arch.to_dict()
        values.pop("scaling_factor", None)
        if isinstance(model, LTX2Vocoder):
            kind = Extended if model.arch.extension else Plain
        else:
            kind = getattr(diffusers, type(model).__name__)
        known = kind.__init__.__wrapped__.__code__.co_varnames if hasattr(kind.__init__, "__wrapped__") else values
        with torch.device("meta"):
            twin = kind(**{name: each for name, each in values.items() if name in known})
        state = dict(model.state_dict())
        if isinstance(model, LTX2Vocoder) and model.arch.extension:
            state["mel_stft.stft_fn.inverse_basis"] = torch.zeros_like(state["mel_stft.stft_fn.forward_basis"])
        twin.load_state_dict(state, strict=True, assign=True)
        return twin.eval().requires_grad_(False)

    return build


MODELS = {
    "LTX2VideoArchConfig": AutoencoderKLLTX2Video,
    "LTX2AudioArchConfig": AutoencoderKLLTX2Audio,
    "LTX2VocoderArchConfig": LTX2Vocoder,
}
