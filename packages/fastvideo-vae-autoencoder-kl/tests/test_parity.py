"""Encoder output, latent mode and decoded sample against the official implementations and diffusers, on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastvideo_vae_autoencoder_kl import DIFFUSERS, FLUX1, SD1, SD3, SDXL, AutoencoderKL, AutoencoderKLArchConfig
from fastvideo_vae_core.distribution import DiagonalGaussianDistribution
from fastvideo_vae_core.testing.golden import make_input
from fastvideo_vae_core.testing.parity import assert_close, first_divergence
from fastvideo_vae_core.testing.threads import single_thread

ENCODED = ("enc_64x64", "enc_40x72", "enc_96x128", "enc_b2_32x48", "enc_edge_44x52")
DECODED = ("dec_8x8", "dec_5x9", "dec_12x16", "dec_b2_4x6")
ROUND_TRIPS = ("rt_40x72",)
IN_FLOAT64 = ("enc_64x64", "enc_40x72", "dec_8x8", "dec_5x9", "rt_40x72")

# Four levels as published, and narrow.
NARROW: dict[str, Any] = {"block_out_channels": (8, 16, 16, 24), "norm_num_groups": 4}
PUBLISHED = {"sd1": SD1, "sdxl": SDXL, "sd3": SD3, "flux1": FLUX1}

both_checkpoints = pytest.mark.parametrize("variant", ["sd1", "flux1"])


@both_checkpoints
class TestOfficial:
    """Golden files: outputs of CompVis' and Black Forest Labs' code with the published configurations at full width.

    The checkpoints go through `load` from a file in the official layout.
    """

    @pytest.mark.parametrize("case", ENCODED)
    def test_encode(self, published: Any, variant: str, case: str) -> None:
        golden, _, model = (each := published(variant)).golden, each.path, each.model
        # The official code takes any size; the case of 44 x 52 pixels is there to show what it makes of it.
        vae = with_official_sizes(model)
        for name, made in encoded(vae, golden.inputs(golden.case(case))["image"], variant).items():
            assert golden.error(golden.case(case), made, name) <= 1e-5

    @pytest.mark.parametrize("case", DECODED)
    def test_decode(self, published: Any, variant: str, case: str) -> None:
        golden, model = (each := published(variant)).golden, each.model
        made = decoded(model, golden.inputs(golden.case(case))["latent"], variant)
        assert golden.error(golden.case(case), made) <= 1e-5

    @pytest.mark.parametrize("case", ROUND_TRIPS)
    def test_round_trip(self, published: Any, variant: str, case: str) -> None:
        golden, model = (each := published(variant)).golden, each.model
        image = golden.inputs(golden.case(case))["image"]
        # Twice the noise of one way.
        assert golden.error(golden.case(case), model(image)) <= 2e-5

    def test_float64(self, published: Any, variant: str) -> None:
        """Where float32 is too coarse to tell a wrong constant; 1e-7: the references are stored in float32."""
        golden, model = (each := published(variant)).golden, copy.deepcopy(each.model).double()
        for case in map(golden.case, IN_FLOAT64):
            inputs = {name: each.double() for name, each in golden.inputs(case).items()}
            match case["op"]:
                case "encode":
                    made = encoded(model, inputs["image"], variant)
                case "decode":
                    made = {"decode": decoded(model, inputs["latent"], variant)}
                case _:
                    made = {"round_trip": model(inputs["image"])}
            for name, each in made.items():
                assert golden.error(case, each, name, float64=True) <= 1e-7, case["name"]

    def test_no_case_is_left_out(self, published: Any, variant: str) -> None:
        golden = published(variant).golden
        assert {case["name"] for case in golden.cases} == {*ENCODED, *DECODED, *ROUND_TRIPS}
        with_float64 = {
            case["name"] for case in golden.cases if any("float64" in each for each in case["outputs"].values())
        }
        assert with_float64 == set(IN_FLOAT64)


@both_checkpoints
class TestDiffusersAtFullWidth:
    """The published configurations against diffusers with the same weights. SDXL is SD 1.x's network, SD3 FLUX.1's."""

    def test_encode_and_decode(self, published: Any, diffusers_twin: Any, variant: str) -> None:
        model = published(variant).model
        twin = diffusers_twin(model)
        image, latent = inputs(model, (6, 9), batch=1)
        assert_close(model.encode(image).latent_dist.parameters, twin.encode(image).latent_dist.parameters, *SAME_ORDER)
        assert_close(model.decode(latent).sample, twin.decode(latent).sample, *SAME_ORDER)


SAME_ORDER = (1e-6, "the same operations in the same order")


@pytest.mark.parametrize("variant", PUBLISHED)
class TestDiffusersOfEveryVariant:
    """Narrow networks, so that many sizes can be compared."""

    @pytest.mark.parametrize("grid", [(1, 1), (1, 6), (3, 2), (7, 5), (8, 8)], ids=str)
    def test_every_size(self, narrow: Any, variant: str, grid: tuple[int, int]) -> None:
        model, twin = narrow(PUBLISHED[variant])
        image, latent = inputs(model, grid)
        ours, theirs = model.encode(image).latent_dist, twin.encode(image).latent_dist
        for name in ("parameters", "mean", "std", "logvar", "var"):
            assert_close(getattr(ours, name), getattr(theirs, name), *SAME_ORDER)
        assert_close(ours.mode(), theirs.mode(), *SAME_ORDER)
        assert_close(model.decode(latent).sample, twin.decode(latent).sample, *SAME_ORDER)

    @pytest.mark.parametrize("grid", [(8, 6), (9, 4), (13, 17)], ids=str)
    def test_tiles_that_diffusers_blends(self, narrow: Any, variant: str, grid: tuple[int, int]) -> None:
        """With smaller tiles than its own, so that there are some; the first grid is no larger than one."""
        model, twin = narrow(PUBLISHED[variant])
        twin.enable_tiling()
        twin.tile_sample_min_size, twin.tile_latent_min_size = 64, 8
        model.enable_blending(replace(DIFFUSERS, pixels=64, pixels_stride=48))
        image, latent = inputs(model, grid)
        parameters = model.encode(image).latent_dist.parameters
        assert_close(parameters, twin.encode(image).latent_dist.parameters, *SAME_ORDER)
        assert_close(model.decode(latent).sample, twin.decode(latent).sample, *SAME_ORDER)

    def test_forward_and_tuples(self, narrow: Any, variant: str) -> None:
        model, twin = narrow(PUBLISHED[variant])
        image, latent = inputs(model, (3, 4))
        assert_close(model(image), twin(image).sample, 1e-5, "the latents lie in memory another way")
        assert_close(model.decode(latent, return_dict=False)[0], twin.decode(latent, return_dict=False)[0], *SAME_ORDER)
        assert_close(
            model.encode(image, return_dict=False)[0].mean, twin.encode(image, return_dict=False)[0].mean, *SAME_ORDER
        )

    def test_slicing(self, narrow: Any, variant: str) -> None:
        model, twin = narrow(PUBLISHED[variant])
        image, latent = inputs(model, (3, 4), batch=3)
        for each in (model, twin):
            each.enable_slicing()
        assert_close(model.encode(image).latent_dist.mean, twin.encode(image).latent_dist.mean, *SAME_ORDER)
        assert_close(model.decode(latent).sample, twin.decode(latent).sample, *SAME_ORDER)

    def test_latents_are_normalised_as_the_pipelines_do(self, narrow: Any, variant: str) -> None:
        """Bit for bit; the right sides are copied from diffusers' Stable Diffusion 3 and FLUX.1 pipelines."""
        model, twin = narrow(PUBLISHED[variant])
        config, z = twin.config, inputs(model, (3, 4))[1]
        shift = config.shift_factor if config.shift_factor is not None else 0.0
        assert torch.equal(model.normalize_latents(z), (z - shift) * config.scaling_factor)
        assert torch.equal(model.denormalize_latents(z), (z / config.scaling_factor) + shift)

    def test_the_configuration_reads_as_diffusers_does(self, narrow: Any, variant: str) -> None:
        model, twin = narrow(PUBLISHED[variant])
        for name, value in twin.config.items():
            if not name.startswith("_"):
                ours = getattr(model.config, name)
                assert (list(ours) if isinstance(ours, tuple) else ours) == (
                    list(value) if isinstance(value, tuple) else value
                ), name


class TestDiffusersOfEveryOption:
    """Every architecture that diffusers' configuration can describe, not only the published ones."""

    @pytest.mark.parametrize("levels", [1, 2, 3, 4, 5])
    @pytest.mark.parametrize("layers", [1, 2])
    def test_levels_and_layers(self, narrow: Any, levels: int, layers: int) -> None:
        widths = (8, 8, 16, 24, 32)[:levels]
        compare(*narrow(arch_of(levels, block_out_channels=widths, layers_per_block=layers)))

    @pytest.mark.parametrize("act", ["silu", "swish", "mish", "gelu", "relu"])
    def test_activations(self, narrow: Any, act: str) -> None:
        compare(*narrow(arch_of(2, act_fn=act)))

    @pytest.mark.parametrize(("down", "up"), [("Attn", ""), ("", "Attn"), ("Attn", "Attn")])
    def test_attention_in_the_levels(self, narrow: Any, down: str, up: str) -> None:
        arch = arch_of(2, down_block_types=("DownEncoderBlock2D", f"{down}DownEncoderBlock2D"))
        compare(*narrow(replace(arch, up_block_types=(f"{up}UpDecoderBlock2D", "UpDecoderBlock2D"))))

    @pytest.mark.parametrize(
        "options",
        [
            {"mid_block_add_attention": False},
            {"use_quant_conv": False},
            {"use_post_quant_conv": False},
            {"in_channels": 1, "out_channels": 4},
            {"latent_channels": 1},
            {"norm_num_groups": 8},
            {"norm_num_groups": 1},
        ],
        ids=str,
    )
    def test_other_options(self, narrow: Any, options: dict[str, Any]) -> None:
        compare(*narrow(arch_of(2, **options)))

    def test_means_and_deviations(self, narrow: Any) -> None:
        """As Playground v2.5 has them; the right sides are copied from diffusers' Stable Diffusion XL pipelines."""
        means, deviations = (-1.6574, 1.886, -1.383, 2.5155), (8.4927, 5.9022, 6.5498, 5.2299)
        model, twin = narrow(arch_of(2, latents_mean=means, latents_std=deviations))
        z, config = inputs(model, (3, 4))[1], twin.config
        mean, std = (torch.tensor(each).view(1, 4, 1, 1) for each in (config.latents_mean, config.latents_std))
        assert torch.equal(model.normalize_latents(z), (z - mean) * config.scaling_factor / std)
        assert torch.equal(model.denormalize_latents(z), z * std / config.scaling_factor + mean)


class TestSampling:
    def test_with_the_same_generator_the_same_noise_comes(self) -> None:
        """Bit for bit, from the same moments; also with one generator for each item."""
        autoencoders = pytest.importorskip("diffusers.models.autoencoders.vae", reason="this machine has no diffusers")
        parameters = make_input("parameters", (2, 8, 5, 7), "latent")
        ours = DiagonalGaussianDistribution(parameters)
        theirs = autoencoders.DiagonalGaussianDistribution(parameters)
        for seeds in (3, [3, 4]):
            assert torch.equal(ours.sample(generators(seeds)), theirs.sample(generators(seeds)))
        other = make_input("other", (2, 8, 5, 7), "latent")
        our_other, their_other = DiagonalGaussianDistribution(other), autoencoders.DiagonalGaussianDistribution(other)
        assert_close(ours.kl(), theirs.kl(), 1e-6, "float32 sums of 140 terms")
        assert_close(ours.kl(our_other), theirs.kl(their_other), 1e-6, "float32 sums of 140 terms")
        assert_close(ours.nll(other[:, :4]), theirs.nll(other[:, :4]), 1e-6, "float32 sums of 140 terms")

    def test_a_sampled_image_is_diffusers_sampled_image(self, narrow: Any) -> None:
        model, twin = narrow(SD1)
        image, _ = inputs(model, (3, 4))
        ours = model.encode(image).latent_dist.sample(generators(5))
        theirs = twin.encode(image).latent_dist.sample(generators(5))
        assert_close(ours, theirs, *SAME_ORDER)
        sampled = model.decode(theirs.contiguous(), generator=generators(5)).sample
        assert_close(sampled, twin.decode(theirs.contiguous()).sample, *SAME_ORDER)


def test_a_difference_is_traced_to_its_layer(narrow: Any) -> None:
    """A wrong epsilon in one norm of ours shows at the convolution behind it, not at the output."""
    model, twin = narrow(SD1)
    _, latent = inputs(model, (3, 4))
    assert first_divergence(model, twin, lambda each: each.decode(latent), 1e-6) is None
    wrong = copy.deepcopy(model)
    wrong.decoder.up_blocks[1].resnets[0].norm1.eps = 1e-2
    found = first_divergence(wrong, twin, lambda each: each.decode(latent), 1e-6)
    assert found is not None
    assert found.layer == "decoder.up_blocks.1.resnets.0.conv1"


@pytest.fixture
def narrow(
    random_model: Any, diffusers_twin: Any
) -> Iterator[Callable[[AutoencoderKLArchConfig], tuple[AutoencoderKL, Any]]]:
    """Our model and diffusers', with the same random weights; a published architecture is made narrow."""

    def build(arch: AutoencoderKLArchConfig) -> tuple[AutoencoderKL, Any]:
        model = random_model(replace(arch, **NARROW) if arch in PUBLISHED.values() else arch)
        return model, diffusers_twin(model)

    with single_thread():
        yield build


def arch_of(levels: int, **options: Any) -> AutoencoderKLArchConfig:
    return AutoencoderKLArchConfig(
        **{
            "block_out_channels": (8, 16, 16, 24, 32)[:levels],
            "down_block_types": ("DownEncoderBlock2D",) * levels,
            "up_block_types": ("UpDecoderBlock2D",) * levels,
            "norm_num_groups": 4,
            **options,
        }
    )


def compare(model: AutoencoderKL, twin: Any) -> None:
    image, latent = inputs(model, (3, 2))
    assert_close(model.encode(image).latent_dist.parameters, twin.encode(image).latent_dist.parameters, *SAME_ORDER)
    assert_close(model.decode(latent).sample, twin.decode(latent).sample, *SAME_ORDER)


def inputs(model: AutoencoderKL, grid: tuple[int, int], batch: int = 2) -> tuple[Tensor, Tensor]:
    """An image and latents for a grid of latents."""
    ratio = model.arch.spatial_compression_ratio
    image = make_input("parity", (batch, model.arch.in_channels, ratio * grid[0], ratio * grid[1]), "image")
    return image, make_input("parity", (batch, model.arch.latent_channels, *grid), "latent")


def generators(seeds: int | list[int]) -> torch.Generator | list[torch.Generator]:
    if isinstance(seeds, int):
        return torch.Generator().manual_seed(seeds)
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def with_official_sizes(model: AutoencoderKL) -> AutoencoderKL:
    """The same weights under a configuration that takes sizes that are no multiple of 8."""
    with torch.device("meta"):
        other = AutoencoderKL(replace(model.config, illegal_sizes="official"))
    other.load_state_dict(model.state_dict(), strict=True, assign=True)
    return other.requires_grad_(False)


def encoded(model: AutoencoderKL, image: Tensor, variant: str) -> dict[str, Tensor]:
    """Under the names of the golden files; FLUX.1's official class normalises latents itself."""
    posterior = model.encode(image).latent_dist
    made = {"encode_moments": posterior.parameters}
    return made | {"encode_normalised": model.normalize_latents(posterior.mode())} if variant == "flux1" else made


def decoded(model: AutoencoderKL, latent: Tensor, variant: str) -> Tensor:
    return model.decode(model.denormalize_latents(latent) if variant == "flux1" else latent).sample
