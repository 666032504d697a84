"""Every layout that people have, with and without a configuration, loads as the same model, or is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fastvideo_vae_core.config import VAEConfig
from fastvideo_vae_core.errors import CheckpointError, ConfigError
from fastvideo_vae_core.loading import inspect, load
from fastvideo_vae_core.testing.golden import fill, make_input, make_tensor
from fastvideo_vae_core.testing.parity import assert_close
from fastvideo_vae_core.weight_norm import folded
from fastvideo_vae_oobleck import STABLE_AUDIO_OPEN, AutoencoderOobleck, OobleckArchConfig, weight_norm_state_dict

TINY = OobleckArchConfig(
    encoder_hidden_size=12,
    downsampling_ratios=(2, 3),
    channel_multiples=(1, 2),
    decoder_channels=8,
    decoder_input_channels=6,
)
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def vae() -> AutoencoderOobleck:
    model = AutoencoderOobleck(VAEConfig(arch_config=TINY)).eval().requires_grad_(False)
    fill(model)
    return model


@pytest.fixture(scope="module")
def normed(vae: AutoencoderOobleck) -> State:
    """As diffusers has it, with norms in float32 like every published file."""
    return {name: tensor.float() for name, tensor in weight_norm_state_dict(vae).items()}


def official(state: State) -> State:
    """stable-audio-tools' names, from the positions of layers in its sequences."""
    stages, renamed = len(TINY.downsampling_ratios), {}
    unit = {"snake1": "0", "conv1": "1", "snake2": "2", "conv2": "3"}
    for name, tensor in state.items():
        half, *path = name.split(".")
        if path[0] == "block":
            stage, layer = int(path[1]) + 1, path[2]
            first = 0 if half == "encoder" else 2
            if layer.startswith("res_unit"):
                inner = f"{first + int(layer[-1]) - 1}.layers.{unit[path[3]]}"
            else:
                last = {"snake1": "3", "conv1": "4"} if half == "encoder" else {"snake1": "0", "conv_t1": "1"}
                inner = last[layer]
            position = f"{stage}.layers.{inner}"
        else:
            position = {"conv1": "0", "snake1": str(stages + 1), "conv2": str(stages + 2)}[path[0]]
        leaf = path[-1]
        renamed[f"{half}.layers.{position}.{leaf}"] = tensor.flatten() if leaf in ("alpha", "beta") else tensor
    return renamed


def parametrized(state: State) -> State:
    """The spelling of torch.nn.utils.parametrizations.weight_norm."""
    spelled = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}
    return {
        name.removesuffix(leaf) + spelled.get(leaf, leaf): tensor
        for name, tensor in state.items()
        for leaf in [name.rpartition(".")[2]]
    }


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


# What surrounds an autoencoder in a full model, and in its own trainer.
REST: State = {"model.model.to_qkv.weight": torch.ones(3, 3), "conditioner.embedding.weight": torch.ones(3)}
TRAINER: State = {
    "discriminator.discriminators.0.convs.0.weight": torch.ones(3),
    "autoencoder_ema.ema_model.encoder.layers.0.bias": torch.ones(3),
    "autoencoder_ema.initted": torch.ones(1),
}


def model_config(**changes: Any) -> dict[str, Any]:
    """The configuration of a full model, as stable-audio-tools writes it."""
    half = {"channels": 12, "c_mults": [1, 2], "strides": [2, 3], "use_snake": True}
    autoencoder = {
        "encoder": {"type": "oobleck", "config": {**half, "in_channels": 2, "latent_dim": 12}},
        "decoder": {
            "type": "oobleck",
            "config": {**half, "channels": 8, "out_channels": 2, "latent_dim": 6, "final_tanh": False},
        },
        "bottleneck": {"type": "vae"},
        "latent_dim": 6,
        "downsampling_ratio": 6,
        "io_channels": 2,
    }
    for path, value in changes.items():
        *folders, leaf = path.split("__")
        target: dict[str, Any] = autoencoder
        for folder in folders:
            target = target[folder]
        target[leaf] = value
    return {
        "model_type": "diffusion_cond",
        "sample_size": 2_097_152,
        "sample_rate": 44_100,
        "model": {"pretransform": {"type": "autoencoder", "iterate_batch": True, "config": autoencoder}},
    }


LAYOUTS: dict[str, Callable[[State], State]] = {
    "diffusers": lambda state: state,
    "diffusers, new spelling": parametrized,
    "a pipeline's file": lambda state: {**prefixed("vae.", state), "transformer.proj.weight": torch.ones(2)},
    "a full model": lambda state: prefixed("pretransform.model.", official(state)) | REST,
    "a full model in its trainer": lambda state: prefixed("diffusion.pretransform.model.", official(state)) | REST,
    "an autoencoder in its trainer": lambda state: prefixed("autoencoder.", official(state)) | TRAINER,
    "an autoencoder alone": official,
    "an autoencoder alone, new spelling": lambda state: parametrized(official(state)),
    "an autoencoder beside its discriminator": lambda state: official(state) | TRAINER,
}


def assert_same(loaded: Any, vae: AutoencoderOobleck) -> None:
    assert loaded.config.arch_config == vae.config.arch_config
    assert loaded.provenance.checkpoint == vae.provenance.checkpoint
    x = make_input("checkpoint", vae.decoded_shape((1, 6, 6)), "audio")
    for ours, theirs in (
        (loaded.encode(x).latent_dist.parameters, vae.encode(x).latent_dist.parameters),
        (loaded.decode(torch.ones(1, 6, 3)).sample, vae.decode(torch.ones(1, 6, 3)).sample),
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_loads_without_a_configuration(
    layout: str, suffix: str, vae: AutoencoderOobleck, tmp_path: Path
) -> None:
    """Exact norms, so that the fingerprint is that of the model itself."""
    state = LAYOUTS[layout](weight_norm_state_dict(vae))
    path = tmp_path / f"model{suffix}"
    if suffix == ".ckpt":
        torch.save({"state_dict": state}, path)
    else:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    assert_same(load(path), vae)


def test_a_model_config_beside_the_weights_is_read(vae: AutoencoderOobleck, tmp_path: Path) -> None:
    state = prefixed("pretransform.model.", official(weight_norm_state_dict(vae)))
    save_file(state, tmp_path / "model.safetensors")
    config = model_config()
    config["sample_rate"] = 22_050
    (tmp_path / "model_config.json").write_text(json.dumps(config))
    for source in (tmp_path, tmp_path / "model.safetensors"):
        assert load(source).config.sampling_rate == 22_050
    assert inspect(tmp_path)["components"][0]["arch"]["sampling_rate"] == 22_050
    config["model"] = config["model"]["pretransform"]["config"]
    (tmp_path / "model_config.json").write_text(json.dumps(config))
    assert load(tmp_path).config.sampling_rate == 22_050
    scaled = model_config()
    scaled["model"]["pretransform"]["scale"] = 2.0
    loaded = load(tmp_path / "model.safetensors", config=scaled)
    z = torch.ones(1, 6, 1)
    assert torch.equal(loaded.normalize_latents(z), z / 2)
    assert torch.equal(loaded.denormalize_latents(z / 2), z)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder__config__final_tanh": True}, "final_tanh"),
        ({"encoder__config__use_snake": False}, "use_snake"),
        ({"decoder__config__use_nearest_upsample": True}, "use_nearest_upsample"),
        ({"encoder__config__latent_dim": 24}, "latent_dim"),
        ({"decoder__config__strides": [3, 2]}, "strides"),
        ({"encoder__type": "dac"}, "type 'oobleck'"),
        ({"bottleneck": {"type": "dac_rvq"}}, "type 'vae'"),
        ({"bottleneck": None}, "describes no Oobleck"),
        ({"soft_clip": True}, "soft_clip"),
        ({"encoder__config__strides": [2, "3"]}, "downsampling_ratios|strides"),
    ],
    ids=str,
)
def test_a_model_config_of_another_network_is_refused(changes: dict[str, Any], message: str) -> None:
    assert OobleckArchConfig.from_dict(model_config()) == TINY
    with pytest.raises(ConfigError, match=message):
        OobleckArchConfig.from_dict(model_config(**changes))


def test_a_configuration_that_does_not_fit_the_tensors_is_refused(normed: State, tmp_path: Path) -> None:
    save_file(official(normed), tmp_path / "model.safetensors")
    (tmp_path / "model_config.json").write_text(json.dumps(model_config(decoder__config__channels=16)))
    with pytest.raises(CheckpointError, match=r"misshapen: decoder\.layers\.0\.weight"):
        load(tmp_path)


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_a_file_of_one_half_is_recognised(half: str, vae: AutoencoderOobleck, normed: State, tmp_path: Path) -> None:
    for name, state in (("diffusers", normed), ("official", official(normed))):
        path = tmp_path / f"{name}.safetensors"
        save_file({key: tensor for key, tensor in state.items() if key.startswith(half)}, path)
        loaded = load(path, load_encoder=half == "encoder", load_decoder=half == "decoder")
        wanted = {key: tensor for key, tensor in vae.state_dict().items() if key.startswith(half)}
        assert loaded.state_dict().keys() == wanted.keys()
        for key, tensor in loaded.state_dict().items():
            torch.testing.assert_close(tensor, wanted[key], atol=1e-6, rtol=1e-6)


def test_half_of_a_weight_is_refused(normed: State, tmp_path: Path) -> None:
    for gone, left in (("weight_g", "weight_v"), ("weight_v", "weight_g")):
        state = {name: each for name, each in normed.items() if name != f"encoder.conv1.{gone}"}
        save_file(state, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderOobleck", **TINY.to_dict()}))
        with pytest.raises(CheckpointError) as caught:
            load(tmp_path)
        assert "1 missing: encoder.conv1.weight;" in str(caught.value)
        assert f"1 unexpected: encoder.conv1.{left}" in str(caught.value)


def test_unknown_tensors_are_refused(normed: State, tmp_path: Path) -> None:
    save_file(official(normed) | {"encoder.layers.9.alpha": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 unexpected: encoder\.layers\.9\.alpha"):
        load(tmp_path / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_restored_weight_norm_folds_to_the_same_weights(
    dtype: torch.dtype, vae: AutoencoderOobleck, tmp_path: Path
) -> None:
    """Bit for bit, a slice of zeros included."""
    model = AutoencoderOobleck(VAEConfig(arch_config=TINY))
    model.load_state_dict(vae.state_dict())
    model = model.requires_grad_(False).to(dtype)
    model.encoder.conv1.weight[0] = 0
    restored = weight_norm_state_dict(model)
    assert "encoder.conv1.weight" not in restored
    assert restored["decoder.block.0.conv_t1.weight_g"].shape == (16, 1, 1)
    save_file(restored, tmp_path / "model.safetensors")
    loaded = load(tmp_path / "model.safetensors")
    assert loaded.dtype == dtype
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_diffusers_reads_the_restored_weights(vae: AutoencoderOobleck) -> None:
    from diffusers import AutoencoderOobleck as Reference

    fields = {name: value for name, value in TINY.to_dict().items() if name != "scaling_factor"}
    reference = Reference(**fields).eval()
    reference.load_state_dict(weight_norm_state_dict(vae), strict=True)
    z = make_input("restored", (1, 6, 9), "latent")
    with torch.no_grad():
        torch.testing.assert_close(vae.decode(z).sample, reference.decode(z).sample, atol=2e-5, rtol=0)


def test_the_published_names_and_shapes(tmp_path: Path) -> None:
    """365 stored tensors, 156,112,514 numbers; 148 of the stored ones are norms that folding takes up."""
    with torch.device("meta"):
        model = AutoencoderOobleck(VAEConfig(arch_config=STABLE_AUDIO_OPEN))
    plain = model.state_dict()
    weights = [name for name in plain if name.endswith(".weight")]
    assert len(plain) + len(weights) == 365
    norms = sum(plain[name].shape[0] for name in weights)
    assert sum(tensor.numel() for tensor in plain.values()) + norms == 156_112_514


def test_folding_is_the_reference_formula(tmp_path: Path) -> None:
    norm = make_tensor("layer.weight_g", (5, 1, 1))
    direction = make_tensor("layer.weight_v", (5, 3, 7))
    path = tmp_path / "layer.safetensors"
    save_file({"layer.weight_g": norm, "layer.weight_v": direction, "layer.weight_gain": norm.clone()}, path)
    from fastvideo_vae_core.checkpoint import open_checkpoint

    opened = open_checkpoint([path])
    assert set(opened.infos) == {"layer.weight", "layer.weight_gain"}
    for dtype in (torch.float32, torch.float64):
        length = direction.to(dtype).square().sum((1, 2), keepdim=True).sqrt()
        expected = direction * (norm / length)
        assert_close(opened.read("layer.weight", dtype), expected, torch.finfo(dtype).eps, "one rounding or two")
    assert opened.read("layer.weight", torch.float16).dtype == torch.float32
    assert torch.equal(opened.head("layer.weight"), opened.read("layer.weight"))
    assert folded(opened).infos == opened.infos


def test_float16_files_load_as_float16_and_in_any_type(vae: AutoencoderOobleck, tmp_path: Path) -> None:
    state = {name: tensor.half() for name, tensor in weight_norm_state_dict(vae).items()}
    save_file(state, tmp_path / "model.safetensors")
    assert load(tmp_path / "model.safetensors").dtype == torch.float16
    assert load(tmp_path / "model.safetensors", dtype="float64").dtype == torch.float64
    with pytest.raises(ConfigError, match="audio has neither"):
        load(tmp_path / "model.safetensors", config=replace(VAEConfig(), use_tiling=True))
