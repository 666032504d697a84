"""Files that people have, and files that must be refused. The official layouts at full width are in test_parity.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import fastvideo_vae_core as fvae
from fastvideo_vae_core.testing.golden import make_input
from fastvideo_vae_core.testing.payload import Payload
from fastvideo_vae_wan import WAN21, WAN22, AutoencoderKLWan, WanArchConfig

NARROW = {
    "wan2.1": replace(WAN21, base_dim=8, num_res_blocks=1),
    "wan2.2": replace(WAN22, base_dim=8, decoder_base_dim=12, num_res_blocks=1),
}

Build = Callable[[WanArchConfig], AutoencoderKLWan]


@pytest.fixture(params=NARROW)
def model(request: pytest.FixtureRequest, random_model: Build) -> AutoencoderKLWan:
    return random_model(NARROW[request.param])


def directory(model: AutoencoderKLWan, folder: Path) -> Path:
    """The model as diffusers stores it."""
    folder.mkdir()
    save_file(model.state_dict(), folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKLWan", **model.arch.to_dict()}))
    return folder


def decoded(model: Any) -> torch.Tensor:
    z = make_input("checkpoint", (1, model.arch.z_dim, 2, 2, 3), "latent")
    return model.decode(z).sample


def test_a_diffusers_directory(model: AutoencoderKLWan, tmp_path: Path) -> None:
    loaded = fvae.load(directory(model, tmp_path / "vae"))
    assert loaded.config.z_dim == model.arch.z_dim
    assert torch.equal(decoded(loaded), decoded(model))


@pytest.mark.parametrize("prefix", ["", "vae."])
def test_one_file_without_a_configuration(model: AutoencoderKLWan, tmp_path: Path, prefix: str) -> None:
    """Narrow, so that it is no published checkpoint, but its architecture is all there in the tensors."""
    path = tmp_path / "wan.safetensors"
    save_file({f"{prefix}{name}": each for name, each in model.state_dict().items()}, path)
    loaded = fvae.load(path)
    assert loaded.provenance.variant is None
    assert loaded.provenance.checkpoint == model.provenance.checkpoint
    assert torch.equal(decoded(loaded), decoded(model))


def test_one_half(model: AutoencoderKLWan, tmp_path: Path) -> None:
    loaded = fvae.load(directory(model, tmp_path / "vae"), load_encoder=False)
    assert not any(name.startswith(("encoder.", "quant_conv.")) for name in loaded.state_dict())
    assert torch.equal(decoded(loaded), decoded(model))


def test_another_variant_than_the_one_asked_for_is_refused(random_model: Build, tmp_path: Path) -> None:
    path = directory(random_model(NARROW["wan2.2"]), tmp_path / "vae")
    with pytest.raises(fvae.CheckpointError, match=r"is no wan wan2\.1"):
        fvae.load(path, variant="wan2.1")


def test_a_truncated_file_is_refused(model: AutoencoderKLWan, tmp_path: Path) -> None:
    path = tmp_path / "Wan2.1_VAE.pth"
    torch.save(model.state_dict(), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(fvae.CheckpointError, match=r"Wan2\.1_VAE\.pth"):
        fvae.load(path)


def test_a_pickle_with_a_payload_is_refused_and_not_run(model: AutoencoderKLWan, tmp_path: Path) -> None:
    path, trace = tmp_path / "Wan2.1_VAE.pth", tmp_path / "it-ran"
    torch.save({**model.state_dict(), "payload": Payload(trace)}, path)
    with pytest.raises(fvae.CheckpointError, match="was not run"):
        fvae.load(path)
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists(), "the payload is harmless, so the test proves nothing"
