"""Encoder output, latent mode and decoded video against the official implementations and diffusers, on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastvideo_vae_core.testing.golden import make_input
from fastvideo_vae_core.testing.parity import assert_close
from fastvideo_vae_wan import DIFFUSERS, WAN21, WAN22, AutoencoderKLWan, WanArchConfig

PUBLISHED = {"wan2.1": WAN21, "wan2.2": WAN22}
# Four levels as published, and narrow.
NARROW: dict[str, dict[str, Any]] = {
    "wan2.1": {"base_dim": 8, "num_res_blocks": 1},
    "wan2.2": {"base_dim": 8, "decoder_base_dim": 12, "num_res_blocks": 1},
}
GRIDS = [(1, 1, 1), (1, 3, 2), (2, 5, 3), (3, 4, 4), (5, 1, 3)]

# One convolution over windows of frames, where the reference has a convolution in 3-D: another order of additions.
OTHER_ORDER = (2e-6, "sums of the same numbers in another order")

every_variant = pytest.mark.parametrize("variant", PUBLISHED)


# 705 million numbers take a minute.
every_published = pytest.mark.parametrize("variant", ["wan2.1", pytest.param("wan2.2", marks=pytest.mark.slow)])


@every_published
class TestOfficial:
    """Golden files: outputs of Wan's code with the published configurations at full width.

    The checkpoints go through `load` from a `.pth` in the official layout, with no configuration beside it.
    """

    def test_the_variant_is_recognised(self, published: Any, variant: str) -> None:
        model = published(variant).model
        assert model.arch == PUBLISHED[variant]
        assert model.provenance.variant == variant

    def test_goldens(self, published: Any, variant: str) -> None:
        golden, model = (each := published(variant)).golden, each.model
        errors = {case["name"]: error_of(golden, model, case) for case in golden.cases}
        bounds = {case["name"]: 2e-5 if case["op"] == "round_trip" else 1e-5 for case in golden.cases}
        assert all(errors[name] <= bounds[name] for name in errors), errors

    @pytest.mark.slow
    def test_float64(self, published: Any, variant: str) -> None:
        """Where float32 is too coarse to tell a wrong constant; 1e-7: the references are stored in float32."""
        golden, model = (each := published(variant)).golden, copy.deepcopy(each.model).double()
        cases = [case for case in golden.cases if any("float64" in each for each in case["outputs"].values())]
        assert cases
        errors = {case["name"]: error_of(golden, model, case, float64=True) for case in cases}
        assert max(errors.values()) <= 1e-7, errors


@every_variant
class TestDiffusers:
    """Narrow networks, so that many sizes can be compared."""

    @pytest.mark.parametrize("grid", GRIDS, ids=str)
    def test_every_size(self, narrow: Any, variant: str, grid: tuple[int, ...]) -> None:
        model, twin = narrow(variant)
        video, latent = inputs(model, grid)
        ours, theirs = model.encode(video).latent_dist, twin.encode(video).latent_dist
        for name in ("parameters", "mean", "std", "logvar", "var"):
            assert_close(getattr(ours, name), getattr(theirs, name), *OTHER_ORDER)
        assert_close(ours.mode(), theirs.mode(), *OTHER_ORDER)
        assert_close(model.decode(latent).sample, twin.decode(latent).sample, *OTHER_ORDER)

    @pytest.mark.parametrize("grid", [(2, 3, 2), (1, 5, 4), (2, 7, 5)], ids=str)
    def test_tiles_that_diffusers_blends(self, narrow: Any, variant: str, grid: tuple[int, ...]) -> None:
        """With smaller tiles than its own, so that there are some; the first grid is no larger than one."""
        model, twin = narrow(variant)
        space = model.sample_axes[1].up
        size, stride = 4 * space, 3 * space
        twin.enable_tiling(size, size, stride, stride)
        model.enable_blending(replace(DIFFUSERS, pixels=size, pixels_stride=stride))
        video, latent = inputs(model, grid, batch=1)
        parameters = model.encode(video).latent_dist.parameters
        assert_close(parameters, twin.encode(video).latent_dist.parameters, *OTHER_ORDER)
        assert_close(model.decode(latent).sample, twin.decode(latent).sample, *OTHER_ORDER)

    def test_forward_and_tuples(self, narrow: Any, variant: str) -> None:
        model, twin = narrow(variant)
        video, latent = inputs(model, (2, 2, 3))
        # Training sees what leaves [-1, 1], so the clamp is not in it.
        assert_close(model(video).clamp(-1.0, 1.0), twin(video).sample, *OTHER_ORDER)
        (ours,), (theirs,) = model.decode(latent, return_dict=False), twin.decode(latent, return_dict=False)
        assert_close(ours, theirs, *OTHER_ORDER)
        (ours,), (theirs,) = model.encode(video, return_dict=False), twin.encode(video, return_dict=False)
        assert_close(ours.mean, theirs.mean, *OTHER_ORDER)

    def test_decoded_video_is_clamped(self, narrow: Any, variant: str) -> None:
        model, twin = narrow(variant)
        latent = 3 * inputs(model, (2, 2, 3))[1]
        model.decoder.conv_out.bias += 1.0
        raw = model.decode_unclamped(latent)
        assert raw.max() > 1
        assert torch.equal(model.decode(latent).sample, raw.clamp(-1.0, 1.0))
        assert_close(model.decode(latent).sample, twin.decode(latent).sample, *OTHER_ORDER)

    def test_latents_are_normalised_as_the_pipelines_do(self, narrow: Any, variant: str) -> None:
        """Bit for bit; the right sides are copied from diffusers' Wan pipelines."""
        model, twin = narrow(variant)
        config, z = twin.config, inputs(model, (3, 4, 2))[1]
        mean = torch.tensor(config.latents_mean).view(1, -1, 1, 1, 1)
        std = 1.0 / torch.tensor(config.latents_std).view(1, -1, 1, 1, 1)
        assert torch.equal(model.normalize_latents(z), (z - mean) * std)
        assert torch.equal(model.denormalize_latents(z), z / std + mean)

    def test_the_configuration_reads_as_diffusers_does(self, narrow: Any, variant: str) -> None:
        model, twin = narrow(variant)
        for name, value in twin.config.items():
            if not name.startswith("_"):
                ours = getattr(model.config, name)
                assert (list(ours) if isinstance(ours, tuple) else ours) == value, name


@pytest.fixture
def narrow(random_model: Any, diffusers_twin: Any) -> Callable[[str], tuple[AutoencoderKLWan, Any]]:
    """Our model and diffusers', with the same random weights: a published architecture made narrow."""

    def build(variant: str) -> tuple[AutoencoderKLWan, Any]:
        arch: WanArchConfig = replace(PUBLISHED[variant], **NARROW[variant])
        model = random_model(arch)
        return model, diffusers_twin(model)

    return build


def inputs(model: AutoencoderKLWan, grid: tuple[int, ...], batch: int = 2) -> tuple[Tensor, Tensor]:
    """A video and latents for a grid of latents."""
    latent = make_input("parity", (batch, model.arch.z_dim, *grid), "latent")
    return make_input("parity", model.decoded_shape(latent.shape), "video"), latent


def error_of(golden: Any, model: AutoencoderKLWan, case: Mapping[str, Any], float64: bool = False) -> float:
    """Relative error of the one output of a case."""
    (output,) = case["outputs"]
    (x,) = golden.inputs(case).values()
    made = answer(model, x.double() if float64 else x, output)
    error: float = golden.error(case, made, output, float64=float64)
    return error


def answer(model: AutoencoderKLWan, x: Tensor, output: str) -> Tensor:
    """An output under its name in the golden files, which are of the official class that does not clamp."""
    match output:
        case "encode_moments":
            return model.encode(x).latent_dist.parameters
        case "encode_mean":
            return model.encode(x).latent_dist.mode()
        case "encode_mean_normalised":
            return model.normalize_latents(model.encode(x).latent_dist.mode())
        case "decode":
            return model.decode_unclamped(x)
        case "decode_normalised":
            return model.decode_unclamped(model.denormalize_latents(x))
        case _:
            z = model.normalize_latents(model.encode(x).latent_dist.mode())
            return model.decode_unclamped(model.denormalize_latents(z))
