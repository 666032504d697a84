"""The vocoders: pieces, streams, sizes, types. Their numbers are in test_parity.py."""

from __future__ import annotations

import collections
import importlib.util
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastvideo_vae_core as fvae
from fastvideo_vae_core.config import VAEConfig
from fastvideo_vae_core.ops import conv1d as ops
from fastvideo_vae_core.ops.sums import Sum
from fastvideo_vae_core.rehearsal import rehearsing
from fastvideo_vae_core.testing.golden import make_input
from fastvideo_vae_core.testing.graphs import captured_on_cpu, without_a_gpu
from fastvideo_vae_core.testing.parity import assert_close, relative_error
from fastvideo_vae_ltx2 import LTX20_VOCODER, LTX23_VOCODER, LTX2Vocoder
from fastvideo_vae_ltx2 import vocoder as network

FRAMES = 70


@pytest.fixture(params=["vocoder 2.0", "vocoder 2.3"])
def vocoder(request: pytest.FixtureRequest, random_model: Any) -> LTX2Vocoder:
    model: LTX2Vocoder = random_model(request.param)
    return model


def spectrogram(frames: int = FRAMES, batch: int = 1) -> torch.Tensor:
    return make_input("vocoder", (batch, 2, frames, 16), "mel")


@pytest.mark.parametrize("cut", [[FRAMES], [1, 30, 39]], ids=str)
def test_a_stream_equals_one_call(vocoder: LTX2Vocoder, cut: list[int]) -> None:
    vocoder, mel = vocoder.double(), spectrogram().double()
    pieces = list(vocoder.decode_stream(mel.split(cut, 2)))
    assert relative_error(torch.cat(pieces, 2), vocoder(mel)) <= 1e-12


@pytest.mark.parametrize("frames", [40, 100])
def test_pieces_equal_one_call(vocoder: LTX2Vocoder, frames: int) -> None:
    vocoder, mel = vocoder.double(), spectrogram(batch=2).double()
    plan = vocoder.plan_decode(mel.shape, tile=(frames * vocoder.hop_length,))
    assert relative_error(vocoder.decode(mel, plan=plan).sample, vocoder(mel)) <= 1e-12


def test_nothing_reaches_further_than_the_context(vocoder: LTX2Vocoder) -> None:
    """A change of one frame changes nothing beyond what the context says."""
    vocoder, mel = vocoder.double(), spectrogram(130).double()
    (axis,) = vocoder.decode_steps()[0].axes
    changed, at = mel.clone(), 65
    changed[:, :, at] += 1.0
    where = (vocoder(mel) != vocoder(changed)).any(1)[0].nonzero()[:, 0]
    first, last = int(where[0]) // vocoder.hop_length, int(where[-1]) // vocoder.hop_length
    assert at - axis.after <= first < at < last <= at + axis.before
    # The outermost taps of the filters of 2.3 are too small to show through forty layers.
    if vocoder.arch.extension is None:
        assert first - (at - axis.after) <= 2
        assert at + axis.before - last <= 2


def test_no_convolution_in_16_bits_on_a_gpu_copies_a_grid_into_the_plain_layout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where neither operand's strides are those of channels-last, PyTorch copies both, to where cuDNN is slower too."""
    placed = type("Placed", (LTX2Vocoder,), {"device": torch.device("cuda")})
    with torch.device("meta"), rehearsing(torch.device("cuda")):
        vocoder = placed(VAEConfig(arch_config=LTX20_VOCODER)).to(torch.bfloat16)
    layouts = collections.Counter[bool]()
    convolve = torch.nn.functional.conv2d

    def conv2d(x: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
        suggested = {torch._prims_common.suggest_memory_format(each) for each in (x, weight)}
        layouts[torch.channels_last in suggested] += 1
        return convolve(x, weight, *rest)

    monkeypatch.setattr(torch.nn.functional, "conv2d", conv2d)
    assert vocoder.plan_decode((1, 2, 501, 64)).peak_bytes
    assert layouts[True] > 90
    assert not layouts[False]


def test_the_layout_of_gpus_gives_the_same(vocoder: LTX2Vocoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Channels innermost, dilations as rows, transposed convolutions as convolutions; all on the CPU here."""
    vocoder, mel = vocoder.double(), spectrogram(batch=2).double()
    expected = vocoder(mel)
    innermost = []

    def dilated(x: torch.Tensor, conv: torch.nn.Conv1d, samples: int) -> Sum:
        innermost.append(x.stride(1) == 1)
        return Sum(ops._folded(x, conv, samples), bias=conv.bias)

    monkeypatch.setattr(network, "arrange", lambda x: x.mT.contiguous().mT)
    monkeypatch.setattr(network, "dilated1d", dilated)
    monkeypatch.setattr(network, "upsample1d", lambda x, conv: Sum(ops._interleaved(x, conv), bias=conv.bias))
    assert relative_error(vocoder(mel), expected) <= 1e-12
    assert len(innermost) > 6


def test_sizes(vocoder: LTX2Vocoder) -> None:
    for frames in (1, 2, 9):
        mel = spectrogram(frames, batch=2)
        assert vocoder(mel).shape == vocoder.decoded_shape(mel.shape) == (2, 2, frames * vocoder.hop_length)
    for wrong in (mel[:, :1], mel[..., :3], mel[0], mel[:0], mel[:, :, :0]):
        with pytest.raises(fvae.ShapeError):
            vocoder(wrong)
    assert torch.equal(vocoder.decode(mel).sample, vocoder.decode(mel, return_dict=False)[0])


def test_a_graph_takes_what_decode_takes(vocoder: LTX2Vocoder) -> None:
    """Spectrograms, though plans are for frames of all their numbers."""
    mel = spectrogram(9)
    captured = captured_on_cpu(vocoder, vocoder.plan_decode(mel.shape))
    with without_a_gpu():
        made = captured(mel).sample
        assert torch.equal(captured(vocoder._as_planned(mel)).sample, made)
        with pytest.raises(fvae.ConfigError, match="make a new one"):
            captured(mel[:, :, 1:])
        with pytest.raises(fvae.ShapeError, match="a vocoder takes"):
            captured(mel[..., 1:])
    assert torch.equal(made, vocoder(mel))


def test_published_rates() -> None:
    with torch.device("meta"):
        plain, extended = (LTX2Vocoder(VAEConfig(arch_config=arch)) for arch in (LTX20_VOCODER, LTX23_VOCODER))
    assert (plain.sampling_rate, plain.hop_length) == (24_000, 240)
    assert (extended.sampling_rate, extended.hop_length) == (48_000, 480)
    assert extended.config.output_sampling_rate == 48_000
    assert extended.plan_decode((1, 2, 2048, 64)).mode == "whole"
    assert extended.plan_decode((1, 2, 2049, 64)).tile == (1024 * 480,)
    pieces = extended.plan_decode((1, 2, 2000, 64), tile=(480_000,))
    assert pieces.peak_bytes < extended.plan_decode((1, 2, 2000, 64)).peak_bytes


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="this machine has no Triton")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_call_on_a_gpu_launches_little(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """LTX-2.0's network is many small kernels: a call costs what it costs the CPU to launch them."""
    from fastvideo_vae_core.ops.kernels import antialiased as kernels

    launches, launch = [], kernels.leaky

    def counted(*args: Any, **options: Any) -> Any:
        launches.append(options["mean"])
        return launch(*args, **options)

    monkeypatch.setattr(kernels, "leaky", counted)
    with rehearsing(torch.device("cuda")), torch.no_grad(), Counter() as counter:
        with torch.device("meta"):
            vocoder = LTX2Vocoder(VAEConfig(arch_config=LTX20_VOCODER)).to(dtype)
        counter.operations.clear()
        vocoder._decode(torch.empty(1, 128, 501, dtype=dtype, device="meta"))
    # Of each of five stages: before it, at its start, and two for each dilation but the last, which has one.
    assert len(launches) == 5 * (1 + 1 + 5) + 1
    assert counter.operations["aten.convolution.default"] == 2 + 5 + 5 * 3 * 3 * 2
    assert counter.operations.total() <= (360 if dtype == torch.bfloat16 else 150)


class Counter(TorchDispatchMode):
    """Counts operations, and gives convolutions the layout that they have on a GPU."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations = collections.Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations[str(func)] += 1
        made = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default and made.ndim == 4:
            made = torch.empty_like(made, memory_format=torch.channels_last)
        return made


def test_weights_for_gpus_lie_in_rows_of_channels() -> None:
    with rehearsing(torch.device("cuda")):
        with torch.device("meta"):
            vocoder = LTX2Vocoder(VAEConfig(arch_config=LTX20_VOCODER)).bfloat16()
        for upsampler in vocoder.upsamplers:
            assert upsampler.weight.permute(2, 1, 0).is_contiguous()
        assert all(upsampler.weight.is_contiguous() for upsampler in vocoder.float().upsamplers)


def test_there_is_no_way_back(vocoder: LTX2Vocoder) -> None:
    sound = torch.zeros(1, 2, vocoder.hop_length)
    for run in (vocoder.encode, lambda x: vocoder.plan_encode(x.shape), lambda x: list(vocoder.encode_stream(x))):
        with pytest.raises(fvae.ConfigError, match="has a decoder only"):
            run(sound)
    with pytest.raises(fvae.ConfigError, match="has a decoder only"):
        LTX2Vocoder(replace(vocoder.config, load_encoder=True, load_decoder=False))
    with pytest.raises(fvae.ConfigError, match="pieces along time"):
        vocoder.enable_tiling()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_extended_sound_is_computed_in_float32(random_model: Any, dtype: torch.dtype) -> None:
    """With the weights as they are stored, whatever the policy for float16, unless it is off."""
    vocoder, mel = random_model("vocoder 2.3").to(dtype), spectrogram(9).to(dtype)
    assert vocoder.plan_decode(mel.shape).dtype == torch.float32
    made = vocoder(mel)
    assert made.dtype == dtype
    assert torch.equal(torch.cat(list(vocoder.decode_stream(mel)), 2), made)
    exact = vocoder.float()(mel.float())
    assert torch.equal(made, exact.to(dtype))
    vocoder = vocoder.to(dtype)
    vocoder.config = replace(vocoder.config, fp16="off")
    assert vocoder.plan_decode(mel.shape).dtype == dtype
    assert relative_error(vocoder(mel), exact) > 2 * relative_error(made, exact)


def test_saturated_sound_stays_within_its_range(random_model: Any) -> None:
    vocoder = random_model("vocoder 2.3")
    vocoder.vocoder.conv_out.weight.mul_(20.0)
    made = vocoder(spectrogram())
    assert float(made.abs().max()) == 1.0


def test_gradients_reach_every_parameter(random_model: Any) -> None:
    for name in ("vocoder 2.0", "vocoder 2.3"):
        vocoder = random_model(name).train().requires_grad_(True)
        vocoder(spectrogram(3)).square().mean().backward()
        assert not [key for key, each in vocoder.named_parameters() if each.grad is None or not bool(each.grad.any())]


def test_state_round_trip(vocoder: LTX2Vocoder) -> None:
    other = LTX2Vocoder(vocoder.config)
    other.load_state_dict(vocoder.state_dict(), strict=True)
    assert_close(other.eval()(spectrogram(3)), vocoder(spectrogram(3)), 0.0, "the same weights")
