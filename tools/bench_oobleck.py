"""Which formulation of each layer of Oobleck is fastest on this GPU, and what the whole network makes of it.

Run from the repository's root; with `--small --device cpu` it rehearses. Every line stands alone: one that fails says
why, and the others go on. Times are medians between CUDA events of calls behind warm-up, in float16 unless said
otherwise. TFLOP/s are of useful work, TB/s of the fewest bytes that must move.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench_tools import Call, Options, busiest, cudnn_benchmark, error, run_parts
from fastvideo_vae_core.config import VAEConfig
from fastvideo_vae_core.graphs import Captured
from fastvideo_vae_core.ops.conv1d import conv1d, upsample1d
from fastvideo_vae_core.ops.kernels import snake as kernels
from fastvideo_vae_core.ops.snake import Snake, snake, snake_pointwise
from fastvideo_vae_core.ops.sums import Sum
from fastvideo_vae_core.testing.bench import Bench as Meter
from fastvideo_vae_core.tiling import spans
from fastvideo_vae_oobleck import STABLE_AUDIO_OPEN, AutoencoderOobleck, OobleckArchConfig, weight_norm_state_dict
from fastvideo_vae_oobleck import model as oobleck

# Width and samples of the stages of the decoder for 1024 latents; the encoder has the same.
STAGES = ((1024, 8192), (512, 65_536), (256, 262_144), (128, 1_048_576), (128, 2_097_152))
UPSAMPLINGS = (
    (2048, 1024, 8, 1024),
    (1024, 512, 8, 8192),
    (512, 256, 4, 65_536),
    (256, 128, 4, 262_144),
    (128, 128, 2, 1_048_576),
)

Layer = TypeVar("Layer", bound=nn.Module)


@dataclass(frozen=True)
class Bench:
    """Where it runs: the device, the type, seconds of measuring a variant, and a divisor of lengths and widths."""

    device: str
    dtype: torch.dtype
    seconds: float = 0.1
    shrink: int = 1

    @classmethod
    def of(cls, options: Options) -> Bench:
        dtype = torch.float16 if options.device == "cuda" else torch.float32
        return cls(options.device, dtype, shrink=1 << 12 if options.small else 1)

    @property
    def arch(self) -> OobleckArchConfig:
        if self.shrink == 1:
            return STABLE_AUDIO_OPEN
        return replace(STABLE_AUDIO_OPEN, encoder_hidden_size=8, decoder_channels=4, decoder_input_channels=4)

    def samples(self, count: int) -> int:
        return max(count // self.shrink, 64)

    def width(self, channels: int) -> int:
        return channels // min(self.shrink, 16)

    def placed(self, layer: Layer) -> Layer:
        return layer.to(self.device, self.dtype)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype)

    def grids(self, width: int, samples: int) -> tuple[Tensor, Tensor]:
        """A plain and a channels-last grid (1, width, samples)."""
        plain = self.normal(1, width, samples)
        return plain, last_of(plain)

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def ms(self, run: Call, seconds: float | None = None) -> float:
        """Median milliseconds of a call, or NaN where it fails.

        Calls follow each other without a wait between, so that short kernels are not measured with their launches.
        """
        try:
            for _ in range(2):
                run()
            self.synchronize()
            begin = time.perf_counter()
            run()
            self.synchronize()
            once = max(time.perf_counter() - begin, 1e-6)
            if self.device != "cuda":
                return 1000 * once
            count = max(min(int((seconds or self.seconds) / once), 50), 3)
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
            marks[0].record()
            for mark in marks[1:]:
                run()
                mark.record()
            torch.cuda.synchronize()
            return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks))
        except Exception as error:
            print(f"   ! {error!r}"[:200])
            self.synchronize()
            return math.nan


def main() -> None:
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    sections = (network, convolutions, pointwise, resampling, ends, snakes)
    run_parts(__doc__, {section.__name__: partial(measured, section) for section in sections})


def measured(section: Callable[[Bench], None], options: Options) -> None:
    section(Bench.of(options))


# -------------------------------------------------------------------- layers


def convolutions(bench: Bench) -> None:
    """Seven taps, dilated, each way."""
    header("width x samples, dilation: TFLOP/s", ("conv1d", "2d BC1S", "2d BCS1", "2d folded", "2d BC1S tuned"))
    for (width, samples), dilation in itertools.product(STAGES, (1, 3, 9)):
        convolution(bench, bench.width(width), bench.samples(samples), dilation)


def convolution(bench: Bench, width: int, samples: int, dilation: int) -> None:
    weight = bench.placed(nn.Conv1d(width, width, 7)).weight
    plain, last = bench.grids(width, samples)
    row, column = (last_of_2d(weight.unsqueeze(axis)) for axis in (2, 3))
    pad, flat, tall = 3 * dilation, last.unsqueeze(2), last.unsqueeze(3)
    # Without dilation, on a grid that is `dilation` wide: the same numbers where samples divide by it.
    whole = last[..., : samples // dilation * dilation].transpose(1, 2)
    folded = whole.reshape(1, -1, dilation, width).permute(0, 3, 1, 2)

    def flat_run() -> Tensor:
        return F.conv2d(flat, row, None, 1, (0, pad), (1, dilation))

    runs: list[Call] = [
        lambda: F.conv1d(plain, weight, None, 1, pad, dilation),
        flat_run,
        lambda: F.conv2d(tall, column, None, 1, (pad, 0), (dilation, 1)),
        lambda: F.conv2d(folded, column, None, 1, (3, 0)),
        tuned(flat_run),
    ]
    work = 2 * 7 * width * width * samples
    line(f"{width} x {samples}, {dilation}", [rate(bench.ms(run), work / 1e9, 0) for run in runs])


def pointwise(bench: Bench) -> None:
    """Snake, one tap and residual, in three kernels and in one, and the convolution alone."""
    header("width x samples: ms", ("separate", "fused", "conv2d alone", "matmul alone", "conv1d alone"))
    for width, samples in STAGES:
        one_tap(bench, bench.width(width), bench.samples(samples))
    print("   the fused kernel by tile and step, ms:")
    for width, samples in ((128, 2_097_152), (256, 262_144)):
        tiles(bench, width, bench.samples(samples))


def one_tap(bench: Bench, width: int, samples: int) -> None:
    act = bench.placed(Snake(width))
    conv = bench.placed(nn.Conv1d(width, width, 1))
    plain, last = bench.grids(width, samples)
    skip, bias = torch.randn_like(last), bench.normal(width)
    runs: list[Call] = [
        lambda: act.fork(conv1d(act(Sum(last, bias=bias)), conv)._replace(branch=skip))[0],
        lambda: snake_pointwise(Sum(last, bias=bias), act, conv, skip),
        lambda: F.conv2d(last.unsqueeze(2), conv.weight.unsqueeze(2)),
        lambda: last.transpose(1, 2)[0] @ conv.weight[:, :, 0].T,
        lambda: F.conv1d(plain, conv.weight),
    ]
    line(f"{width} x {samples}", [number(bench.ms(run), 3) for run in runs])


def tiles(bench: Bench, width: int, samples: int) -> None:
    act = bench.placed(Snake(width))
    conv = bench.placed(nn.Conv1d(width, width, 1))
    _, last = bench.grids(width, samples)
    found = []
    for sizes in ((64, 32), (64, 64), (64, 128), (128, 32), (128, 64), (128, 128), (256, 32), (256, 64)):
        with mock.patch.dict(kernels._POINTWISE, {width: sizes}):
            ms = bench.ms(lambda: snake_pointwise(Sum(last, bias=conv.bias), act, conv, last))
        found.append(f"{sizes[0]}/{sizes[1]} {number(ms, 3)}")
    print(f"   {width} x {samples}: " + "  ".join(found), flush=True)


def resampling(bench: Bench) -> None:
    """Transposed and strided convolutions, each way; `two taps` packs its weights in every call."""
    header("upsample: TFLOP/s", ("transposed 1d", "transposed 2d", "two taps", "taps packed"))
    for before, after, stride, samples in UPSAMPLINGS:
        up(bench, bench.width(before), bench.width(after), stride, bench.samples(samples))
    header("downsample: TFLOP/s", ("conv1d", "2d strided", "2d strided tuned", "two taps"))
    for after, before, stride, samples in UPSAMPLINGS:
        down(bench, bench.width(before), bench.width(after), stride, bench.samples(samples))


def up(bench: Bench, before: int, after: int, stride: int, samples: int) -> None:
    pad = math.ceil(stride / 2)
    conv = bench.placed(nn.ConvTranspose1d(before, after, 2 * stride, stride, pad))
    plain, last = bench.grids(before, samples)
    flat, weight = last.unsqueeze(2), last_of_2d(conv.weight.unsqueeze(2))
    later, earlier = conv.weight.split(stride, dim=2)
    packed = torch.stack([earlier, later], dim=2).permute(3, 1, 2, 0).flatten(0, 1).contiguous()
    taps = packed.transpose(1, 2).unsqueeze(2)
    runs: list[Call] = [
        lambda: F.conv_transpose1d(plain, conv.weight, None, stride, pad),
        lambda: F.conv_transpose2d(flat, weight, None, (1, stride), (0, pad)),
        lambda: upsample1d(last, conv),
        lambda: F.conv2d(flat, taps, None, padding=(0, 1)),
    ]
    work = 2 * 2 * stride * before * after * samples
    line(f"{before}->{after} s{stride} x {samples}", [rate(bench.ms(run), work / 1e9, 0) for run in runs])


def down(bench: Bench, before: int, after: int, stride: int, shorter: int) -> None:
    pad, samples = math.ceil(stride / 2), shorter * stride
    conv = bench.placed(nn.Conv1d(before, after, 2 * stride, stride, pad))
    plain, last = bench.grids(before, samples)
    flat, weight = last.unsqueeze(2), last_of_2d(conv.weight.unsqueeze(2))
    padded = F.pad(last.transpose(1, 2), (0, 0, pad, pad)).reshape(1, -1, stride * before).transpose(1, 2).unsqueeze(2)
    taps = conv.weight.unflatten(2, (2, stride)).permute(0, 2, 3, 1).flatten(2, 3).contiguous().transpose(1, 2)

    def strided() -> Tensor:
        return F.conv2d(flat, weight, None, (1, stride), (0, pad))

    runs: list[Call] = [
        lambda: F.conv1d(plain, conv.weight, None, stride, pad),
        strided,
        tuned(strided),
        lambda: F.conv2d(padded, taps.unsqueeze(2)),
    ]
    work = 2 * 2 * stride * before * after * shorter
    line(f"{before}->{after} s{stride} x {samples}", [rate(bench.ms(run), work / 1e9, 0) for run in runs])


def ends(bench: Bench) -> None:
    """The first and last convolutions, of two channels at the full rate."""
    header("layer: ms", ("conv1d", "2d", "2d, 8 channels", "matmul of taps"))
    end(bench, "first, encoder", 2, bench.width(128), bench.samples(2_097_152))
    end(bench, "last, decoder", bench.width(128), 2, bench.samples(2_097_152))


def end(bench: Bench, name: str, before: int, after: int, samples: int) -> None:
    conv = bench.placed(nn.Conv1d(before, after, 7, padding=3, bias=False))
    plain, last = bench.grids(before, samples)
    rows, weight = last.transpose(1, 2)[0], last_of_2d(conv.weight.unsqueeze(2))
    # More channels, which are zero or thrown away, so that tensor cores take them.
    wide = torch.zeros(max(after, 8), max(before, 8), 1, 7, device=bench.device, dtype=bench.dtype)
    wide[:after, :before] = weight
    wide = last_of_2d(wide)
    taps = conv.weight.permute(1, 2, 0).flatten(1).contiguous()

    def padded() -> Tensor:
        x = F.pad(rows, (0, wide.shape[1] - before)) if before < 8 else rows
        return F.conv2d(x.T[None, :, None], wide, None, padding=(0, 3))[:, :after]

    def by_taps() -> Tensor:
        if before < after:
            return F.pad(rows, (0, 0, 3, 3)).unfold(0, 7, 1).flatten(1) @ conv.weight.flatten(1).T
        made = F.pad(rows @ taps, (0, 0, 3, 3)).unfold(0, samples, 1)
        return torch.stack([made[k, k * after : (k + 1) * after] for k in range(7)]).sum(0)

    runs: list[Call] = [
        lambda: F.conv1d(plain, conv.weight, None, padding=3),
        lambda: F.conv2d(last.unsqueeze(2), weight, None, padding=(0, 3)),
        padded,
        by_taps,
    ]
    line(name, [number(bench.ms(run), 3) for run in runs])


def snakes(bench: Bench) -> None:
    """Snake alone, with a bias, and with a sum that is kept; then by tile and warps."""
    header("width x samples: TB/s", ("definition", "one pass", "sum kept", "1d layout"))
    for width, samples in STAGES[2:]:
        one_snake(bench, bench.width(width), bench.samples(samples))
    act = bench.placed(Snake(128))
    _, last = bench.grids(128, bench.samples(2_097_152))
    branch, bias = torch.randn_like(last), bench.normal(128)
    runs: list[tuple[str, int, Call]] = [
        ("one pass", 2, lambda: act(Sum(last, bias=bias))),
        ("sum kept", 4, lambda: act.fork(Sum(last, branch, bias))),
    ]
    for name, passes, run in runs:
        found = []
        for tile, warps in itertools.product((2048, 4096, 8192, 16_384), (4, 8, 16)):
            with mock.patch.multiple(kernels, _TILE=tile, _WARPS=warps):
                found.append(f"{tile}/{warps} {rate(bench.ms(run, bench.seconds / 2), passes * last.nbytes / 1e9, 2)}")
        print(f"   {name}, tile/warps TB/s: " + "  ".join(found), flush=True)


def one_snake(bench: Bench, width: int, samples: int) -> None:
    act = bench.placed(Snake(width))
    plain, last = bench.grids(width, samples)
    branch, bias = torch.randn_like(last), bench.normal(width)
    runs: list[tuple[int, Call]] = [
        (2, lambda: snake(last, act.alpha, act.beta)),
        (2, lambda: act(Sum(last, bias=bias))),
        (4, lambda: act.fork(Sum(last, branch, bias))),
        (2, lambda: act(Sum(plain, bias=bias))),
    ]
    line(f"{width} x {samples}", [rate(bench.ms(run), passes * last.nbytes / 1e9, 2) for passes, run in runs])


# -------------------------------------------------------------------- the network


def network(bench: Bench) -> None:
    """Whole halves beside diffusers at three lengths; then variants, accuracy and the kernels that take the time."""
    ours = random_model(bench)
    theirs = reference_of(bench, ours)
    print(f"   {'':<44}{'decode ms':>10}{'GiB':>7}{'encode ms':>11}{'GiB':>7}")
    for latents in (1024, 215, 22):
        z, x = examples(bench, latents)
        name = f"{latents / 21.53:.1f} s"
        if theirs is not None:
            calls(bench, f"{name}, diffusers", theirs, z, x)
        calls(bench, f"{name}, ours", ours, z, x)
        graphs(bench, f"{name}, ours as a graph", ours, z, x)
    z, x = examples(bench, 1024)
    with cudnn_benchmark(True):
        calls(bench, "ours, cuDNN tuned", ours, z, x)
        graphs(bench, "graph, cuDNN tuned", ours, z, x)
    for names in ((), (128,), (256,)):
        only = {width: kernels._POINTWISE[width] for width in names}
        with mock.patch.object(kernels, "_POINTWISE", only):
            graphs(bench, f"graph, pointwise fused for {names or 'none'}", ours, z, x)
    for mebibytes in (16, 32, 64, 128):
        with in_pieces(mebibytes << 19):
            graphs(bench, f"graph, stages in pieces of {mebibytes} MiB", ours, z, x)
    accuracy(bench, ours, theirs)
    for name, run in (("decode", lambda: ours.decode(z)), ("encode", lambda: ours.encode(x))):
        with standing_alone(f"kernels of {name}"):
            busiest(name, run, most=14)
    z, x = z.float(), x.float()
    if theirs is not None:
        calls(bench, "diffusers, float32", theirs.float(), z, x)
    calls(bench, "ours, float32", ours.float(), z, x)


def random_model(bench: Bench) -> AutoencoderOobleck:
    """The published configuration with weights that keep signals near unit size."""
    with torch.device(bench.device):
        model = AutoencoderOobleck(VAEConfig(arch_config=bench.arch, fp16="off"))
    for name, each in model.named_parameters():
        leaf = name.rpartition(".")[2]
        deviation = {"bias": 0.05, "weight": 0.7 / math.sqrt(each[0].numel())}.get(leaf, 0.1)
        if "conv_t1.weight" in name:
            # Every output sees two taps of every input channel.
            deviation = 1.2 / math.sqrt(2 * each.shape[0])
        elif "conv2.weight" in name:
            deviation = 0.4 / math.sqrt(each[0].numel())
        each.copy_(torch.randn_like(each) * deviation)
    return model.to(bench.dtype).eval().requires_grad_(False)


def reference_of(bench: Bench, model: AutoencoderOobleck) -> Any:
    """diffusers' model with the same weights, or None where there is no diffusers."""
    try:
        import diffusers

        reference: Any = diffusers.AutoencoderOobleck
    except Exception as error:
        print(f"   no diffusers: {error!r}"[:200])
        return None
    fields = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in bench.arch.to_dict().items()
        if name != "scaling_factor"
    }
    with torch.device(bench.device):
        made = reference(**fields).eval().requires_grad_(False)
    made.load_state_dict(weight_norm_state_dict(model))
    return made.to(bench.dtype)


def examples(bench: Bench, latents: int) -> tuple[Tensor, Tensor]:
    latents = max(latents // bench.shrink, 3)
    z = bench.normal(1, bench.arch.decoder_input_channels, latents)
    x = bench.normal(1, 2, 2048 * latents).mul_(0.3).clamp_(-1, 1)
    return z, x


def calls(bench: Bench, name: str, model: Any, z: Tensor, x: Tensor) -> None:
    """Times and peaks of memory beyond the weights, of decode and encode."""
    runs: list[Call] = [lambda: model.decode(z), lambda: model.encode(x)]
    meter, text = Meter(torch.device(bench.device)), ""
    for width, run in zip((10, 11), runs, strict=True):
        ms, gib = bench.ms(run, 3 * bench.seconds), math.nan
        with standing_alone(name):
            gib, _ = meter.memory(run, 0)
        text += f"{number(ms, 2):>{width}}{number(gib, 2):>7}"
    print(f"   {name:<44}{text}", flush=True)


def graphs(bench: Bench, name: str, model: AutoencoderOobleck, z: Tensor, x: Tensor) -> None:
    """Times of decode and encode as CUDA graphs; on a CPU of what they would capture."""
    text = ""
    for width, grid, plan in ((10, z, model.plan_decode(z.shape)), (18, x, model.plan_encode(x.shape))):
        ms = math.nan
        with standing_alone(name):
            if bench.device == "cuda":
                ms = bench.ms(partial(Captured(model, plan), grid), 3 * bench.seconds)
            else:
                ms = bench.ms(partial(model._run, plan.direction, grid, plan))
        bench.synchronize()
        text += f"{number(ms, 2):>{width}}"
    print(f"   {name:<44}{text}", flush=True)


def accuracy(bench: Bench, ours: AutoencoderOobleck, theirs: Any) -> None:
    """Distance to float64 with the same weights, of a quarter of the length."""
    with standing_alone("accuracy"):
        z, x = examples(bench, 256)
        with torch.device(bench.device):
            exact = AutoencoderOobleck(ours.config).double().eval().requires_grad_(False)
        exact.load_state_dict({name: each.double() for name, each in ours.state_dict().items()})
        references = exact.decode(z.double()).sample, exact.encode(x.double()).latent_dist.parameters
        for name, model in (("diffusers", theirs), ("ours", ours)):
            if model is not None:
                made = model.decode(z).sample, model.encode(x).latent_dist.parameters
                errors = [error(a, b) for a, b in zip(made, references, strict=True)]
                print(f"   {name}: distance to float64, decode {errors[0]:.2e}, encode {errors[1]:.2e}", flush=True)


@contextmanager
def in_pieces(numbers: int) -> Iterator[None]:
    """Stage by stage in pieces that fit the cache of a GPU, as on a CPU."""

    def forward(half: oobleck.Half, x: Tensor) -> Tensor:
        block: Any
        for index, block in enumerate(half.block):
            x, axis = last_of(x), oobleck._reach(partial(half._stage_needs, index), [block.axis])
            size, made = axis.output_size(x.shape[2]), None
            for start, stop in spans(size, max(numbers // (block.width * axis.down), 1)):
                first, last = axis.needs(start, stop, x.shape[2])
                skip = start - axis.position(first)
                piece = half._stage(index, Sum(x[..., first:last])).value()[..., skip : skip + stop - start]
                if made is None:
                    made = last_of(piece.new_empty(*piece.shape[:2], size))
                made[..., start:stop] = piece
            assert made is not None
            x = made
        return x.contiguous()

    with mock.patch.object(oobleck.Half, "forward", forward):
        yield


# -------------------------------------------------------------------- parts


@contextmanager
def standing_alone(name: str) -> Iterator[None]:
    """What fails says so, and what comes after it goes on."""
    try:
        yield
    except Exception as failure:
        print(f"   ! {name}: {failure!r}"[:300])


def tuned(run: Call) -> Call:
    def run_tuned() -> object:
        with cudnn_benchmark(True):
            return run()

    return run_tuned


def last_of(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def last_of_2d(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def header(what: str, names: Sequence[str]) -> None:
    print(f"   {what:<36}" + "".join(f"{name:>18}" for name in names))


def line(what: str, cells: Sequence[str]) -> None:
    print(f"   {what:<36}" + "".join(f"{cell:>18}" for cell in cells), flush=True)


def rate(ms: float, work: float, digits: int) -> str:
    """Work of 1e9 in milliseconds is work of 1e12 in a second."""
    return number(work / ms, digits)


def number(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


if __name__ == "__main__":
    main()
