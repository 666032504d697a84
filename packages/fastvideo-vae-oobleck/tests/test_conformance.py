"""The contract of every family, laid on Oobleck."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from fastvideo_vae_core.config import VAEConfig
from fastvideo_vae_core.errors import ConfigError, ShapeError
from fastvideo_vae_core.plan import Direction
from fastvideo_vae_core.testing.conformance import ConformanceSuite
from fastvideo_vae_core.testing.contract.hooks import VAE, both_directions
from fastvideo_vae_core.testing.golden import fill
from fastvideo_vae_core.testing.parity import relative_error
from fastvideo_vae_oobleck import STABLE_AUDIO_OPEN, AutoencoderOobleck, OobleckArchConfig
from fastvideo_vae_oobleck.config import ACE_STEP


def tiny(*strides: int) -> OobleckArchConfig:
    return OobleckArchConfig(
        encoder_hidden_size=6,
        downsampling_ratios=strides,
        channel_multiples=tuple(range(1, len(strides) + 1)),
        decoder_channels=4,
        decoder_input_channels=3,
    )


def filled(arch: OobleckArchConfig) -> AutoencoderOobleck:
    """The branches and the last convolutions are toned down, so that outputs stay near unit size."""
    model = AutoencoderOobleck(VAEConfig(arch_config=arch))
    fill(model, gains={"*res_unit*.conv2.weight": 0.4, "*.conv2.weight": 0.4, "*.conv_t1.weight": 1.5})
    return model


class OobleckSuite(ConformanceSuite):
    stream_axis = 2

    def large(self, vae: VAE, direction: Direction) -> tuple[int, ...]:
        """The hops of the tiny models are small, so it takes many latents."""
        z_shape = (2, vae.channels[1], 160)
        return z_shape if direction == "decode" else vae.decoded_shape(z_shape)

    @both_directions
    def test_tiling_can_be_configured(self, vae: VAE, direction: Direction) -> None:
        """Tiles in height and width mean nothing for audio, so the flags are refused, with the reason."""
        with pytest.raises(ConfigError, match="pieces along time"):
            vae.enable_tiling()
        with pytest.raises(ConfigError, match="pieces along time"):
            AutoencoderOobleck(VAEConfig(arch_config=vae.config.arch_config, use_tiling=True))

    def test_divergence_from_the_standard_normal(self, posterior: Any, normal: Normal) -> None:
        """The official loss: a scalar, and twice the nats, because it leaves out the factor of a half."""
        standard = Normal(torch.zeros_like(posterior.mean), torch.ones_like(posterior.mean))
        assert relative_error(posterior.kl(), 2 * kl_divergence(normal, standard).sum(1).mean()) <= 1e-12

    def test_divergence_from_another_posterior(self, posterior: Any, normal: Normal, vae64: VAE) -> None:
        other = vae64.encode(-self.example(vae64, "encode", batch=3)).latent_dist
        expected = 2 * kl_divergence(normal, Normal(other.mean, other.std)).sum(1).mean()
        assert relative_error(posterior.kl(other), expected) <= 1e-12


class TestEvenStrides(OobleckSuite):
    """As the published checkpoints have them."""

    latent_grids = ((1,), (2,), (17,))

    def tiny(self) -> AutoencoderOobleck:
        return filled(tiny(4, 6))


class TestOddStrides(OobleckSuite):
    """Every odd stride loses a sample of its own, so n latents are fewer than n times the hop of samples."""

    latent_grids = ((1,), (3,), (23,))

    def tiny(self) -> AutoencoderOobleck:
        return filled(tiny(3, 5))


class TestAStrideOfOne(OobleckSuite):
    """As the test configurations of diffusers have it: the stage gives one sample less, or one latent more."""

    latent_grids = ((1,), (2,), (61,))

    def tiny(self) -> AutoencoderOobleck:
        return filled(tiny(1, 2))


@pytest.mark.parametrize(
    ("arch", "encode", "decode"), [(STABLE_AUDIO_OPEN, 8, 10), (ACE_STEP, 7, 9)], ids=["stable_audio_open", "ace_step"]
)
def test_the_context_follows_from_the_architecture(arch: OobleckArchConfig, encode: int, decode: int) -> None:
    with torch.device("meta"):
        vae = AutoencoderOobleck(VAEConfig(arch_config=arch))
    (samples,), (latents,) = vae.encode_steps()[0].axes, vae.decode_steps()[0].axes
    assert (samples.before, samples.after) == (encode * arch.hop_length,) * 2
    assert (latents.before, latents.after) == (decode, decode)


@both_directions
@pytest.mark.parametrize("strides", [(4, 6), (3, 5)])
def test_the_context_is_what_the_network_sees(direction: Direction, strides: tuple[int, ...]) -> None:
    """A change of the input changes what the context says, up to both ends, and nothing beyond."""
    vae = filled(tiny(*strides)).double().eval().requires_grad_(False)
    (axis,) = (vae.encode_steps() if direction == "encode" else vae.decode_steps())[0].axes
    z = torch.randn(1, 3, 61, dtype=torch.float64)
    x = z if direction == "decode" else torch.randn(vae.decoded_shape(z.shape), dtype=torch.float64)
    run = (
        (lambda x: vae.decode(x).sample) if direction == "decode" else (lambda x: vae.encode(x).latent_dist.parameters)
    )
    before = run(x)
    at = x.shape[2] // 2
    x[..., at] += 1.0
    changed = (run(x) != before).any(1)[0].nonzero()[:, 0].tolist()
    reached = [index for index in range(before.shape[2]) if at in range(*axis.needs(index, index + 1, x.shape[2]))]
    assert reached[0] <= changed[0] <= changed[-1] <= reached[-1]
    # The context is in whole latents, and pieces begin and end with one.
    slack = 3 * (1 if direction == "encode" else vae.hop_length)
    assert changed[0] - reached[0] < slack
    assert reached[-1] - changed[-1] < slack


LENGTHS = (1, 2, 3, 4, 5, 7, 8, 11, 13, 16, 17, 19, 21, 23, 27, 29, 31, 37, 41, 43)


@both_directions
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_pieces_equal_one_call_at_twenty_lengths(direction: Direction, dtype: torch.dtype) -> None:
    """Prime lengths among them; pieces in one call, and a stream in chunks of changing sizes."""
    vae = filled(tiny(3, 4)).to(dtype).eval().requires_grad_(False)
    bound = 1e-6 if dtype == torch.float32 else 1e-13
    for length in LENGTHS:
        z = torch.randn(2, 3, length, generator=torch.Generator().manual_seed(length)).to(dtype)
        if direction == "decode":
            x, plan = z, vae.plan_decode(z.shape, tile=(5 * 12 + 1,))
            whole, pieces = vae.decode(x).sample, vae.decode(x, plan=plan).sample
            streamed = torch.cat(list(vae.decode_stream(chunks(x, length))), 2)
        else:
            x = vae.decode(z).sample
            plan = vae.plan_encode(x.shape, tile=(5 * 12,))
            whole, pieces = (vae.encode(x, plan=each).latent_dist.parameters for each in (None, plan))
            streamed = torch.cat([each.parameters for each in vae.encode_stream(chunks(x, length))], 2)
        for made in (pieces, streamed):
            assert relative_error(made, whole) <= bound


def chunks(x: torch.Tensor, seed: int) -> list[torch.Tensor]:
    """Of 1 to 16 elements, as they come."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    while x.shape[2]:
        size = int(torch.randint(1, 17, (), generator=generator))
        made.append(x[..., :size])
        x = x[..., size:]
    return made


def test_long_audio_is_computed_in_pieces_by_itself() -> None:
    with torch.device("meta"):
        vae = AutoencoderOobleck(VAEConfig(arch_config=STABLE_AUDIO_OPEN))
    assert vae.plan_decode((1, 64, 1024)).mode == "whole"
    assert vae.plan_encode((1, 2, 1024 * 2048)).mode == "whole"
    assert vae.plan_decode((1, 64, 1025)).tile == (512 * 2048,)
    assert vae.plan_encode((1, 2, 1025 * 2048)).tile == (512 * 2048,)
    assert "10 latents" in str(vae.plan_decode((1, 64, 1025)))
    tight = vae.plan_decode((1, 64, 77_519), memory_budget="8GiB")
    assert tight.tile is not None
    assert tight.peak_bytes <= 8 << 30


def test_a_stream_holds_only_its_context() -> None:
    """A piece comes as soon as its context is there, and pieces have no more than 512 latents."""
    vae = filled(tiny(4, 6)).eval().requires_grad_(False)
    (axis,) = vae.decode_steps()[0].axes
    fed = 0

    def endless() -> Any:
        nonlocal fed
        while True:
            fed += 1
            yield torch.zeros(1, 3, 1)

    stream = vae.decode_stream(endless())
    for made in range(1, 4):
        assert next(stream).shape == (1, 2, 24)
        assert fed == made + axis.after
    # The end is known when the chunks end; until then the last piece waits for its context.
    lengths = [piece.shape[2] for piece in vae.decode_stream(torch.zeros(1, 3, 700))]
    assert lengths == [512 * 24, (188 - axis.after) * 24, axis.after * 24]


def test_a_stream_of_an_illegal_length_is_refused_at_its_end() -> None:
    vae = filled(tiny(4, 6)).eval().requires_grad_(False)
    with pytest.raises(ShapeError, match="pass 48 or 72"):
        list(vae.encode_stream([torch.zeros(1, 2, 24), torch.zeros(1, 2, 25)]))
    with pytest.raises(ShapeError, match="same batch"):
        list(vae.encode_stream([torch.zeros(1, 2, 24), torch.zeros(2, 2, 24)]))
    assert not list(vae.decode_stream([]))


@pytest.mark.parametrize(
    "wrong",
    [
        {"downsampling_ratios": (2, 4)},
        {"decoder_input_channels": 32},
        {"downsampling_ratios": (1, 1, 1, 1, 1)},
        {"downsampling_ratios": (256, 256, 256, 2, 2)},
        {"channel_multiples": (1, 2, 4, 8, 0)},
        {"encoder_hidden_size": 1 << 30},
    ],
    ids=str,
)
def test_a_hostile_configuration_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        OobleckArchConfig(**wrong)
