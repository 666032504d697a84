"""Encoder output, latent mode, decoded video and sound against the official code and diffusers, on the CPU."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastvideo_vae_core as fvae
from fastvideo_vae_core.blending import Blend
from fastvideo_vae_core.config import VAEConfig
from fastvideo_vae_core.plan import Direction, Plan
from fastvideo_vae_core.testing.golden import make_input
from fastvideo_vae_core.testing.parity import assert_close
from fastvideo_vae_ltx2 import LTX2VideoArchConfig, LTX2Vocoder, WeightedBlend, log_mel

# Convolutions over rows of channels where the references have planes: another order of additions.
OTHER_ORDER = (5e-6, "sums of the same numbers in another order")
GOLDENS = (
    "ltx2_audio",
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("ltx2_vocoder", "ltx23_vocoder", "ltx2_video_timestep", "ltx23_video", "ltx2_video")
    ),
)
GRIDS = [(1, 2, 2), (2, 3, 2), (4, 2, 3)]
VIDEO = ("2.0", "2.3", "timed", "causal")
VOCODERS = ("vocoder 2.0", "vocoder 2.3")


@pytest.mark.parametrize("name", GOLDENS)
def test_goldens(published: Any, name: str) -> None:
    """Outputs of the official code with the published configurations at full width, saturated sound among them.

    The checkpoints go through `load` from one file in the official layout, with the configuration in its metadata.
    """
    with published(name) as each:
        golden, model, cases = each.golden, each.model, each.golden.cases
        errors = {key: error for case in cases for key, error in errors_of(golden, model, case).items()}
        assert all(error <= (2e-5 if "round_trip" in key else 1e-5) for key, error in errors.items()), errors
        if name.startswith("ltx2_audio"):
            return
        # Where float32 is too coarse to tell a wrong constant; 1e-7: the references are stored in float32.
        model = model.double()
        errors = {key: error for case in cases for key, error in errors_of(golden, model, case, float64=True).items()}
        assert all(error <= 1e-7 for error in errors.values()), errors


@pytest.mark.parametrize("direction", ["encode", "decode"])
@pytest.mark.parametrize("length", [1, 2, 5, 9, 16])
def test_official_tiles_of_what_every_position_says_alike_are_the_whole(direction: Direction, length: int) -> None:
    """Of a network that sees single positions, so that all tiles agree where they overlap: the weights are one."""
    blend = WeightedBlend(name="small", frames=32, frames_stride=24, pixels=96, pixels_stride=64)
    z = make_input("tiles", (1, 2, length, 7, 4), "latent").double()
    x = torch.cat([z[:, :, :1], z[:, :, 1:].repeat_interleave(8, 2)], 2)
    x = x.repeat_interleave(32, 3).repeat_interleave(32, 4)
    given, wanted = (z, x) if direction == "decode" else (x, z)
    tiles = blend.tiles(given.shape, direction, 8, 32)
    assert len(tiles.crops) == {1: 1, 2: 1, 5: 2, 9: 3, 16: 5}[length] * 3 * 2

    def network(crop: Tensor) -> Tensor:
        if direction == "encode":
            return torch.cat([crop[:, :, :1], crop[:, :, 8::8]], 2)[..., ::32, ::32]
        made = torch.cat([crop[:, :, :1], crop[:, :, 1:].repeat_interleave(8, 2)], 2)
        return made.repeat_interleave(32, 3).repeat_interleave(32, 4)

    made = tiles.join(network(given[crop]) for crop in tiles.crops)
    assert made.shape == wanted.shape
    # A first frame of a tile stands for eight, but has no weight there.
    assert (made - wanted).abs().max() <= 1e-6


class TestOfficial:
    """ltx-core's networks, tiny, through one file in the official layout, by the official contract."""

    @pytest.mark.parametrize("name", VIDEO)
    def test_video(self, official: Any, tmp_path: Path, name: str) -> None:
        reference = official(name)
        model = fvae.load(reference.save(tmp_path / "ltx-2.safetensors"))
        for grid in GRIDS:
            x, z = inputs(model, grid)
            ours = model.normalize_latents(model.encode(x).latent_dist.mode())
            assert_close(ours, reference.modules["encoder"](x), *OTHER_ORDER)
            if name != "timed":
                sample = model.decode(model.denormalize_latents(z)).sample
                assert_close(sample, reference.modules["decoder"](z), *OTHER_ORDER)

    def test_video_with_timesteps_and_noise(self, official: Any, tmp_path: Path) -> None:
        """The official decoder always draws its noise, from the generator that it is given."""
        reference = official("timed")
        model = fvae.load(reference.save(tmp_path / "ltx-2.safetensors"))
        for grid, timestep in zip(GRIDS, (None, 0.2, torch.tensor([0.1, 0.7])), strict=True):
            _, z = inputs(model, grid)
            times = torch.full((2,), timestep) if isinstance(timestep, float) else timestep
            theirs = reference.modules["decoder"](z, times, seeded(3))
            ours = model.decode(model.denormalize_latents(z), timestep, generator=seeded(3)).sample
            assert_close(ours, theirs, 2e-5, "the noise is mixed in between denormalising and normalising")
            assert not torch.allclose(ours, model.decode(model.denormalize_latents(z), timestep).sample)

    def test_surplus_frames_are_dropped_officially(self, official: Any, tmp_path: Path) -> None:
        reference = official("2.3")
        model = fvae.load(reference.save(tmp_path / "ltx-2.safetensors"), config=VAEConfig(illegal_sizes="official"))
        x = make_input("parity", (1, 3, 12, 64, 64), "video")
        ours = model.normalize_latents(model.encode(x).latent_dist.mode())
        assert_close(ours, reference.modules["encoder"](x), *OTHER_ORDER)

    def test_one_padding_mode_is_for_both_halves(self, official: Any) -> None:
        config = official("2.0").config["vae"]
        modes = ("encoder_spatial_padding_mode", "decoder_spatial_padding_mode")
        for given, wanted in ((None, ("zeros", "reflect")), ("zeros", ("zeros",) * 2), ("reflect", ("reflect",) * 2)):
            arch = LTX2VideoArchConfig.from_dict(config if given is None else {**config, "spatial_padding_mode": given})
            assert tuple(getattr(arch, mode) for mode in modes) == wanted

    def test_audio(self, official: Any, tmp_path: Path) -> None:
        reference = official("audio")
        path = reference.save(tmp_path / "ltx-2.safetensors")
        model = fvae.load(path, config=VAEConfig(illegal_sizes="official"))
        for frames in (1, 5, 16, 33):
            x = make_input("parity", (2, 2, frames, 16), "mel")
            ours = model.normalize_latents(model.encode(x).latent_dist.mode())
            assert_close(ours, reference.modules["encoder"](x), *OTHER_ORDER)
            assert ours.shape[2] == math.ceil(frames / 4)
            sample = model.decode(model.denormalize_latents(ours)).sample
            assert_close(sample, reference.modules["decoder"](ours), *OTHER_ORDER)
            assert sample.shape[2] == 4 * math.ceil(frames / 4) - 3

    @pytest.mark.parametrize("rate", [16_000, 44_100, 48_000])
    def test_spectrograms(self, official: Any, rate: int) -> None:
        """torchaudio's transform, without torchaudio: in float32 to the rounding of one multiplication."""
        from ltx_core.model.audio_vae import AudioProcessor
        from ltx_core.types import Audio

        processor = AudioProcessor(target_sample_rate=16_000, mel_bins=64, mel_hop_length=160, n_fft=1024)
        x = make_input("parity", (2, 2, rate // 3), "gated")
        assert_close(log_mel(x, rate), processor.waveform_to_mel(Audio(x, rate)), 1e-6, "the same operations")

    @pytest.mark.parametrize("name", VOCODERS)
    def test_vocoders(self, official: Any, tmp_path: Path, name: str) -> None:
        reference = official(name)
        model = fvae.load(reference.save(tmp_path / "ltx-2.safetensors"))
        for frames in (1, 7):
            mel = make_input("parity", (2, 2, frames, 64), "mel")
            assert_close(model(mel), reference.modules["vocoder"](mel), *OTHER_ORDER)


class TestDiffusers:
    """Narrow networks with random weights."""

    @pytest.mark.parametrize("grid", GRIDS, ids=str)
    @pytest.mark.parametrize("name", ["2.0", "2.3", "causal"])
    def test_video(self, random_model: Any, diffusers_twin: Any, name: str, grid: tuple[int, ...]) -> None:
        model = random_model(name)
        twin, (x, z) = diffusers_twin(model), inputs(model, grid)
        ours, theirs = model.encode(x).latent_dist, twin.encode(x).latent_dist
        for value in ("parameters", "mean", "std", "logvar", "var"):
            assert_close(getattr(ours, value), getattr(theirs, value), *OTHER_ORDER)
        assert_close(model.decode(z).sample, twin.decode(z).sample, *OTHER_ORDER)

    @pytest.mark.parametrize("framewise", [False, True])
    def test_tiles_that_diffusers_blends(self, random_model: Any, diffusers_twin: Any, framewise: bool) -> None:
        """With smaller tiles than its own, so that there are some."""
        model = random_model("2.3")
        twin = diffusers_twin(model)
        time, space = model.arch.ratios
        frames = {"frames": 2 * time, "frames_stride": time} if framewise else {}
        blend = Blend(name="small", pixels=4 * space, pixels_stride=3 * space, **frames)
        twin.enable_tiling(blend.pixels, blend.pixels, blend.frames, blend.pixels_stride, blend.pixels_stride, time)
        twin.use_framewise_encoding = twin.use_framewise_decoding = framewise
        for grid in [(4, 5, 4), (2, 7, 3), (5, 3, 2)]:
            x, z = inputs(model, grid)
            model.enable_blending(blend)
            parameters = model.encode(x).latent_dist.parameters
            assert_close(parameters, twin.encode(x).latent_dist.parameters, *OTHER_ORDER)
            assert_close(model.decode(z).sample, twin.decode(z).sample, *OTHER_ORDER)

    def test_timesteps(self, random_model: Any, diffusers_twin: Any) -> None:
        """diffusers draws no noise in the decoder, and passes the timesteps in second place."""
        model = random_model("timed")
        twin, (_, z) = diffusers_twin(model), inputs(model, GRIDS[1])
        times = torch.tensor([0.05, 0.3])
        (ours,) = model.decode(z, times, return_dict=False)
        assert_close(ours, twin.decode(z, times).sample, *OTHER_ORDER)
        tile = model.plan_decode(z.shape, tile=(99, 32, 64))
        assert_close(model.decode(z, times, plan=tile).sample, ours, *OTHER_ORDER)
        assert_close(torch.cat(list(model.decode_stream(z.split(1, 2), times)), 2), ours, *OTHER_ORDER)
        model.enable_slicing()
        assert_close(model.decode(z, times).sample, ours, *OTHER_ORDER)

    def test_timesteps_that_do_not_fit_are_refused(self, random_model: Any) -> None:
        model = random_model("timed")
        _, z = inputs(model, GRIDS[0])
        with pytest.raises(fvae.ShapeError, match="2 items need 2 timesteps"):
            model.decode(z, torch.ones(3))
        plain = random_model("2.0")
        with pytest.raises(fvae.ConfigError, match="takes no timestep"):
            plain.decode(z, 0.05)
        assert torch.equal(plain.decode(z, generator=seeded(0)).sample, plain.decode(z).sample)

    def test_audio(self, random_model: Any, diffusers_twin: Any) -> None:
        model = random_model("audio")
        twin = diffusers_twin(model)
        x, z = make_input("parity", (2, 2, 33, 16), "mel"), make_input("parity", (2, 2, 9, 4), "latent")
        assert_close(model.encode(x).latent_dist.parameters, twin.encode(x).latent_dist.parameters, *OTHER_ORDER)
        assert_close(model.decode(z).sample, twin.decode(z).sample, *OTHER_ORDER)

    def test_vocoder(self, random_model: Any, diffusers_twin: Any) -> None:
        model = random_model("vocoder 2.0")
        mel = make_input("parity", (2, 2, 9, 16), "mel")
        assert_close(model(mel), diffusers_twin(model)(mel), *OTHER_ORDER)

    def test_the_first_stage_is_clamped_officially(self, random_model: Any, diffusers_twin: Any) -> None:
        """Where it is loud, diffusers differs, unless it is told to clamp, which published configurations do not."""
        model = random_model("vocoder 2.3")
        model.vocoder.conv_out.weight.mul_(3.0)
        twin, mel = diffusers_twin(model), make_input("parity", (1, 2, 9, 16), "mel")
        assert float(twin.vocoder(mel).abs().max()) > 1.5
        assert float((model(mel) - twin(mel)).abs().max()) > 0.1
        twin.vocoder.final_act_fn = "clamp"
        assert_close(model(mel), twin(mel), *OTHER_ORDER)

    @pytest.mark.parametrize("name", ["2.0", "2.3", "audio", *VOCODERS])
    def test_the_configuration_reads_as_diffusers_does(self, random_model: Any, diffusers_twin: Any, name: str) -> None:
        model = random_model(name)
        ours_alone = {"spatial_compression_ratio", "temporal_compression_ratio"}
        for key, value in diffusers_twin(model).config.items():
            if not key.startswith("_") and key not in ours_alone:
                ours = getattr(model.config, key)
                assert _listed(ours) == _listed(value), key

    @pytest.mark.parametrize("name", ["2.0", "audio"])
    def test_latents_are_normalised_as_the_pipelines_do(self, random_model: Any, name: str) -> None:
        """Bit for bit; by diffusers' own functions."""
        pipelines = pytest.importorskip("diffusers", reason="this machine has no diffusers").LTX2Pipeline
        model = random_model(name)
        mean, std = model.latents_mean, model.latents_std
        if name == "audio":
            z = make_input("parity", (2, 2, 9, 4), "latent")
            rows = pipelines._pack_audio_latents(z)
            made = (
                pipelines._normalize_audio_latents(rows, mean, std),
                pipelines._denormalize_audio_latents(rows, mean, std),
            )
            theirs = tuple(pipelines._unpack_audio_latents(each, 9, 4) for each in made)
        else:
            z = inputs(model, GRIDS[1])[1]
            theirs = pipelines._normalize_latents(z, mean, std), pipelines._denormalize_latents(z, mean, std)
        assert torch.equal(model.normalize_latents(z), theirs[0])
        assert torch.equal(model.denormalize_latents(z), theirs[1])


def inputs(model: Any, grid: tuple[int, ...], batch: int = 2) -> tuple[Tensor, Tensor]:
    """A video and latents for a grid of latents."""
    latent = make_input("parity", (batch, model.arch.latent_channels, *grid), "latent")
    return make_input("parity", model.decoded_shape(latent.shape), "video"), latent


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def errors_of(golden: Any, model: Any, case: Mapping[str, Any], float64: bool = False) -> dict[str, float]:
    """Relative errors of the outputs of a case, or of those that are stored in float64."""
    (x,) = golden.inputs(case).values()
    return {
        f"{case['name']} {output}": golden.error(
            case, answer(model, x.double() if float64 else x, output, case), output, float64=float64
        )
        for output, spec in case["outputs"].items()
        if not float64 or "float64" in spec
    }


def answer(model: Any, x: Tensor, output: str, case: Mapping[str, Any]) -> Tensor:
    """An output under its name in the golden files, which are of official networks that normalise inside."""
    if isinstance(model, LTX2Vocoder):
        return model(x) if output == "decode" else model.vocoder(model._as_planned(x))
    tiles = tiles_of(case)
    match output:
        case "mel":
            return model.waveform_to_mel(x, case["sample_rate"])
        case "encode_audio":
            return encoded(model, model.waveform_to_mel(x, case["sample_rate"]))
        case "encode_raw":
            parameters = model.encode(x).latent_dist.parameters
            # Our distribution repeats the one log variance of a video's latent.
            return parameters[:, : case["outputs"][output]["shape"][1]]
        case "encode_normalised":
            return encoded(model, x, tiles and model.plan_encode(x.shape, blend=tiles))
        case "decode":
            options = {"temb": case["timestep"]} if "timestep" in case else {}
            if tiles is not None:
                options["plan"] = model.plan_decode(x.shape, blend=tiles)
            return model.decode(model.denormalize_latents(x), **options).sample
        case _:
            return model.decode(model.denormalize_latents(encoded(model, x))).sample


def encoded(model: Any, x: Tensor, plan: Plan | None = None) -> Tensor:
    return model.normalize_latents(model.encode(x, plan=plan).latent_dist.mode())


def tiles_of(case: Mapping[str, Any]) -> WeightedBlend | None:
    """The official tiles of a case; those of its pictures are square."""
    sizes = {}
    for axis, name in (("frames", "frames"), ("height", "pixels")):
        if given := case.get("tiling", {}).get(axis):
            sizes |= {name: given["tile_size"], f"{name}_stride": given["tile_size"] - given["overlap"]}
    return WeightedBlend(name="official", **sizes) if sizes else None


def _listed(value: Any) -> Any:
    return [_listed(each) for each in value] if isinstance(value, (list, tuple)) else value
