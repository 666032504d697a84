"""Saving and loading."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fastvideo_vae_core import registry
from fastvideo_vae_core.config import VAEConfig
from fastvideo_vae_core.errors import CheckpointError, ConfigError
from fastvideo_vae_core.loading import load
from fastvideo_vae_core.plan import Direction
from fastvideo_vae_core.testing.contract.hooks import VAE, Hooks, both_directions


class FileContract(Hooks):
    """What was saved comes back, strictly, and one half at a time where that is wanted."""

    @both_directions
    def test_a_saved_model_loads_as_itself(self, vae: VAE, direction: Direction, tmp_path: Path) -> None:
        loaded = load(save_diffusers(vae, tmp_path))
        assert type(loaded) is type(vae)
        assert loaded.config.arch_config == vae.config.arch_config
        assert loaded.provenance.checkpoint == vae.provenance.checkpoint
        assert not loaded.training
        assert not any(each.requires_grad for each in loaded.parameters())
        x = self.example(vae, direction)
        assert torch.equal(self.run(loaded, direction, x), self.run(vae, direction, x))

    @both_directions
    def test_a_half_is_loaded_alone(self, vae: VAE, direction: Direction, tmp_path: Path) -> None:
        """The other half's tensors hold NaN, which nobody notices who does not read them."""
        unwanted = vae.decoder_modules if direction == "encode" else vae.encoder_modules
        state = {
            name: tensor * torch.nan if name.startswith(tuple(f"{each}." for each in unwanted)) else tensor
            for name, tensor in vae.state_dict().items()
        }
        folder = save_diffusers(vae, tmp_path, state)
        with pytest.raises(CheckpointError, match="NaN"):
            load(folder)
        half = load(folder, load_encoder=direction == "encode", load_decoder=direction == "decode")
        assert not any(name.startswith(unwanted) for name, _ in half.named_parameters())
        x = self.example(vae, direction)
        assert torch.equal(self.run(half, direction, x), self.run(vae, direction, x))
        other: Direction = "decode" if direction == "encode" else "encode"
        with pytest.raises(ConfigError, match=f"load_{other}r"):
            self.run(half, other, self.example(vae, other))
        with pytest.raises(ConfigError, match=f"load_{other}r"):
            self.plan(half, other, tuple(self.example(vae, other).shape))

    def test_each_half_has_the_type_that_is_asked_for(self, vae: VAE, tmp_path: Path) -> None:
        config = VAEConfig(encode_dtype="float64", decode_dtype="bfloat16")
        loaded = load(save_diffusers(vae, tmp_path), config=config)
        assert self.run(loaded, "encode", self.example(vae, "encode")).dtype == torch.float64
        assert self.run(loaded, "decode", self.example(vae, "decode")).dtype == torch.bfloat16

    def test_a_missing_and_an_unexpected_tensor_are_named(self, vae: VAE, tmp_path: Path) -> None:
        state = dict(vae.state_dict())
        gone = list(state)[len(state) // 2]
        state[f"{gone}_of_somebody_else"] = state.pop(gone)
        with pytest.raises(CheckpointError) as caught:
            load(save_diffusers(vae, tmp_path, state))
        assert f"1 missing: {gone}" in str(caught.value)
        assert f"1 unexpected: {gone}_of_somebody_else" in str(caught.value)

    def test_the_configuration_survives_json(self, vae: VAE) -> None:
        arch = vae.config.arch_config
        assert type(arch).from_dict(json.loads(json.dumps(arch.to_dict()))) == arch


def save_diffusers(vae: VAE, folder: Path, state: Mapping[str, Tensor] | None = None) -> Path:
    """Save a model, or other tensors in its place, as diffusers does; returns the folder."""
    component = registry.resolve(vae.family).component(vae.component)
    config = {
        "_class_name": component.class_names[0],
        "_diffusers_version": "0.42.1",
        **vae.config.arch_config.to_dict(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = {name: each.contiguous() for name, each in (state or vae.state_dict()).items()}
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    return folder
