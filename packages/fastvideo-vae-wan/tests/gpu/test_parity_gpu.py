"""The published configurations at real sizes on a GPU, beside diffusers in the same process."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastvideo_vae_core.testing.golden import make_input
from fastvideo_vae_core.testing.parity import assert_close, relative_error
from fastvideo_vae_wan import WAN21, WAN22, AutoencoderKLWan

pytestmark = pytest.mark.gpu

ARCHITECTURES = {"wan2.1": WAN21, "wan2.2": WAN22}
# Variant and grid of latents: 17 frames, small; 81 x 480 x 832; 81 x 720 x 1280; 121 x 704 x 1280.
SMALL = [("wan2.1", (5, 15, 27)), ("wan2.2", (5, 11, 20))]
REAL = [("wan2.1", (21, 60, 104)), ("wan2.1", (21, 90, 160)), ("wan2.2", (31, 44, 80))]

Pair = tuple[AutoencoderKLWan, Any]


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
def pair(random_model: Any, diffusers_twin: Any) -> Callable[[str, torch.dtype], Pair]:
    """Our model and diffusers' with the same random weights, on the GPU."""

    def build(variant: str, dtype: torch.dtype) -> Pair:
        model = random_model(ARCHITECTURES[variant])
        twin = diffusers_twin(model)
        return model.to("cuda", dtype), twin.to("cuda", dtype)

    return build


@pytest.mark.parametrize(("variant", "grid"), SMALL, ids=str)
def test_float32_equals_diffusers(pair: Any, variant: str, grid: tuple[int, ...]) -> None:
    model, twin = pair(variant, torch.float32)
    x, z = inputs(model, grid)
    reason = (1e-5, "float32 sums in another order")
    assert_close(model.encode(x).latent_dist.parameters, twin.encode(x).latent_dist.parameters, *reason)
    assert_close(model.decode(z).sample, twin.decode(z).sample, *reason)


@pytest.mark.parametrize(("variant", "grid"), SMALL, ids=str)
def test_every_way_gives_the_same(pair: Any, variant: str, grid: tuple[int, ...]) -> None:
    model, _ = pair(variant, torch.float32)
    x, z = inputs(model, grid)
    sample, mean = model.decode(z).sample, model.encode(x).latent_dist.mean
    for options in ({"chunk": 1}, {"chunk": 3}, {"tile": (x.shape[2], 96, 160)}):
        decoded = model.decode(z, plan=model.plan_decode(z.shape, **options)).sample
        encoded = model.encode(x, plan=model.plan_encode(x.shape, **options)).latent_dist.mean
        assert (decoded - sample).abs().max() <= 1e-5, options
        assert (encoded - mean).abs().max() <= 1e-5, options
    assert (torch.cat(list(model.decode_stream(z.split(2, 2))), 2) - sample).abs().max() <= 1e-5


@pytest.mark.parametrize(("variant", "grid"), SMALL, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_no_further_from_float32_than_diffusers(
    pair: Any, variant: str, grid: tuple[int, ...], dtype: torch.dtype
) -> None:
    model, twin = pair(variant, torch.float32)
    x, z = inputs(model, grid)
    exact = twin.decode(z).sample, twin.encode(x).latent_dist.mean
    model, twin = model.to(dtype), twin.to(dtype)
    ours = model.decode(z).sample, model.encode(x).latent_dist.mean
    theirs = twin.decode(z.to(dtype)).sample, twin.encode(x.to(dtype)).latent_dist.mean
    for reference, our, their in zip(exact, ours, theirs, strict=True):
        assert relative_error(our, reference) <= 1.05 * relative_error(their, reference)


@pytest.mark.parametrize(("variant", "grid"), REAL, ids=str)
def test_faster_and_leaner_than_diffusers(pair: Any, variant: str, grid: tuple[int, ...]) -> None:
    """bfloat16; the table of the package's README. Outputs are compared before times count."""
    model, twin = pair(variant, torch.bfloat16)
    x, z = (each.bfloat16() for each in inputs(model, grid))
    rows = []
    for name, ours, theirs in (
        ("decode", lambda: model.decode(z).sample, lambda: twin.decode(z).sample),
        ("encode", lambda: model.encode(x).latent_dist.mean, lambda: twin.encode(x).latent_dist.mean),
    ):
        # Two bfloat16 computations, each some percent from the exact one.
        assert_close(ours(), theirs(), 5e-2, "bfloat16")
        (our_time, our_peak), (their_time, their_peak) = measured(ours, theirs)
        rows.append((name, our_time, our_peak, their_time, their_peak))
        print(
            f"\n{variant} {name} {tuple(x.shape[2:])}: {our_time:.0f} ms, {our_peak:.2f} GiB;"
            f" diffusers {their_time:.0f} ms, {their_peak:.2f} GiB"
        )
    for name, our_time, our_peak, their_time, their_peak in rows:
        assert our_time < their_time, name
        assert our_peak <= their_peak, name


def inputs(model: AutoencoderKLWan, grid: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """A video and latents, float32."""
    z = make_input("gpu", (1, model.arch.z_dim, *grid), "latent")
    return make_input("gpu", model.decoded_shape(z.shape), "video").cuda(), z.cuda()


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
