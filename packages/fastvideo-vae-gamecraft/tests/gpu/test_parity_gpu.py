"""The published network at real sizes on a GPU: accuracy, time and memory beside diffusers in one process.

At the end one markdown table is printed, for the package's README, and written to $PARITY_TABLE if that is set. The
same code runs on every machine as a rehearsal with a tiny network on the CPU, whose numbers are thrown away.
"""

from __future__ import annotations

import gc
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastvideo_vae_core.config import VAEConfig
from fastvideo_vae_core.plan import Direction, Plan
from fastvideo_vae_core.testing.golden import fill, make_input
from fastvideo_vae_core.testing.parity import assert_close, relative_error
from fastvideo_vae_core.testing.threads import single_thread
from fastvideo_vae_gamecraft import (
    DIFFUSERS,
    HUNYUANVIDEO,
    OFFICIAL,
    AutoencoderKLHunyuanVideo,
    Blend,
    HunyuanVideoArchConfig,
)

diffusers = pytest.importorskip("diffusers", reason="this machine has no diffusers to compare with")

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DIRECTIONS: tuple[Direction, ...] = ("decode", "encode")
GIB = 2**30

# float32 without TF32 against float64: sums over a few thousand terms through some sixty layers.
FP32_BOUND = 1e-5
# In 16 bits we may be as far from float32 as diffusers is, and a little luck.
SIXTEEN_BIT_SLACK = 1.05
# Two computations in 16 bits, each some percent from the exact one.
SIXTEEN_BIT_BOUND = 0.1
# What 33 frames of 704 x 1216 may take on an H100 in 16 bits.
H100_DECODE_MS, H100_DECODE_GIB = 1700.0, 20.0


# diffusers' tiles, smaller in space, so that a small video has some.
SMALL_TILES = replace(DIFFUSERS, pixels=64, pixels_stride=48)


@dataclass(frozen=True)
class Bench:
    """Where things run, and how large they are.

    Attributes:
        grid: latents of what is timed; (9, 88, 152) is 33 frames of 704 x 1216.
        small: latents of what is compared with float32 and float64.
        tile: extent of exact tiles for the small video.
        blend: overlapping tiles for the small video.
        runs: timed calls of each side, behind two that are not.
        widths: replaces the published ones in the rehearsal.
    """

    device: torch.device
    grid: tuple[int, ...] = (9, 88, 152)
    small: tuple[int, ...] = (6, 12, 14)
    tile: tuple[int, ...] = (9, 70, 64)
    blend: Blend = SMALL_TILES
    runs: int = 3
    widths: tuple[int, ...] | None = None

    @property
    def arch(self) -> HunyuanVideoArchConfig:
        if self.widths is None:
            return HUNYUANVIDEO
        return replace(HUNYUANVIDEO, block_out_channels=self.widths, layers_per_block=1)

    def seconds(self, run: Callable[[], object]) -> float:
        """Time of one call: on a GPU between CUDA events."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        first.record()
        run()
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last) / 1000

    def measured_once(self, run: Callable[[], object], resident: int) -> tuple[float, float, float]:
        """Seconds, and peak of allocated and of reserved GiB, of one call that finds no memory that another one has
        left; `resident` bytes of its own are there from before."""
        if self.device.type != "cuda":
            return self.seconds(run), math.nan, math.nan
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        seconds = self.seconds(run)
        peaks = torch.cuda.max_memory_allocated() - allocated, torch.cuda.max_memory_reserved() - reserved
        return seconds, (peaks[0] + resident) / GIB, (peaks[1] + resident) / GIB


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table; `theirs` is diffusers. Not a number: was not measured."""

    what: str
    ms: tuple[float, float] = field(metadata={"title": "ms", "digits": 0})
    tflops: tuple[float, float] = field(metadata={"title": "TFLOP/s", "digits": 0})
    peak: tuple[float, float] = field(metadata={"title": "peak GiB", "digits": 2})
    predicted: float = field(metadata={"title": "predicted GiB", "digits": 2})
    reserved: tuple[float, float] = field(metadata={"title": "reserved GiB", "digits": 2})
    first: tuple[float, float] = field(metadata={"title": "first call s", "digits": 2})
    distance: tuple[float, float] = field(metadata={"title": "distance to the reference", "digits": None})
    note: str = ""

    def cells(self) -> list[str]:
        cells = [self.what]
        for item in fields(self)[1:-1]:
            value, digits = getattr(self, item.name), item.metadata["digits"]
            pair = value if isinstance(value, tuple) else (value,)
            cells.append(" → ".join("–" if math.isnan(each) else _number(each, digits) for each in pair))
        return [*cells, "–" if math.isnan(self.ms[0]) else f"{self.ms[0] / self.ms[1]:.2f}x", self.note]


class Table:
    """Rows as they are measured, so that a failure later loses none."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.rows: list[Row] = []

    def __str__(self) -> str:
        titles = ["diffusers → ours", *(item.metadata["title"] for item in fields(Row)[1:-1]), "speed-up", ""]
        lines = [titles, ["---", *["---:"] * (len(titles) - 2), "---"], *(row.cells() for row in self.rows)]
        return "\n".join([*("| " + " | ".join(line) + " |" for line in lines), "", f"{self.footnote()}"])

    def footnote(self) -> str:
        on_gpu = self.bench.device.type == "cuda"
        where = torch.cuda.get_device_name() if on_gpu else "REHEARSAL on a CPU with a tiny network: no result"
        versions = (
            f"torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}, diffusers {diffusers.__version__},"
            f" Python {platform.python_version()}"
        )
        return (
            f"{datetime.now(UTC):%Y-%m-%d}, {where}, {versions}. Batch 1, published configuration with random weights,"
            f" TF32 off, whole clips (diffusers with its framewise flags off). Medians of {self.bench.runs} calls of"
            " each side in turns, between CUDA events, behind two that are not counted. Peaks are those of the"
            " allocator and count the weights of the half. The reference is diffusers, in float64 for float32 and in"
            " float32 for the others; the distance is relative."
        )


# -------------------------------------------------------------------- on the GPU

ON_GPU = Bench(torch.device("cuda"))


@pytest.fixture(scope="module", autouse=True)
def _without_tf32() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture(autouse=True)
def _memory_back() -> Iterator[None]:
    """The memory of one test is given back before the next."""
    yield
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[Table]:
    """The table of this run, printed past pytest's capture when all rows are in."""
    measured = Table(ON_GPU)
    yield measured
    if path := os.environ.get("PARITY_TABLE"):
        Path(path).write_text(f"{measured}\n", encoding="utf-8")
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n\n{measured}\n")


@pytest.mark.gpu
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_as_exact_as_diffusers(table: Table, direction: Direction, dtype: str) -> None:
    check_accuracy(ON_GPU, table, direction, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_way_gives_the_same(direction: Direction, dtype: str) -> None:
    check_ways(ON_GPU, direction, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_blended_tiles_are_those_of_diffusers(direction: Direction) -> None:
    check_blend(ON_GPU, direction)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_faster_and_leaner_than_diffusers(table: Table, direction: Direction, dtype: str) -> None:
    check_speed(measure(ON_GPU, table, direction, dtype), direction)


@pytest.mark.gpu
def test_the_official_tiles(table: Table) -> None:
    """What published videos were decoded with. diffusers has no such mode, so there is nothing to compare."""
    measure_blend(ON_GPU, table, OFFICIAL)


# -------------------------------------------------------------------- the rehearsal


def test_rehearsal_on_the_cpu() -> None:
    """Everything above, tiny and on the CPU, so that it works when a GPU is at hand."""
    bench = Bench(
        torch.device("cpu"),
        grid=(2, 3, 4),
        small=(5, 5, 3),
        tile=(7, 20, 30),
        blend=replace(DIFFUSERS, pixels=32, pixels_stride=24),
        runs=1,
        widths=(32,) * 4,
    )
    rehearsed = Table(bench)
    with single_thread():
        for direction, dtype in zip(DIRECTIONS, ("fp32", "bf16"), strict=True):
            check_accuracy(bench, rehearsed, direction, dtype)
            check_ways(bench, direction, dtype)
        check_blend(bench, "decode")
        measure(bench, rehearsed, "decode", "bf16")
        measure_blend(bench, rehearsed, OFFICIAL)
    text = str(rehearsed)
    assert "REHEARSAL" in text
    assert len(rehearsed.rows) == 4
    assert {line.count("|") for line in text.splitlines() if line.startswith("|")} == {11}


# -------------------------------------------------------------------- what is measured


def check_accuracy(bench: Bench, table: Table, direction: Direction, dtype: str) -> None:
    """Distances of both sides to the reference, on a small video."""
    ours, theirs = sides(bench, DTYPES[dtype])
    x = example(bench, direction, bench.small).to(bench.device, DTYPES[dtype])
    exact = reference(bench, direction, "fp64" if dtype == "fp32" else "fp32")
    distances = (
        relative_error(run_theirs(theirs, direction, x), exact),
        relative_error(run_ours(ours, direction, x), exact),
    )
    nothing = (math.nan, math.nan)
    row = Row(
        what=f"{direction} {sizes(bench, bench.small)} {dtype}",
        ms=nothing,
        tflops=nothing,
        peak=nothing,
        predicted=math.nan,
        reserved=nothing,
        first=nothing,
        distance=distances,
    )
    table.rows.append(row)
    assert distances[1] <= (FP32_BOUND if dtype == "fp32" else SIXTEEN_BIT_SLACK * distances[0]), row


def check_ways(bench: Bench, direction: Direction, dtype: str) -> None:
    """Pieces and exact tiles against the whole clip at once."""
    ours, _ = sides(bench, DTYPES[dtype])
    x = example(bench, direction, bench.small).to(bench.device, DTYPES[dtype])
    whole = run_ours(ours, direction, x, plan_of(ours, direction, x, chunk=bench.small[0]))
    for options in ({"chunk": 1}, {"chunk": 3}, {"tile": bench.tile}):
        made = run_ours(ours, direction, x, plan_of(ours, direction, x, **options))
        if dtype == "fp32":
            assert float((made - whole).abs().max()) <= 1e-5, options
        else:
            assert_close(made, whole, SIXTEEN_BIT_BOUND, f"16 bits, {options}")


def check_blend(bench: Bench, direction: Direction) -> None:
    """Float32, a video of several tiles in time and space."""
    ours, theirs = sides(bench, torch.float32)
    blend = bench.blend
    theirs.use_framewise_encoding = theirs.use_framewise_decoding = True
    theirs.enable_tiling(blend.pixels, blend.pixels, None, blend.pixels_stride, blend.pixels_stride, None)
    x = example(bench, direction, bench.small).to(bench.device)
    made = run_ours(ours, direction, x, plan_of(ours, direction, x, blend=blend))
    assert_close(made, run_theirs(theirs, direction, x), FP32_BOUND, "float32 sums in another order")


def measure(bench: Bench, table: Table, direction: Direction, dtype: str) -> Row:
    """Both sides on the same input: first calls, memory, then times in turns. Outputs are compared before."""
    ours, theirs = sides(bench, DTYPES[dtype])
    x = example(bench, direction, bench.grid).to(bench.device, DTYPES[dtype])
    calls = [partial(run_theirs, theirs, direction, x), partial(run_ours, ours, direction, x)]
    made: list[Tensor] = []
    resident = half_bytes(ours, direction) + nbytes(x)
    first, peaks = [], []
    for call in calls:
        seconds, *_ = bench.measured_once(lambda call=call: made.append(call().cpu()), resident)
        first.append(seconds)
    assert_close(made[1], made[0], SIXTEEN_BIT_BOUND, "two computations in 16 bits")
    for call in calls:
        peaks.append(bench.measured_once(call, resident)[1:])
    times = in_turns(bench, calls)
    operations = tflop(bench, direction)
    row = Row(
        what=f"{direction} {sizes(bench, bench.grid)} {dtype}",
        ms=(1000 * times[0], 1000 * times[1]),
        tflops=(operations / times[0], operations / times[1]),
        peak=(peaks[0][0], peaks[1][0]),
        predicted=plan_of(ours, direction, x).peak_bytes / GIB,
        reserved=(peaks[0][1], peaks[1][1]),
        first=(first[0], first[1]),
        distance=(math.nan, relative_error(made[1], made[0])),
        note="distance to diffusers in the same type",
    )
    table.rows.append(row)
    return row


def check_speed(row: Row, direction: Direction) -> None:
    assert row.ms[1] < row.ms[0], row
    assert row.peak[1] <= row.peak[0], row
    if direction == "decode" and "H100" in torch.cuda.get_device_name():
        assert row.ms[1] <= H100_DECODE_MS, row
        assert row.peak[1] <= H100_DECODE_GIB, row


def measure_blend(bench: Bench, table: Table, blend: Blend) -> None:
    """Our side alone, in bfloat16."""
    ours, _ = sides(bench, torch.bfloat16)
    x = example(bench, "decode", bench.grid).to(bench.device, torch.bfloat16)
    plan = plan_of(ours, "decode", x, blend=blend)
    call = partial(run_ours, ours, "decode", x, plan)
    first, peak, reserved = bench.measured_once(call, half_bytes(ours, "decode") + nbytes(x))
    seconds = bench.seconds(call)
    row = Row(
        what=f"decode {sizes(bench, bench.grid)} bf16",
        ms=(math.nan, 1000 * seconds),
        tflops=(math.nan, math.nan),
        peak=(math.nan, peak),
        predicted=plan.peak_bytes / GIB,
        reserved=(math.nan, reserved),
        first=(math.nan, first),
        distance=(math.nan, math.nan),
        note=f"blended, {blend}",
    )
    table.rows.append(row)


# -------------------------------------------------------------------- its parts


def sides(bench: Bench, dtype: torch.dtype) -> tuple[AutoencoderKLHunyuanVideo, Any]:
    """Our model and diffusers', with the same weights."""
    state = weights(bench)
    with torch.device("meta"):
        ours = AutoencoderKLHunyuanVideo(VAEConfig(arch_config=bench.arch, fp16="off"))
        theirs = twin(bench)
    for model in (ours, theirs):
        model.load_state_dict(state, strict=True, assign=True)
        model.to(bench.device, dtype).eval().requires_grad_(False)
    return ours, theirs


def twin(bench: Bench) -> Any:
    """diffusers' class, whole clips at once."""
    ours_alone = ("mid_block_causal_attn", "sample_size", "sample_tsize")
    arch = {name: each for name, each in bench.arch.to_dict().items() if name not in ours_alone}
    made = diffusers.AutoencoderKLHunyuanVideo(**arch)
    made.use_framewise_encoding = made.use_framewise_decoding = False
    return made


@cache
def weights(bench: Bench) -> dict[str, Tensor]:
    """Random weights of the golden rule, float32 on the CPU."""
    model = AutoencoderKLHunyuanVideo(VAEConfig(arch_config=bench.arch))
    fill(model, gains={"decoder.conv_out.conv.weight": 0.5})
    return model.state_dict()


@cache
def reference(bench: Bench, direction: Direction, dtype: str) -> Tensor:
    """diffusers on the small video, kept on the CPU."""
    _, theirs = sides(bench, DTYPES[dtype])
    return run_theirs(theirs, direction, example(bench, direction, bench.small).to(bench.device, DTYPES[dtype])).cpu()


@cache
def tflop(bench: Bench, direction: Direction) -> float:
    """Operations of one call as diffusers does it, a multiply-add counted as two; found on shapes alone."""
    with torch.device("meta"):
        model = twin(bench)
        x = example(bench, direction, bench.grid).to("meta")
        with FlopCounterMode(display=False) as counter:
            run_theirs(model, direction, x)
    return float(counter.get_total_flops()) / 1e12


def example(bench: Bench, direction: Direction, grid: tuple[int, ...]) -> Tensor:
    """Latents on a grid, or the video that has them."""
    if direction == "decode":
        return make_input("gpu", (1, bench.arch.latent_channels, *grid), "latent")
    return make_input("gpu", (1, 3, *sample_grid(grid)), "video")


def sample_grid(grid: tuple[int, ...]) -> tuple[int, ...]:
    return (4 * grid[0] - 3, 8 * grid[1], 8 * grid[2])


def sizes(bench: Bench, grid: tuple[int, ...]) -> str:
    return "x".join(map(str, sample_grid(grid)))


@torch.no_grad()
def run_ours(model: AutoencoderKLHunyuanVideo, direction: Direction, x: Tensor, plan: Plan | None = None) -> Tensor:
    if direction == "encode":
        return model.encode(x, plan=plan).latent_dist.parameters
    return model.decode(x, plan=plan).sample


@torch.no_grad()
def run_theirs(model: Any, direction: Direction, x: Tensor) -> Tensor:
    made: Tensor = model.encode(x).latent_dist.parameters if direction == "encode" else model.decode(x).sample
    return made


def plan_of(model: AutoencoderKLHunyuanVideo, direction: Direction, x: Tensor, **options: Any) -> Plan:
    return (model.plan_encode if direction == "encode" else model.plan_decode)(tuple(x.shape), **options)


def in_turns(bench: Bench, calls: list[Callable[[], object]]) -> list[float]:
    """Median seconds of each call, taken in turns, so that what the machine does in between falls on all of them."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(bench.runs):
        for index, call in enumerate(calls):
            times[index].append(bench.seconds(call))
    return [statistics.median(each) for each in times]


def half_bytes(model: AutoencoderKLHunyuanVideo, direction: Direction) -> int:
    modules = model.encoder_modules if direction == "encode" else model.decoder_modules
    return sum(nbytes(each) for name in modules for each in getattr(model, name).parameters())


def nbytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _number(value: float, digits: int | None) -> str:
    return f"{value:.1e}" if digits is None else f"{value:.{digits}f}"
