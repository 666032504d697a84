"""One answer however a video is cut, and no state outside the calls."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastvideo_vae_core.config import VAEConfig
from fastvideo_vae_core.errors import ConfigError, ShapeError
from fastvideo_vae_core.testing.golden import make_input
from fastvideo_vae_core.testing.parity import relative_error
from fastvideo_vae_wan import WAN21, WAN22, AutoencoderKLWan

NARROW = {
    "wan2.1": replace(WAN21, base_dim=4, num_res_blocks=1),
    "wan2.2": replace(WAN22, base_dim=4, decoder_base_dim=4, num_res_blocks=1),
}
LATENTS = 8
CUTS = [[8], [1] * 8, [1, 2, 3, 2], [1, 7], [4, 4], [2, 1, 5]]

# Float64 sums of the same numbers, in an order that may depend on the number of frames.
BOUND = 1e-12


@pytest.fixture(params=NARROW)
def vae(request: pytest.FixtureRequest, random_model: Any) -> AutoencoderKLWan:
    model: AutoencoderKLWan = random_model(NARROW[request.param]).double()
    return model


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_decoding_in_chunks(vae: AutoencoderKLWan, cut: list[int]) -> None:
    z = latents(vae)
    whole = vae.decode(z).sample
    pieces = list(vae.decode_stream(z.split(cut, dim=2)))
    # A picture first, and then as much as came, in multiples of what a latent stands for.
    assert pieces[0].shape[2] == 1
    assert all(piece.shape[2] % 4 == 0 for piece in pieces[1:])
    assert relative_error(torch.cat(pieces, 2), whole) <= BOUND


@pytest.mark.parametrize("cut", [[29], [1] * 29, [1, 4, 24], [3, 5, 1, 20], [10, 19]], ids=str)
def test_encoding_in_chunks(vae: AutoencoderKLWan, cut: list[int]) -> None:
    x = video(vae)
    whole = vae.encode(x).latent_dist
    pieces = list(vae.encode_stream(x.split(cut, dim=2)))
    assert relative_error(torch.cat([each.mean for each in pieces], 2), whole.mean) <= BOUND
    assert relative_error(torch.cat([each.std for each in pieces], 2), whole.std) <= BOUND


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 100])
def test_any_number_of_latents_at_a_time(vae: AutoencoderKLWan, chunk: int) -> None:
    z, x = latents(vae), video(vae)
    plan = vae.plan_decode(z.shape, chunk=chunk)
    assert plan.chunk == min(chunk, LATENTS - 1)
    assert f"{plan.chunk} latent frames at a time" in str(plan)
    assert relative_error(vae.decode(z, plan=plan).sample, vae.decode(z).sample) <= BOUND
    encoded = vae.encode(x, plan=vae.plan_encode(x.shape, chunk=chunk)).latent_dist.mean
    assert relative_error(encoded, vae.encode(x).latent_dist.mean) <= BOUND


def test_later_frames_do_not_change_earlier_ones(vae: AutoencoderKLWan) -> None:
    z = latents(vae)
    changed = z.clone()
    changed[:, :, 3:] += 1
    ours, other = vae.decode(z).sample, vae.decode(changed).sample
    assert torch.equal(ours[:, :, :9], other[:, :, :9])
    assert not torch.equal(ours[:, :, 9], other[:, :, 9])


def test_interleaved_streams_do_not_see_each_other(vae: AutoencoderKLWan) -> None:
    one, other = latents(vae), latents(vae) + 1
    alone = [torch.cat(list(vae.decode_stream(each.split(2, 2))), 2) for each in (one, other)]
    first, second = (vae.decode_stream(each.split(2, 2)) for each in (one, other))
    together = list(zip(first, second, strict=True))
    for expected, pieces in zip(alone, zip(*together, strict=True), strict=True):
        assert torch.equal(torch.cat(pieces, 2), expected)


def test_an_exception_leaves_nothing_behind(vae: AutoencoderKLWan) -> None:
    z = latents(vae)
    whole = vae.decode(z).sample
    before = {name: value for name, value in vars(vae).items() if name != "_modules"}

    def broken() -> Iterator[Tensor]:
        yield z[:, :, :3]
        raise InterruptedError

    with pytest.raises(InterruptedError):
        list(vae.decode_stream(broken()))
    assert {name: value for name, value in vars(vae).items() if name != "_modules"} == before
    assert torch.equal(vae.decode(z).sample, whole)


def test_a_stream_is_lazy(vae: AutoencoderKLWan) -> None:
    z = latents(vae)
    read: list[int] = []

    def source() -> Iterator[Tensor]:
        for index in range(LATENTS):
            read.append(index)
            yield z[:, :, index : index + 1]

    stream = vae.decode_stream(source())
    assert read == []
    next(stream)
    assert read == [0]
    next(stream)
    assert read == [0, 1]


def test_an_image_is_the_first_frame(vae: AutoencoderKLWan) -> None:
    z, x = latents(vae), video(vae)
    assert vae.plan_decode(z[:, :, :1].shape).chunk is None
    assert relative_error(vae.decode(z[:, :, :1]).sample, vae.decode(z).sample[:, :, :1]) <= BOUND
    mean = vae.encode(x).latent_dist.mean[:, :, :1]
    assert relative_error(vae.encode(x[:, :, :1]).latent_dist.mean, mean) <= BOUND


def test_frames_that_fill_no_latent(vae: AutoencoderKLWan) -> None:
    x = video(vae)[:, :, :11]
    with pytest.raises(ShapeError, match=r"4k \+ 1.*pass 9 x .* or 13 x "):
        vae.encode(x)
    with pytest.raises(ShapeError, match="2 are left over, drop them or add 2"):
        list(vae.encode_stream(x.split(3, 2)))
    padded = vae.pad_to_valid(x)
    assert padded.shape[2] == 13
    assert vae.crop_to(padded, x.shape).shape == x.shape
    vae.config = replace(vae.config, illegal_sizes="official")
    dropped = vae.encode(x[:, :, :9]).latent_dist.mean
    assert torch.equal(vae.encode(x).latent_dist.mean, dropped)
    streamed = torch.cat([each.mean for each in vae.encode_stream(x.split(3, 2))], 2)
    assert relative_error(streamed, dropped) <= BOUND


def test_chunks_of_different_videos_are_refused(vae: AutoencoderKLWan) -> None:
    z = latents(vae)
    with pytest.raises(ShapeError, match="does not continue"):
        list(vae.decode_stream(itertools.chain(z.split(4, 2), [z[..., :1]])))
    with pytest.raises(ConfigError, match="chunk=0"):
        vae.plan_decode(z.shape, chunk=0)


def test_float16_that_overflows_goes_on_in_float32(vae: AutoencoderKLWan) -> None:
    half = vae.half()
    half.config = replace(half.config, fp16="retry")
    z = latents(half)
    half.decoder.conv_in.weight *= 1e5
    expected = half.float().decode(z.float()).sample
    half = half.half()
    with pytest.warns(UserWarning, match="goes on in float32"):
        pieces = list(half.decode_stream(z))
    assert all(piece.dtype == torch.float16 for piece in pieces)
    assert relative_error(torch.cat(pieces, 2), expected) < 1e-2


def latents(vae: AutoencoderKLWan) -> Tensor:
    return make_input("streaming", (1, vae.arch.z_dim, LATENTS, 2, 3), "latent").to(vae.dtype)


def video(vae: AutoencoderKLWan) -> Tensor:
    shape = vae.decoded_shape((1, vae.arch.z_dim, LATENTS, 2, 3))
    return make_input("streaming", shape, "video").to(vae.dtype)


def test_the_plan_says_which_convolutions_were_chosen() -> None:
    with torch.device("meta"):
        model = AutoencoderKLWan(VAEConfig(arch_config=WAN21))
    [note] = model.plan_decode((1, 16, 21, 60, 104)).notes
    assert note == "convolutions of 16, 96, 384 channels in 2-D over frames side by side"
