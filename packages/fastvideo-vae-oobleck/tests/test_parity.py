"""Encoder output, latent mode and decoded sample against the official implementation and diffusers, on the CPU."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderOobleck as Reference
from safetensors.torch import save_file
from torch import Tensor

from fastvideo_vae_core.config import VAEConfig
from fastvideo_vae_core.errors import ShapeError
from fastvideo_vae_core.loading import load
from fastvideo_vae_core.ops import conv1d
from fastvideo_vae_core.testing.golden import Golden, golden_path, load_golden, make_input, make_tensor
from fastvideo_vae_core.testing.parity import assert_close
from fastvideo_vae_oobleck import ACE_STEP, STABLE_AUDIO_OPEN, AutoencoderOobleck, OobleckArchConfig

SAME = "the same operations in the same order"
GOLDEN = "float32 noise of the references themselves is 3e-6"
GOLDEN_TWICE = "float32 noise of the references themselves is 6e-6 through both halves"
GOLDEN64 = "float64, stored rounded to float32"

TINY = OobleckArchConfig(
    encoder_hidden_size=12,
    downsampling_ratios=(2, 3, 4),
    channel_multiples=(1, 2, 3),
    decoder_channels=8,
    decoder_input_channels=6,
)


def reference_of(arch: OobleckArchConfig) -> Reference:
    """diffusers' model with weights that keep signals near unit size, as the goldens have them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        fields = {name: value for name, value in arch.to_dict().items() if name != "scaling_factor"}
        model = Reference(**fields).eval().requires_grad_(False)
    gains = {"conv_t1.weight_g": 1.2, "conv2.weight_g": 0.4, "conv1.weight_g": 0.7}
    for name, tensor in model.state_dict().items():
        gain = next((each for end, each in gains.items() if name.endswith(end)), 1.0)
        tensor.copy_(make_tensor(name, tensor.shape, gain=gain))
    return model


def assert_parity(ours: AutoencoderOobleck, reference: Reference, latents: tuple[int, ...]) -> None:
    for length in latents:
        z = make_input(f"z{length}", (2, ours.channels[1], length), "latent")
        x = make_input(f"x{length}", ours.decoded_shape(z.shape), "audio")
        mine, theirs = ours.encode(x).latent_dist, reference.encode(x).latent_dist
        assert_close(mine.parameters, theirs.parameters, 1e-6, SAME)
        assert_close(mine.mode(), theirs.mode(), 1e-6, SAME)
        assert_close(mine.std, theirs.std, 1e-6, SAME)
        assert_close(ours.decode(z).sample, reference.decode(z).sample, 1e-6, SAME)


def test_dilations_as_rows_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """What GPUs do in 16 bits, on the CPU: lengths that the dilations do not divide have zeros behind them."""
    model = AutoencoderOobleck(VAEConfig(arch_config=TINY)).double().requires_grad_(False)
    z = torch.randn(2, 6, 5, dtype=torch.float64)
    expected = model.decode(z).sample
    parameters = model.encode(expected).latent_dist.parameters
    monkeypatch.setattr(conv1d, "_channels_last", lambda x: True)
    gaps = []

    def folded(x: Tensor, conv: torch.nn.Conv1d, samples: int | None = None) -> Tensor:
        gaps.append(x.shape[2] - (samples or 0))
        assert x.shape[2] % conv.dilation[0] == 0
        return plainly_folded(x, conv, samples)

    plainly_folded = conv1d._folded
    monkeypatch.setattr(conv1d, "_folded", folded)
    assert_close(model.decode(z).sample, expected, 1e-13, "float64")
    assert_close(model.encode(expected).latent_dist.parameters, parameters, 1e-13, "float64")
    assert max(gaps) > 0


@pytest.mark.parametrize(
    "arch",
    [
        TINY,
        replace(TINY, audio_channels=1, downsampling_ratios=(5, 3, 2)),
        replace(TINY, downsampling_ratios=(1, 2, 8), channel_multiples=(2, 4, 1), sampling_rate=16_000),
    ],
    ids=["stereo", "mono, odd strides", "a stride of one"],
)
def test_tiny_configurations_equal_diffusers(arch: OobleckArchConfig, tmp_path: Path) -> None:
    reference = reference_of(arch)
    reference.save_pretrained(tmp_path)
    ours = load(tmp_path)
    assert isinstance(ours, AutoencoderOobleck)
    assert ours.config.arch_config == arch
    assert_parity(ours, reference, (1, 2, 13))


@pytest.mark.parametrize(
    "arch",
    [STABLE_AUDIO_OPEN, pytest.param(ACE_STEP, marks=pytest.mark.slow)],
    ids=["stable_audio_open", "ace_step"],
)
def test_published_configurations_equal_diffusers(arch: OobleckArchConfig, tmp_path: Path) -> None:
    reference = reference_of(arch)
    reference.save_pretrained(tmp_path)
    ours = load(tmp_path)
    assert isinstance(ours, AutoencoderOobleck)
    assert ours.provenance.variant == ("stable_audio_open" if arch == STABLE_AUDIO_OPEN else "ace_step")
    assert_parity(ours, reference, (3,))


def test_the_posterior_is_that_of_diffusers(tmp_path: Path) -> None:
    reference = reference_of(TINY)
    reference.save_pretrained(tmp_path)
    x = make_input("posterior", (2, 2, 24 * 5), "audio")
    z = make_input("other", (2, 12, 5), "latent")
    mine = load(tmp_path).posterior(z)
    theirs = type(reference.encode(x).latent_dist)(z)
    for name in ("mean", "scale", "std", "var", "logvar"):
        assert torch.equal(getattr(mine, name), getattr(theirs, name)), name
    for seed in (0, 1):
        generators = [torch.Generator().manual_seed(seed) for _ in range(2)]
        assert torch.equal(mine.sample(generators[0]), theirs.sample(generators[1]))
    pairs = [[torch.Generator().manual_seed(seed) for seed in (3, 4)] for _ in range(2)]
    assert torch.equal(mine.sample(pairs[0]), theirs.sample(pairs[1]))
    assert torch.equal(mine.kl(), theirs.kl())
    assert torch.equal(mine.mode(), theirs.mode())


@pytest.fixture(scope="module")
def golden() -> Golden:
    return load_golden(golden_path("oobleck.safetensors"))


@pytest.fixture(scope="module")
def checkpoint(golden: Golden, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("golden") / "model.safetensors"
    save_file(golden.state_dict(), path)
    return path


def outputs(ours: AutoencoderOobleck, case: dict[str, object], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a case of the golden file stores, computed by us."""
    tiling, operation = case.get("tiling"), case["op"]
    if operation == "decode":
        z = inputs["latent"]
        return {"decode": ours.decode_chunked(z, **tiling) if isinstance(tiling, dict) else ours.decode(z).sample}
    x = inputs["audio"]
    if operation == "preprocess":
        return {"preprocess": ours.pad_to_valid(x.expand(-1, 2, -1))}
    if isinstance(tiling, dict):
        return {"encode_mean": ours.encode_chunked(x, **tiling)}
    posterior = ours.encode(x).latent_dist
    if operation == "round_trip":
        return {"round_trip": ours.decode(posterior.mode()).sample}
    return {
        "encode_moments": posterior.parameters,
        "encode_mean": posterior.mode(),
        "encode_mean_plus_std": posterior.mean + posterior.std,
    }


def test_goldens_in_float32(golden: Golden, checkpoint: Path) -> None:
    """Every case, also the length that is no multiple of the hop, and the official chunks with their seams."""
    ours = load(checkpoint)
    assert isinstance(ours, AutoencoderOobleck)
    assert ours.provenance.variant == "stable_audio_open"
    ours.config = replace(ours.config, illegal_sizes="official")
    compared = 0
    for case in golden.cases:
        bound, reason = (2e-5, GOLDEN_TWICE) if case["op"] == "round_trip" else (1e-5, GOLDEN)
        for name, made in outputs(ours, dict(case), golden.inputs(case)).items():
            error = golden.error(case, made, name)
            assert error <= bound, f"{case['name']} {name}: {error:.1e}, {reason}"
            compared += 1
    assert compared == sum(len(case["outputs"]) for case in golden.cases) == 21


@pytest.mark.slow
def test_goldens_in_float64(golden: Golden, checkpoint: Path) -> None:
    ours = load(checkpoint, dtype="float64")
    assert isinstance(ours, AutoencoderOobleck)
    compared = 0
    for case in golden.cases:
        stored = [name for name, spec in case["outputs"].items() if "float64" in spec]
        if not stored:
            continue
        made = outputs(ours, dict(case), {name: each.double() for name, each in golden.inputs(case).items()})
        for name in stored:
            error = golden.error(case, made[name], name, float64=True)
            assert error <= 1e-7, f"{case['name']} {name}: {error:.1e}, {GOLDEN64}"
            compared += 1
    assert compared == 5


def test_official_chunks_have_no_seams_where_the_overlap_is_the_context() -> None:
    ours = AutoencoderOobleck(VAEConfig(arch_config=replace(TINY, downsampling_ratios=(2, 4, 4)))).eval()
    ours.requires_grad_(False)
    z = make_input("chunks", (1, 6, 90), "latent")
    (axis,) = ours.decode_steps()[0].axes
    whole = ours.decode(z).sample
    assert_close(ours.decode_chunked(z, 60, 2 * axis.before), whole, 1e-6, "the context is all there")
    with pytest.raises(ShapeError, match="at least 91"):
        ours.decode_chunked(z, 91, 2)
