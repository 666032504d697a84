"""Encoder output, latent mode and decoded video against the official implementation and diffusers, on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastvideo_vae_core.ops.attention import prefix_attention
from fastvideo_vae_core.testing.golden import make_input
from fastvideo_vae_core.testing.parity import assert_close, first_divergence
from fastvideo_vae_core.testing.threads import single_thread
from fastvideo_vae_gamecraft import (
    DIFFUSERS,
    DIFFUSERS_FRAMEWISE,
    GAMECRAFT,
    HUNYUANVIDEO,
    AutoencoderKLHunyuanVideo,
    Blend,
    HunyuanVideoArchConfig,
)

# Four levels as published, and narrow.
NARROW: dict[str, Any] = {"block_out_channels": (8, 16, 16, 24), "norm_num_groups": 4, "layers_per_block": 1}
GRIDS = [(1, 1, 1), (1, 3, 2), (2, 5, 3), (3, 4, 4), (5, 1, 3)]
# The cases of a few seconds, at full width.
QUICK = ("enc_f1_64x64", "enc_b2_f5_32x48", "enc_edge_f7_36x44", "enc_f25_32x48_tilet", "dec_t1_8x8", "dec_b2_t2_4x6")

# The attention adds up its prefixes in another order than under a mask.
OTHER_ORDER = (3e-6, "sums of the same numbers in another order")


class TestOfficial:
    """The golden file: outputs of GameCraft's code with the published configuration at full width.

    The checkpoint goes through `load` from a `pytorch_model.pt` with no configuration beside it.
    """

    def test_the_variant_is_recognised(self, published: Any) -> None:
        assert published.model.arch == GAMECRAFT == HUNYUANVIDEO
        assert published.model.provenance.variant == "884-16c"

    @pytest.mark.parametrize("name", QUICK)
    def test_goldens(self, published: Any, name: str) -> None:
        """Batches, single frames, sizes that do not divide, and official tiles in time among them."""
        case = published.golden.case(name)
        assert error_of(published.golden, published.model, case) <= 1e-5

    @pytest.mark.slow
    def test_every_golden(self, published: Any) -> None:
        golden, model = published.golden, published.model
        errors = {case["name"]: error_of(golden, model, case) for case in golden.cases}
        print(errors)
        assert set(QUICK) < set(errors)
        # Twice the noise of one way.
        bounds = {case["name"]: 2e-5 if case["op"] == "round_trip" else 1e-5 for case in golden.cases}
        assert all(errors[name] <= bounds[name] for name in errors), errors

    @pytest.mark.slow
    def test_every_golden_in_pieces(self, published: Any) -> None:
        """The same with a single latent frame of a convolution's input at a time."""
        golden, model = published.golden, published.model
        errors = {case["name"]: error_of(golden, model, case, chunk=1) for case in golden.cases}
        assert max(errors.values()) <= 2e-5, errors
        assert all(error <= 1e-5 for name, error in errors.items() if not name.startswith("rt_")), errors

    @pytest.mark.slow
    def test_float64(self, published: Any) -> None:
        """Where float32 is too coarse to tell a wrong constant; 1e-7: the references are stored in float32."""
        golden, model = published.golden, copy.deepcopy(published.model).double()
        cases = [case for case in golden.cases if any("float64" in each for each in case["outputs"].values())]
        assert cases
        errors = {case["name"]: error_of(golden, model, case, float64=True) for case in cases}
        assert max(errors.values()) <= 1e-7, errors


class TestDiffusers:
    """A narrow network, so that many sizes can be compared."""

    @pytest.mark.parametrize("grid", GRIDS, ids=str)
    def test_every_size(self, narrow: Any, grid: tuple[int, ...]) -> None:
        model, twin = narrow()
        video, latent = inputs(model, grid)
        ours, theirs = model.encode(video).latent_dist, twin.encode(video).latent_dist
        for name in ("parameters", "mean", "std", "logvar", "var"):
            assert_close(getattr(ours, name), getattr(theirs, name), *OTHER_ORDER)
        assert_close(ours.mode(), theirs.mode(), *OTHER_ORDER)
        assert_close(model.decode(latent).sample, twin.decode(latent).sample, *OTHER_ORDER)

    @pytest.mark.parametrize("frames", range(1, 18))
    def test_every_number_of_frames(self, narrow: Any, frames: int) -> None:
        model, twin = narrow()
        model.config = replace(model.config, illegal_sizes="official")
        video = make_input("frames", (2, 3, frames, 24, 20), "video")
        ours = model.encode(video).latent_dist.parameters
        assert ours.shape == (2, 32, 1 + (frames - 1) // 4, 3, 3)
        assert model.encoded_shape(video.shape) == (2, 16, *ours.shape[2:])
        assert_close(ours, twin.encode(video).latent_dist.parameters, *OTHER_ORDER)

    @pytest.mark.parametrize("options", [{"layers_per_block": 2}, {"mid_block_add_attention": False}], ids=str)
    def test_other_architectures(self, narrow: Any, options: dict[str, Any]) -> None:
        model, twin = narrow(**options)
        video, latent = inputs(model, (2, 3, 2))
        parameters = model.encode(video).latent_dist.parameters
        assert_close(parameters, twin.encode(video).latent_dist.parameters, *OTHER_ORDER)
        assert_close(model.decode(latent).sample, twin.decode(latent).sample, *OTHER_ORDER)

    @pytest.mark.parametrize("space", [2, 4])
    def test_levels_that_halve_the_frames_alone(self, narrow: Any, space: int) -> None:
        model, twin = narrow(spatial_compression_ratio=space)
        video, latent = inputs(model, (2, 8, 6))
        parameters = model.encode(video).latent_dist.parameters
        assert_close(parameters, twin.encode(video).latent_dist.parameters, *OTHER_ORDER)
        assert_close(model.decode(latent).sample, twin.decode(latent).sample, *OTHER_ORDER)
        tiled = model.decode(latent, plan=model.plan_decode(latent.shape, tile=(3, 7, 9))).sample
        assert_close(tiled, twin.decode(latent).sample, *OTHER_ORDER)

    @pytest.mark.parametrize("blend", [DIFFUSERS_FRAMEWISE, DIFFUSERS], ids=str)
    def test_tiles_that_diffusers_blends(self, narrow: Any, blend: Blend) -> None:
        """Frames by default; pictures too behind `enable_tiling`, here with smaller tiles so that there are some."""
        model, twin = narrow()
        twin.use_framewise_encoding = twin.use_framewise_decoding = True
        if blend.pixels is not None:
            blend = replace(blend, pixels=32, pixels_stride=24)
            twin.enable_tiling(32, 32, None, 24, 24, None)
        video, latent = inputs(model, (6, 5, 5), batch=1)
        model.enable_blending(blend)
        parameters = model.encode(video).latent_dist.parameters
        assert_close(parameters, twin.encode(video).latent_dist.parameters, *OTHER_ORDER)
        assert_close(model.decode(latent).sample, twin.decode(latent).sample, *OTHER_ORDER)
        model.disable_blending()
        # It is another video, which is why it has a label.
        twin.use_framewise_decoding = False
        twin.disable_tiling()
        assert_close(model.decode(latent).sample, twin.decode(latent).sample, *OTHER_ORDER)

    def test_forward_and_tuples(self, narrow: Any) -> None:
        model, twin = narrow()
        video, latent = inputs(model, (2, 2, 3))
        assert_close(model(video), twin(video).sample, 1e-5, "there and back")
        (ours,), (theirs,) = model.decode(latent, return_dict=False), twin.decode(latent, return_dict=False)
        assert_close(ours, theirs, *OTHER_ORDER)
        (ours,), (theirs,) = model.encode(video, return_dict=False), twin.encode(video, return_dict=False)
        assert_close(ours.mean, theirs.mean, *OTHER_ORDER)

    def test_latents_are_normalised_as_the_pipelines_do(self, narrow: Any) -> None:
        """Bit for bit; the right sides are copied from diffusers' and GameCraft's pipelines."""
        model, twin = narrow()
        z = inputs(model, (3, 4, 2))[1]
        assert torch.equal(model.normalize_latents(z), z * twin.config.scaling_factor)
        assert torch.equal(model.denormalize_latents(z), z / twin.config.scaling_factor)

    def test_the_configuration_reads_as_diffusers_does(self, narrow: Any) -> None:
        model, twin = narrow()
        for name, value in twin.config.items():
            if not name.startswith("_"):
                ours = getattr(model.config, name)
                assert (list(ours) if isinstance(ours, tuple) else ours) == (
                    list(value) if isinstance(value, tuple) else value
                ), name

    def test_a_difference_is_traced_to_its_layer(self, narrow: Any) -> None:
        """Layers have diffusers' names and are called in its order."""
        model, twin = narrow()
        _, latent = inputs(model, (2, 3, 2))

        def names(theirs: str) -> str:
            # diffusers' attention takes the positions as a sequence.
            return f"{theirs} of a sequence" if theirs.endswith("attentions.0") else theirs

        assert first_divergence(model, twin, lambda each: each.decode(latent), 1e-5, names) is None
        wrong = copy.deepcopy(model)
        wrong.decoder.up_blocks[1].resnets[0].norm2.eps = 1e-1
        found = first_divergence(wrong, twin, lambda each: each.decode(latent), 1e-5, names)
        assert found is not None
        assert found.layer == "decoder.up_blocks.1.resnets.0.conv2"


class TestAttention:
    def test_it_is_that_of_the_mask(self) -> None:
        q, k, v = (make_input(name, (2, 1, 5 * 6, 8), "latent").double() for name in "qkv")
        frame = torch.arange(30) // 6
        masked = F.scaled_dot_product_attention(q, k, v, frame[:, None] >= frame)
        assert_close(prefix_attention(q, k, v, 6), masked, 1e-14, "float64")

    def test_without_the_mask_it_is_another_video(self, narrow: Any, random_model: Any) -> None:
        model, _ = narrow()
        unmasked = random_model(replace(model.arch, mid_block_causal_attn=False))
        latent = inputs(model, (3, 3, 2))[1]
        single = latent[:, :, :1]
        assert_close(unmasked.decode(single).sample, model.decode(single).sample, *OTHER_ORDER)
        with pytest.raises(AssertionError, match="relative error"):
            assert_close(unmasked.decode(latent).sample, model.decode(latent).sample, 1e-4, "the mask counts")


@pytest.fixture
def narrow(random_model: Any, diffusers_twin: Any) -> Iterator[Callable[..., tuple[AutoencoderKLHunyuanVideo, Any]]]:
    """Our model and diffusers', with the same random weights: the published architecture made narrow."""

    def build(**options: Any) -> tuple[AutoencoderKLHunyuanVideo, Any]:
        arch: HunyuanVideoArchConfig = replace(HUNYUANVIDEO, **NARROW | options)
        model = random_model(arch)
        return model, diffusers_twin(model)

    with single_thread():
        yield build


def inputs(model: AutoencoderKLHunyuanVideo, grid: tuple[int, ...], batch: int = 2) -> tuple[Tensor, Tensor]:
    """A video and latents for a grid of latents."""
    latent = make_input("parity", (batch, model.arch.latent_channels, *grid), "latent")
    return make_input("parity", model.decoded_shape(latent.shape), "video"), latent


def error_of(
    golden: Any,
    model: AutoencoderKLHunyuanVideo,
    case: Mapping[str, Any],
    *,
    chunk: int | None = None,
    float64: bool = False,
) -> float:
    """Relative error of the one output of a case."""
    (output,) = case["outputs"]
    (x,) = golden.inputs(case).values()
    x = x.double() if float64 else x
    blend = blend_of(case)
    encode = model.plan_encode(x.shape, chunk=chunk, blend=blend) if case["op"] != "decode" else None
    if case["op"] == "decode":
        made = model.decode(x, plan=model.plan_decode(x.shape, chunk=chunk, blend=blend)).sample
    elif case["op"] == "encode":
        made = model.encode(x, plan=encode).latent_dist.parameters
    else:
        z = model.encode(x, plan=encode).latent_dist.mode()
        made = model.decode(z, plan=model.plan_decode(z.shape, chunk=chunk)).sample
    error: float = golden.error(case, made, output, float64=float64)
    return error


def blend_of(case: Mapping[str, Any]) -> Blend | None:
    """The official tiles of a case, three quarters of a tile apart."""
    tiling = case.get("tiling")
    if tiling is None:
        return None
    frames = tiling["sample_tsize"] if tiling["temporal"] else None
    pixels = tiling["sample_size"] if tiling["spatial"] else None
    return Blend(
        name="official",
        frames=frames,
        frames_stride=frames and frames * 3 // 4,
        pixels=pixels,
        pixels_stride=pixels and pixels * 3 // 4,
    )
