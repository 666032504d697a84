"""One answer however a video is cut in time, and no state outside the calls."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastvideo_vae_core.errors import ConfigError, ShapeError
from fastvideo_vae_core.testing.golden import make_input
from fastvideo_vae_core.testing.parity import relative_error
from fastvideo_vae_ltx2 import AutoencoderKLLTX2Video

LATENTS = 11
CUTS = [[1] * 11, [5, 0, 6]]

# Float64 sums of the same numbers, in an order that may depend on the number of frames.
BOUND = 1e-12


@pytest.fixture(params=["2.0", "2.3", "timed", "causal"])
def vae(request: pytest.FixtureRequest, random_model: Any) -> AutoencoderKLLTX2Video:
    model: AutoencoderKLLTX2Video = random_model(request.param).double()
    return model


@pytest.fixture
def late(random_model: Any) -> AutoencoderKLLTX2Video:
    model: AutoencoderKLLTX2Video = random_model("2.3").double()
    return model


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_decoding_in_chunks(vae: AutoencoderKLLTX2Video, cut: list[int]) -> None:
    z = latents(vae)
    pieces = list(vae.decode_stream(z.split(cut, dim=2)))
    assert all(piece.shape[2] for piece in pieces)
    assert relative_error(torch.cat(pieces, 2), vae.decode(z).sample) <= BOUND


@pytest.mark.parametrize("cut", [[33], [1] * 33, [3, 5, 1, 24]], ids=str)
def test_encoding_in_chunks(late: AutoencoderKLLTX2Video, cut: list[int]) -> None:
    x = make_input("streaming", (1, 3, 33, 64, 64), "video").double()
    whole, pieces = late.encode(x).latent_dist, list(late.encode_stream(x.split(cut, dim=2)))
    assert relative_error(torch.cat([each.mean for each in pieces], 2), whole.mean) <= BOUND
    assert relative_error(torch.cat([each.std for each in pieces], 2), whole.std) <= BOUND


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_any_number_of_latents_at_a_time(vae: AutoencoderKLLTX2Video, chunk: int) -> None:
    z = latents(vae)
    plan = vae.plan_decode(z.shape, chunk=chunk)
    assert plan.chunk == min(chunk, LATENTS)
    assert f"{plan.chunk} latent frames at a time" in str(plan)
    assert relative_error(vae.decode(z, plan=plan).sample, vae.decode(z).sample) <= BOUND
    x = make_input("streaming", (1, 3, 25, 32, 32), "video").double()
    encoded = vae.encode(x, plan=vae.plan_encode(x.shape, chunk=chunk)).latent_dist.mean
    assert relative_error(encoded, vae.encode(x).latent_dist.mean) <= BOUND


def test_frames_come_as_soon_as_they_are_final(late: AutoencoderKLLTX2Video) -> None:
    """What has been given before a latent came does not depend on it, and what has been held back does."""
    z = latents(late)
    given = 0
    for fed in (1, 8, 10):
        stream = late.decode_stream(piece for piece in itertools.chain(z[:, :, :fed].split(1, 2), stop()))
        given = sum(piece.shape[2] for piece in until_stopped(stream))
        changed = z.clone()
        changed[:, :, fed:] += 1.0
        same = (late.decode(z).sample == late.decode(changed).sample).all(dim=(0, 1, 3, 4))
        assert bool(same[:given].all())
        assert not bool(same[given])
    assert given > 0


def test_a_stream_is_lazy(late: AutoencoderKLLTX2Video) -> None:
    read: list[int] = []

    def source() -> Iterator[Tensor]:
        for index in range(40):
            read.append(index)
            yield latents(late)[:, :, :1]

    stream = late.decode_stream(source())
    assert read == []
    next(stream)
    assert len(read) < 15


def test_an_image_streams(vae: AutoencoderKLLTX2Video) -> None:
    z = latents(vae)[:, :, :1]
    assert vae.plan_decode(z.shape).chunk is None
    (piece,) = vae.decode_stream(z)
    assert relative_error(piece, vae.decode(z).sample) <= BOUND
    assert not list(vae.decode_stream([]))


def test_interleaved_streams_do_not_see_each_other(vae: AutoencoderKLLTX2Video) -> None:
    one, other = latents(vae), latents(vae) + 1
    alone = [torch.cat(list(vae.decode_stream(each.split(2, 2))), 2) for each in (one, other)]
    pairs = list(zip(*(vae.decode_stream(each.split(2, 2)) for each in (one, other)), strict=True))
    for expected, pieces in zip(alone, zip(*pairs, strict=True), strict=True):
        assert torch.equal(torch.cat(pieces, 2), expected)


def test_frames_that_fill_no_latent(late: AutoencoderKLLTX2Video) -> None:
    x = make_input("streaming", (1, 3, 19, 64, 64), "video").double()
    with pytest.raises(ShapeError, match=r"8k \+ 1.*pass 17 x .* or 25 x "):
        late.encode(x)
    with pytest.raises(ShapeError, match="2 are left over"):
        list(late.encode_stream(x.split(3, 2)))
    late.config = replace(late.config, illegal_sizes="official")
    dropped = late.encode(x[:, :, :17]).latent_dist.mean
    assert torch.equal(late.encode(x).latent_dist.mean, dropped)
    streamed = torch.cat([each.mean for each in late.encode_stream(x.split(3, 2))], 2)
    assert relative_error(streamed, dropped) <= BOUND


def test_what_cannot_be_reflected_is_refused(random_model: Any) -> None:
    vae = random_model("2.0")
    z = torch.zeros(1, 8, 2, 1, 3)
    for run in (vae.decode, lambda z: list(vae.decode_stream(z))):
        with pytest.raises(ShapeError, match=r"reflects pictures .* 64 x 64 pixels, or more"):
            run(z)
    assert vae.encode(torch.zeros(1, 3, 1, 32, 32)).latent_dist.mean.shape == (1, 8, 1, 1, 1)


def test_chunks_of_different_videos_are_refused(late: AutoencoderKLLTX2Video) -> None:
    z = latents(late)
    with pytest.raises(ShapeError, match="does not continue"):
        list(late.decode_stream(itertools.chain(z.split(7, 2), [z[..., :1]])))
    with pytest.raises(ConfigError, match="chunk=0"):
        late.plan_decode(z.shape, chunk=0)


def test_float16_that_overflows_goes_on_in_float32(late: AutoencoderKLLTX2Video) -> None:
    half = late.half()
    half.config = replace(half.config, fp16="retry")
    z = latents(half)
    half.decoder.conv_in.conv.weight.mul_(1e6).clamp_(-6e4, 6e4)
    expected = half.float().decode(z.float()).sample
    half = half.half()
    with pytest.warns(UserWarning, match="goes on in float32"):
        pieces = list(half.decode_stream(z))
    assert all(piece.dtype == torch.float16 for piece in pieces)
    assert relative_error(torch.cat(pieces, 2), expected) < 1e-2


class Stopped(Exception):
    """The source has nothing more for now."""


def stop() -> Iterator[Tensor]:
    raise Stopped
    yield


def until_stopped(stream: Iterator[Tensor]) -> list[Tensor]:
    pieces = []
    while True:
        try:
            pieces.append(next(stream))
        except Stopped:
            return pieces


def latents(vae: AutoencoderKLLTX2Video) -> Tensor:
    return make_input("streaming", (1, vae.arch.latent_channels, LATENTS, 2, 2), "latent").to(vae.dtype)
