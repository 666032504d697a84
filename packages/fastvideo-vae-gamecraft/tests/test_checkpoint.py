"""Files that people have, and files that must be refused. The official layout at full width is in test_parity.py."""

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
from fastvideo_vae_gamecraft import GAMECRAFT, AutoencoderKLHunyuanVideo, HunyuanVideoArchConfig

# Wide enough for the published 32 groups, which no tensor tells.
NARROW = replace(GAMECRAFT, block_out_channels=(32, 32, 32, 64), layers_per_block=1)
# As the official code writes it beside its weights.
OFFICIAL_CONFIG = {
    "_class_name": "AutoencoderKLCausal3D",
    "_diffusers_version": "0.4.2",
    "act_fn": "silu",
    "block_out_channels": [32, 32, 32, 64],
    "down_block_types": ["DownEncoderBlockCausal3D"] * 4,
    "up_block_types": ["UpDecoderBlockCausal3D"] * 4,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 16,
    "layers_per_block": 1,
    "norm_num_groups": 32,
    "sample_size": 256,
    "sample_tsize": 64,
    "scaling_factor": 0.476986,
    "time_compression_ratio": 4,
    "mid_block_add_attention": True,
}

Build = Callable[[HunyuanVideoArchConfig], AutoencoderKLHunyuanVideo]


@pytest.fixture
def model(random_model: Build) -> AutoencoderKLHunyuanVideo:
    return random_model(NARROW)


def directory(model: AutoencoderKLHunyuanVideo, folder: Path) -> Path:
    """The model as diffusers stores it."""
    folder.mkdir()
    save_file(model.state_dict(), folder / "diffusion_pytorch_model.safetensors")
    config = {"_class_name": "AutoencoderKLHunyuanVideo", **model.arch.to_dict()}
    ours_alone = ("mid_block_causal_attn", "sample_size", "sample_tsize")
    config = {name: each for name, each in config.items() if name not in ours_alone}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def decoded(model: Any) -> torch.Tensor:
    return model.decode(make_input("checkpoint", (1, 16, 2, 2, 3), "latent")).sample


def test_a_diffusers_directory(model: AutoencoderKLHunyuanVideo, tmp_path: Path) -> None:
    loaded = fvae.load(directory(model, tmp_path / "vae"))
    assert loaded.config.arch_config == model.arch
    assert torch.equal(decoded(loaded), decoded(model))


@pytest.mark.parametrize("options", [{}, {"mid_block_causal_attn": True, "use_trt_engine": False, "engine_path": "x"}])
def test_an_official_directory(model: AutoencoderKLHunyuanVideo, tmp_path: Path, options: dict[str, Any]) -> None:
    """HunyuanVideo's configuration, and GameCraft's, which says more."""
    (tmp_path / "config.json").write_text(json.dumps(OFFICIAL_CONFIG | options))
    state = {f"vae.{name}": each for name, each in model.state_dict().items()}
    # What training leaves beside it is another network's.
    state["loss.discriminator.weight"] = torch.zeros(2)
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "pytorch_model.pt")
    loaded = fvae.load(tmp_path)
    assert loaded.config.temporal_compression_ratio == 4
    assert torch.equal(decoded(loaded), decoded(model))


@pytest.mark.parametrize("prefix", ["", "vae."])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_one_file_without_a_configuration(
    model: AutoencoderKLHunyuanVideo, tmp_path: Path, prefix: str, suffix: str
) -> None:
    """Narrow, so that it is not the published checkpoint, but its architecture is all there in the tensors."""
    path = tmp_path / f"vae.{suffix}"
    state = {f"{prefix}{name}": each for name, each in model.state_dict().items()}
    state["loss.discriminator.weight"] = torch.zeros(2)
    _ = torch.save(state, path) if suffix == "pt" else save_file(state, path)
    loaded = fvae.load(path)
    assert loaded.config.arch_config == NARROW
    assert loaded.provenance.variant is None
    assert loaded.provenance.checkpoint == model.provenance.checkpoint
    assert torch.equal(decoded(loaded), decoded(model))


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_one_half(model: AutoencoderKLHunyuanVideo, tmp_path: Path, half: str) -> None:
    """Loaded alone, and stored alone without a configuration."""
    options = {f"load_{each}": each == half for each in ("encoder", "decoder")}
    loaded = fvae.load(directory(model, tmp_path / "vae"), **options)
    kept = ("encoder.", "quant_conv.") if half == "encoder" else ("decoder.", "post_quant_conv.")
    assert all(name.startswith(kept) for name in loaded.state_dict())
    save_file(loaded.state_dict(), tmp_path / "half.safetensors")
    alone = fvae.load(tmp_path / "half.safetensors", **options)
    assert alone.config.arch_config == NARROW
    assert all(torch.equal(each, loaded.state_dict()[name]) for name, each in alone.state_dict().items())


def test_another_variant_than_the_one_asked_for_is_refused(model: AutoencoderKLHunyuanVideo, tmp_path: Path) -> None:
    with pytest.raises(fvae.CheckpointError, match=r"is no gamecraft 884-16c"):
        fvae.load(directory(model, tmp_path / "vae"), variant="884-16c")


def test_an_image_autoencoder_is_not_taken_for_one(tmp_path: Path, model: AutoencoderKLHunyuanVideo) -> None:
    """Names differ by `.conv` only, so that a file must not pass by halves."""
    state = {name.replace(".conv.", "."): each for name, each in model.state_dict().items()}
    save_file(state, tmp_path / "vae.safetensors")
    with pytest.raises(fvae.CheckpointError, match="no network of gamecraft is recognised"):
        fvae.load(tmp_path / "vae.safetensors", family="gamecraft")


def test_missing_unexpected_and_misshapen_tensors_are_named(model: AutoencoderKLHunyuanVideo, tmp_path: Path) -> None:
    state = {f"vae.{name}": each for name, each in model.state_dict().items()}
    state["vae.decoder.conv_in.conv.surplus"] = state.pop("vae.decoder.conv_in.conv.bias")
    state["vae.quant_conv.bias"] = torch.zeros(7)
    (tmp_path / "config.json").write_text(json.dumps(OFFICIAL_CONFIG))
    torch.save(state, tmp_path / "pytorch_model.pt")
    with pytest.raises(fvae.CheckpointError) as caught:
        fvae.load(tmp_path)
    for part in ("1 missing: decoder.conv_in.conv.bias", "1 unexpected", "conv_in.conv.surplus", "1 misshapen", "(7,)"):
        assert part in str(caught.value)


def test_a_truncated_file_is_refused(model: AutoencoderKLHunyuanVideo, tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.pt"
    torch.save(model.state_dict(), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(fvae.CheckpointError, match=r"pytorch_model\.pt"):
        fvae.load(path)


def test_a_pickle_with_a_payload_is_refused_and_not_run(model: AutoencoderKLHunyuanVideo, tmp_path: Path) -> None:
    path, trace = tmp_path / "pytorch_model.pt", tmp_path / "it-ran"
    torch.save({**model.state_dict(), "payload": Payload(trace)}, path)
    with pytest.raises(fvae.CheckpointError, match="was not run"):
        fvae.load(path)
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists(), "the payload is harmless, so the test proves nothing"
