"""Every layout in which people have these weights loads as the same model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import fastvideo_vae_core as fvae
from fastvideo_vae_autoencoder_kl import FLUX1, SD1, SD3, SDXL, AutoencoderKL, AutoencoderKLArchConfig
from fastvideo_vae_autoencoder_kl.checkpoint import infer
from fastvideo_vae_core.config import VAEConfig
from fastvideo_vae_core.errors import CheckpointError
from fastvideo_vae_core.family import Evidence
from fastvideo_vae_core.testing.contract.files import save_diffusers
from fastvideo_vae_core.testing.golden import make_input
from fastvideo_vae_core.testing.threads import single_thread

State = dict[str, Tensor]

# Three levels and one layer, as narrow as 32 groups of channels allow: files without a configuration say no other.
SIZES: dict[str, Any] = {
    "block_out_channels": (32, 32, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 1,
}
SMALL = replace(SD1, **SIZES, sample_size=32)
# Tensors of the other networks that a full checkpoint holds, and of the training.
NEIGHBOURS = {
    "model.diffusion_model.input_blocks.0.0.weight": torch.ones(4, 4, 3, 3),
    "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(5),
    "model_ema.decay": torch.tensor(0.9999),
    "model_ema.diffusion_modelinput_blocks00weight": torch.ones(4, 4, 3, 3),
    "alphas_cumprod": torch.ones(10),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with single_thread():
        yield


@pytest.fixture
def model(random_model: Any) -> AutoencoderKL:
    built: AutoencoderKL = random_model(SMALL)
    return built


def prefixed(state: Mapping[str, Tensor], prefix: str) -> State:
    return {f"{prefix}{name}": each for name, each in state.items()}


def to_ldm(state: Mapping[str, Tensor], levels: int = 3) -> State:
    """diffusers' names to CompVis' and Black Forest Labs', written independently of the package's own table."""
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    renamed = {}
    for name, tensor in state.items():
        parts = name.split(".")
        if parts[1:2] == ["down_blocks"]:
            parts[1:3] = ["down", parts[2]]
        elif parts[1:2] == ["up_blocks"]:
            parts[1:3] = ["up", str(levels - 1 - int(parts[2]))]
        elif parts[1:2] == ["mid_block"]:
            parts[1:4] = ["mid", f"block_{int(parts[3]) + 1}" if parts[2] == "resnets" else "attn_1"]
        new = ".".join(parts).replace("resnets", "block").replace("samplers.0", "sample").replace("attentions", "attn")
        new = new.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        if ".attn" in new:
            stem, layer, leaf = new.partition(next(old for old in attention if f".{old}." in new))
            new = f"{stem}{attention[layer]}{leaf}"
            # 1x1 convolutions where diffusers has linear layers.
            tensor = tensor[..., None, None] if tensor.ndim == 2 else tensor
        renamed[new] = tensor
    return renamed


def legacy(state: Mapping[str, Tensor], as_convolutions: bool) -> State:
    """The names that the attention's layers had in diffusers before 0.17."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, tensor in state.items():
        layer = next((each for each in old if f".{each}." in name), None)
        if layer and as_convolutions and tensor.ndim == 2:
            tensor = tensor[..., None, None]
        renamed[name.replace(f".{layer}.", f".{old[layer]}.") if layer else name] = tensor
    return renamed


def safetensors(path: Path, state: Mapping[str, Tensor]) -> Path:
    save_file({name: each.contiguous() for name, each in state.items()}, path)
    return path


def pickled(path: Path, content: object, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def diffusers_folder(folder: Path, model: AutoencoderKL) -> Path:
    return save_diffusers(model, folder)


def pipeline_folder(folder: Path, model: AutoencoderKL) -> Path:
    save_diffusers(model, folder / "vae")
    (folder / "unet").mkdir()
    safetensors(folder / "unet" / "diffusion_pytorch_model.safetensors", {"conv_in.weight": torch.ones(2)})
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    return folder


def sharded_folder(folder: Path, model: AutoencoderKL) -> Path:
    save_diffusers(model, folder)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    weight_map = {}
    for index, half in enumerate(("encoder", "decoder")):
        file = f"diffusion_pytorch_model-0000{index + 1}-of-00002.safetensors"
        mine = {name: each for name, each in model.state_dict().items() if (half == "encoder") == _encodes(name)}
        safetensors(folder / file, mine)
        weight_map |= dict.fromkeys(mine, file)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def _encodes(name: str) -> bool:
    return name.startswith(("encoder.", "quant_conv."))


def full_checkpoint(model: AutoencoderKL) -> State:
    return NEIGHBOURS | prefixed(to_ldm(model.state_dict()), "first_stage_model.")


# How the weights are written -> the path to load.
LAYOUTS: dict[str, Callable[[Path, AutoencoderKL], Path]] = {
    "diffusers folder": diffusers_folder,
    "pipeline folder": pipeline_folder,
    "sharded folder": sharded_folder,
    "diffusers .bin": lambda folder, model: pickled(folder / "diffusion_pytorch_model.bin", model.state_dict()),
    "bare diffusers file": lambda folder, model: safetensors(folder / "any.safetensors", model.state_dict()),
    "diffusers file, vae.": lambda folder, model: safetensors(
        folder / "any.safetensors", prefixed(model.state_dict(), "vae.") | NEIGHBOURS
    ),
    "diffusers, legacy attention": lambda folder, model: safetensors(
        folder / "any.safetensors", legacy(model.state_dict(), as_convolutions=False)
    ),
    "diffusers, legacy convolutions": lambda folder, model: safetensors(
        folder / "any.safetensors", legacy(model.state_dict(), as_convolutions=True)
    ),
    "LDM in a full checkpoint": lambda folder, model: safetensors(folder / "sd.safetensors", full_checkpoint(model)),
    "LDM in a full .ckpt": lambda folder, model: pickled(
        folder / "sd.ckpt", {"state_dict": full_checkpoint(model), "global_step": 840000, "epoch": 3}
    ),
    "LDM in an old .ckpt": lambda folder, model: pickled(
        folder / "sd.ckpt", {"state_dict": full_checkpoint(model)}, _use_new_zipfile_serialization=False
    ),
    "bare LDM file": lambda folder, model: safetensors(folder / "any.sft", to_ldm(model.state_dict())),
    "LDM file, vae.": lambda folder, model: safetensors(
        folder / "any.safetensors", prefixed(to_ldm(model.state_dict()), "vae.")
    ),
    "LDM training .ckpt": lambda folder, model: pickled(
        folder / "kl-f4.ckpt",
        {
            "state_dict": to_ldm(model.state_dict())
            | {"loss.logvar": torch.zeros(()), "model_ema.decay": torch.ones(())}
        },
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
class TestLayouts:
    def test_it_is_the_same_model(self, tmp_path: Path, model: AutoencoderKL, layout: str) -> None:
        path = LAYOUTS[layout](tmp_path, model)
        loaded = fvae.load(path)
        assert isinstance(loaded, AutoencoderKL)
        assert loaded.provenance.checkpoint == model.provenance.checkpoint
        assert loaded.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(each, model.state_dict()[name]) for name, each in loaded.state_dict().items())
        z = make_input("layouts", (1, 4, 3, 2), "latent")
        assert torch.equal(loaded.decode(z).sample, model.decode(z).sample)

    @pytest.mark.parametrize("half", ["encoder", "decoder"])
    def test_a_half_loads_alone(self, tmp_path: Path, model: AutoencoderKL, layout: str, half: str) -> None:
        path = LAYOUTS[layout](tmp_path, model)
        loaded = fvae.load(path, load_encoder=half == "encoder", load_decoder=half == "decoder")
        mine = {name for name in model.state_dict() if _encodes(name) == (half == "encoder")}
        assert loaded.state_dict().keys() == mine

    def test_it_is_told_without_being_read(self, tmp_path: Path, model: AutoencoderKL, layout: str) -> None:
        [component] = fvae.inspect(LAYOUTS[layout](tmp_path, model))["components"]
        assert (component["family"], component["problem"]) == ("autoencoder_kl", None)
        assert component["layout"] == ("ldm" if "LDM" in layout else "diffusers")
        assert component["tensors"] == len(model.state_dict())
        assert component["parameters"] == sum(each.numel() for each in model.state_dict().values())


class TestFiles:
    def test_the_names_of_this_file_are_those_that_diffusers_converts(self, model: AutoencoderKL) -> None:
        """The LDM names above are a third party's too, and not only the inverse of our own table."""
        utilities = pytest.importorskip("diffusers.loaders.single_file_utils", reason="this machine has no diffusers")
        config = {**model.arch.to_dict(), "down_block_types": list(model.arch.down_block_types)}
        converted = utilities.convert_ldm_vae_checkpoint(full_checkpoint(model), config)
        assert converted.keys() == model.state_dict().keys()
        assert all(torch.equal(each, model.state_dict()[name]) for name, each in converted.items())

    def test_a_file_without_quant_convolutions(self, tmp_path: Path, random_model: Any) -> None:
        flux = random_model(replace(FLUX1, **SIZES))
        loaded = fvae.load(safetensors(tmp_path / "ae.safetensors", to_ldm(flux.state_dict())))
        assert not loaded.config.use_quant_conv
        assert not loaded.config.use_post_quant_conv
        assert loaded.config.latent_channels == 16
        assert loaded.provenance.checkpoint == flux.provenance.checkpoint

    def test_float16_stays_unless_another_type_is_asked_for(self, tmp_path: Path, model: AutoencoderKL) -> None:
        state = {name: each.half() for name, each in model.state_dict().items()}
        path = safetensors(tmp_path / "vae.fp16.safetensors", to_ldm(state))
        loaded = fvae.load(path)
        assert loaded.dtype == torch.float16
        # SD 1.x and SDXL overflow in float16, and this file does not say that it would not.
        assert loaded.plan_decode((1, 4, 2, 2)).dtype == torch.float32
        upcast = fvae.load(path, dtype="float32")
        assert upcast.dtype == torch.float32
        z = make_input("half", (1, 4, 2, 3), "latent")
        # The same weights and arithmetic; only the result is rounded to float16.
        assert torch.equal(loaded.decode(z.half()).sample, upcast.decode(z.half().float()).sample.half())

    def test_attention_in_the_levels_is_read_off_the_names(self, tmp_path: Path, random_model: Any) -> None:
        arch = replace(
            SMALL,
            down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
            up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"),
        )
        model = random_model(arch)
        for state in (model.state_dict(), to_ldm(model.state_dict())):
            loaded = fvae.load(safetensors(tmp_path / "any.safetensors", state))
            assert loaded.config.down_block_types == arch.down_block_types
            assert loaded.config.up_block_types == arch.up_block_types
            assert loaded.provenance.checkpoint == model.provenance.checkpoint

    @pytest.mark.parametrize("names", ["diffusers", "ldm"])
    @pytest.mark.parametrize("half", ["encoder", "decoder"])
    def test_a_file_of_one_half(self, tmp_path: Path, model: AutoencoderKL, names: str, half: str) -> None:
        state = {name: each for name, each in model.state_dict().items() if _encodes(name) == (half == "encoder")}
        path = safetensors(tmp_path / "half.safetensors", state if names == "diffusers" else to_ldm(state))
        loaded = fvae.load(path, load_encoder=half == "encoder", load_decoder=half == "decoder")
        assert loaded.state_dict().keys() == state.keys()
        assert loaded.config.arch_config == SMALL
        with pytest.raises(CheckpointError, match=f"missing: .*{'decoder' if half == 'encoder' else 'encoder'}"):
            fvae.load(path)

    def test_both_namings_at_once_are_refused(self, tmp_path: Path, model: AutoencoderKL) -> None:
        state = model.state_dict() | legacy(model.state_dict(), as_convolutions=False)
        path = safetensors(tmp_path / "any.safetensors", {name: each.clone() for name, each in state.items()})
        with pytest.raises(CheckpointError, match=r"both stand for .*to_.* of the autoencoder_kl family"):
            fvae.load(path)

    @pytest.mark.parametrize("names", ["diffusers", "ldm"])
    def test_a_tensor_that_is_missing_one_too_many_and_one_of_another_shape_are_named(
        self, tmp_path: Path, model: AutoencoderKL, names: str
    ) -> None:
        state = dict(model.state_dict()) if names == "diffusers" else to_ldm(model.state_dict())
        middle = "mid_block.attentions.0.to_q" if names == "diffusers" else "mid.attn_1.q"
        del state["decoder.conv_out.bias"]
        state["decoder.surplus.weight"] = torch.ones(1)
        state[f"encoder.{middle}.weight"] = torch.ones(64, 32)
        with pytest.raises(CheckpointError) as caught:
            fvae.load(safetensors(tmp_path / "any.safetensors", state))
        for part in (
            "1 missing: decoder.conv_out.bias",
            "1 unexpected: decoder.surplus.weight",
            f"1 misshapen: encoder.{middle}.weight (64, 32)",
        ):
            assert part in str(caught.value)


class TestVariants:
    """Which published checkpoint it is: told by the architecture, by the networks beside it, or asked for."""

    @staticmethod
    def evidence(arch: AutoencoderKLArchConfig, *names: str, stem: str = "any", layout: str = "ldm") -> Evidence:
        with torch.device("meta"):
            state = AutoencoderKL(VAEConfig(arch_config=arch)).state_dict()
        shapes = {name: tuple(each.shape) for name, each in state.items()}
        return Evidence(shapes=shapes, names=frozenset(names), stem=stem, prefix="", layout=layout)

    def test_two_checkpoints_that_differ_in_their_scaling_alone_are_both_named(self) -> None:
        assert infer(self.evidence(SDXL)).variants == ("sd1", "sdxl")
        assert infer(self.evidence(SD3)).variants == ("sd3", "flux1")

    @pytest.mark.parametrize(
        ("arch", "neighbour", "variant"),
        [
            (SD1, "cond_stage_model.transformer.text_model.x", "sd1"),
            (SDXL, "conditioner.embedders.0.transformer.x", "sdxl"),
            (SD3, "model.diffusion_model.joint_blocks.0.x", "sd3"),
            (FLUX1, "model.diffusion_model.double_blocks.0.x", "flux1"),
        ],
    )
    def test_the_networks_beside_it_tell(self, arch: AutoencoderKLArchConfig, neighbour: str, variant: str) -> None:
        inferred = infer(self.evidence(arch, neighbour))
        assert inferred.variants == (variant,)
        assert inferred.arch == arch

    def test_the_official_file_name_of_flux_tells(self) -> None:
        assert infer(self.evidence(FLUX1, stem="ae")).variants == ("flux1",)
        assert infer(self.evidence(FLUX1, stem="ae", layout="diffusers")).variants == ("sd3", "flux1")

    def test_another_architecture_is_none_of_them(self) -> None:
        inferred = infer(self.evidence(SMALL))
        assert inferred.variants == ()
        # Nothing in the tensors tells the size of the training pictures or the scaling: diffusers' defaults.
        assert inferred.arch == replace(SMALL, sample_size=32)

    @pytest.mark.parametrize("half", ["encoder", "decoder"])
    def test_half_a_file_tells_the_same(self, half: str) -> None:
        whole = self.evidence(SDXL)
        shapes = {name: each for name, each in whole.shapes.items() if _encodes(name) == (half == "encoder")}
        assert infer(replace(whole, shapes=shapes)) == infer(whole)

    def test_published_weights_ask_for_the_variant_and_check_it(self, published: Any) -> None:
        """The golden checkpoints: official names, full width."""
        kl, flux = published("sd1"), published("flux1")
        with pytest.raises(CheckpointError, match="pass variant='sd1' or variant='sdxl'"):
            fvae.load(kl.path)
        with pytest.raises(CheckpointError, match="is no autoencoder_kl flux1: it is sd1 or sdxl"):
            fvae.load(kl.path, variant="flux1")
        with pytest.raises(CheckpointError, match="is no autoencoder_kl sd3: it is flux1"):
            fvae.load(flux.path, variant="sd3")
        assert (kl.model.config.scaling_factor, flux.model.config.shift_factor) == (0.18215, 0.1159)
        assert fvae.load(flux.path, load_encoder=False).provenance.variant == "flux1"

    def test_a_configuration_beside_the_weights_settles_it(self, tmp_path: Path, random_model: Any) -> None:
        path = diffusers_folder(tmp_path, random_model(replace(SDXL, **SIZES)))
        assert fvae.load(path).config.scaling_factor == 0.13025
        with pytest.raises(CheckpointError, match="none of the published ones"):
            fvae.load(path, variant="sdxl")
