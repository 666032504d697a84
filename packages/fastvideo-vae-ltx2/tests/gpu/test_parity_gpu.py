"""The published configurations at real sizes on a GPU, beside diffusers in the same process."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastvideo_vae_core.config import VAEArchConfig, VAEConfig
from fastvideo_vae_core.testing.golden import make_input
from fastvideo_vae_core.testing.parity import assert_close, relative_error
from fastvideo_vae_ltx2 import (
    LTX2_AUDIO,
    LTX20_VIDEO,
    LTX20_VOCODER,
    LTX23_VIDEO,
    LTX23_VOCODER,
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    LTX2Vocoder,
)

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
VIDEO = {"2.0": LTX20_VIDEO, "2.3": LTX23_VIDEO}
VOCODERS = {"2.0": LTX20_VOCODER, "2.3": LTX23_VOCODER}
# Grids of latents: 25 x 192 x 256; 121 x 512 x 768; 121 x 1088 x 1920.
SMALL, REAL, LARGE = (4, 6, 8), (16, 16, 24), (16, 34, 60)
# Five seconds of sound.
FRAMES = 501

Pair = tuple[Any, Any]


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """TF32 off, and the memory of one test given back before the next."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture
def pair(diffusers_twin: Any) -> Callable[[Any, VAEArchConfig, torch.dtype], Pair]:
    """Our model and diffusers' with the same random weights, which are drawn on the GPU, in a second."""

    def build(kind: Any, arch: VAEArchConfig, dtype: torch.dtype) -> Pair:
        torch.manual_seed(0)
        with torch.device(DEVICE):
            model = kind(VAEConfig(arch_config=arch)).eval().requires_grad_(False)
        for name, buffer in model.named_buffers():
            if name.endswith(("filter", "_basis")):
                buffer.uniform_(0.0, 2.0 / buffer.shape[-1])
        twin = diffusers_twin(model).to(DEVICE)
        return model.to(dtype), twin.to(dtype)

    return build


@pytest.mark.parametrize("variant", VIDEO)
def test_float32_equals_diffusers(pair: Any, variant: str) -> None:
    model, twin = pair(AutoencoderKLLTX2Video, VIDEO[variant], torch.float32)
    x, z = inputs(model, SMALL)
    reason = (1e-5, "float32 sums in another order")
    assert_close(model.encode(x).latent_dist.parameters, twin.encode(x).latent_dist.parameters, *reason)
    assert_close(model.decode(z).sample, twin.decode(z).sample, *reason)


@pytest.mark.parametrize("variant", VIDEO)
def test_every_way_gives_the_same(pair: Any, variant: str) -> None:
    model, _ = pair(AutoencoderKLLTX2Video, VIDEO[variant], torch.float32)
    x, z = inputs(model, SMALL)
    sample, mean = model.decode(z).sample, model.encode(x).latent_dist.mean
    for options in ({"chunk": 1}, {"chunk": 3}, {"tile": (x.shape[2], 96, 160)}):
        decoded = model.decode(z, plan=model.plan_decode(z.shape, **options)).sample
        encoded = model.encode(x, plan=model.plan_encode(x.shape, **options)).latent_dist.mean
        assert (decoded - sample).abs().max() <= 1e-5, options
        assert (encoded - mean).abs().max() <= 1e-5, options
    assert (torch.cat(list(model.decode_stream(z.split(1, 2))), 2) - sample).abs().max() <= 1e-5


@pytest.mark.parametrize("variant", VIDEO)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_no_further_from_float32_than_diffusers(pair: Any, variant: str, dtype: torch.dtype) -> None:
    model, twin = pair(AutoencoderKLLTX2Video, VIDEO[variant], torch.float32)
    x, z = inputs(model, SMALL)
    exact = twin.decode(z).sample, twin.encode(x).latent_dist.mean
    model, twin = model.to(dtype), twin.to(dtype)
    ours = model.decode(z).sample, model.encode(x).latent_dist.mean
    theirs = twin.decode(z.to(dtype)).sample, twin.encode(x.to(dtype)).latent_dist.mean
    streamed = torch.cat(list(model.decode_stream(z.split(1, 2))), 2)
    for reference, our, their in zip((*exact, exact[0]), (*ours, streamed), (*theirs, theirs[0]), strict=True):
        assert relative_error(our, reference) <= 1.05 * relative_error(their, reference)


@pytest.mark.parametrize(
    ("variant", "grid", "directions"),
    [("2.0", REAL, ("decode", "encode")), ("2.3", REAL, ("decode", "encode")), ("2.0", LARGE, ("decode",))],
    ids=str,
)
def test_faster_and_leaner_than_diffusers(
    pair: Any, variant: str, grid: tuple[int, ...], directions: tuple[str, ...]
) -> None:
    """bfloat16; the table of the package's README. Outputs are compared before times count."""
    model, twin = pair(AutoencoderKLLTX2Video, VIDEO[variant], torch.bfloat16)
    x, z = (each.bfloat16() for each in inputs(model, grid))
    runs: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
        "decode": (lambda: model.decode(z).sample, lambda: twin.decode(z).sample),
        "encode": (lambda: model.encode(x).latent_dist.mean, lambda: twin.encode(x).latent_dist.mean),
    }
    rows = []
    for name in directions:
        ours, theirs = runs[name]
        # Two bfloat16 computations, each some percent from the exact one.
        assert_close(ours(), theirs(), 5e-2, "bfloat16")
        (our_time, our_peak), (their_time, their_peak) = measured(ours, theirs)
        rows.append((name, our_time, our_peak, their_time, their_peak))
        print(
            f"\nLTX-{variant} {name} {tuple(x.shape[2:])}: {our_time:.0f} ms, {our_peak:.2f} GiB;"
            f" diffusers {their_time:.0f} ms, {their_peak:.2f} GiB"
        )
    for name, our_time, our_peak, their_time, their_peak in rows:
        assert our_time < their_time, name
        assert our_peak <= their_peak, name
        if name == "decode" and grid == LARGE:
            assert our_peak <= their_peak / 2
        if name == "decode" and grid == REAL and variant == "2.0" and "H100" in torch.cuda.get_device_name():
            assert our_time < 170


def test_sound_equals_diffusers(pair: Any) -> None:
    model, twin = pair(AutoencoderKLLTX2Audio, LTX2_AUDIO, torch.float32)
    mel = make_input("gpu", (1, 2, FRAMES, 64), "mel").to(DEVICE)
    reason = (1e-5, "float32 sums in another order")
    assert_close(model.encode(mel).latent_dist.parameters, twin.encode(mel).latent_dist.parameters, *reason)
    z = make_input("gpu", (1, 8, (FRAMES + 3) // 4, 16), "latent").to(DEVICE)
    assert_close(model.decode(z).sample, twin.decode(z).sample, *reason)
    exact = twin.decode(z).sample
    model, twin = model.bfloat16(), twin.bfloat16()
    ours, theirs = model.decode(z).sample, twin.decode(z.bfloat16()).sample
    assert relative_error(ours, exact) <= 1.05 * relative_error(theirs, exact)


@pytest.mark.parametrize("variant", VOCODERS)
def test_vocoders_equal_diffusers(pair: Any, variant: str) -> None:
    """The second one clamps its first stage, as the official code does; diffusers is told to. Its 16-bit weights are
    computed in float32, so it is compared with the same weights in float32."""
    model, twin = pair(LTX2Vocoder, VOCODERS[variant], torch.float32)
    mel = make_input("gpu", (1, 2, FRAMES, 64), "mel").to(DEVICE)
    if variant == "2.3":
        twin.vocoder.final_act_fn = "clamp"
    assert_close(model(mel), twin(mel), 2e-5, "float32 sums in another order, through a hundred layers")
    pieces = torch.cat(list(model.decode_stream(mel.split(100, 2))), 2)
    assert_close(pieces, model(mel), 1e-5, "the same numbers from pieces")
    (our_time, our_peak), (their_time, their_peak) = measured(lambda: model(mel), lambda: twin(mel))
    print(
        f"\nvocoder {variant}, {FRAMES} frames, float32: {our_time:.0f} ms, {our_peak:.2f} GiB;"
        f" diffusers {their_time:.0f} ms, {their_peak:.2f} GiB"
    )
    if variant == "2.3":
        rounded = {name: each.bfloat16().float() for name, each in twin.state_dict().items()}
        twin.load_state_dict(rounded, strict=True)
        twin.vocoder.final_act_fn = "clamp"
        made = model.bfloat16()(mel)
        assert made.dtype == torch.bfloat16
        assert_close(made, twin(mel.bfloat16().float()), 5e-3, "rounded to bfloat16 at the end, and only there")


def inputs(model: AutoencoderKLLTX2Video, grid: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """A video and latents, float32."""
    z = make_input("gpu", (1, model.arch.latent_channels, *grid), "latent")
    return make_input("gpu", model.decoded_shape(z.shape), "video").to(DEVICE), z.to(DEVICE)


def measured(*runs: Callable[[], Tensor]) -> list[tuple[float, float]]:
    """Milliseconds, the median of three interleaved runs, and peak memory in GiB above what rests between calls."""
    times: list[list[float]] = [[] for _ in runs]
    peaks = [0.0] * len(runs)
    for _ in range(3):
        for index, run in enumerate(runs):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            resting = torch.cuda.memory_allocated()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize()
            times[index].append(begin.elapsed_time(end))
            peaks[index] = (torch.cuda.max_memory_allocated() - resting) / 2**30
    return [(statistics.median(each), peak) for each, peak in zip(times, peaks, strict=True)]
