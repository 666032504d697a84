"""The published configurations at real sizes on a GPU: accuracy, time and memory beside diffusers in one process.

At the end one markdown table is printed, for the package's README, and written to $PARITY_TABLE if that is set. The
same code runs on every machine as a rehearsal with tiny networks on the CPU, whose numbers are thrown away.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
import statistics
import time
import warnings
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
from fastvideo_vae_core.graphs import Captured
from fastvideo_vae_core.plan import Direction, Plan
from fastvideo_vae_core.testing.golden import fill, make_input
from fastvideo_vae_core.testing.parity import relative_error
from fastvideo_vae_core.testing.threads import single_thread
from fastvideo_vae_oobleck import (
    ACE_STEP,
    STABLE_AUDIO_OPEN,
    AutoencoderOobleck,
    OobleckArchConfig,
    weight_norm_state_dict,
)

diffusers = pytest.importorskip("diffusers", reason="this machine has no diffusers to compare with")
# It warns of a list of modules to keep in float32, which is empty.
diffusers.logging.set_verbosity_error()

ARCHS = {"Stable Audio": STABLE_AUDIO_OPEN, "ACE-Step": ACE_STEP}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GIB = 2**30

# float32 without TF32 against float64: sums over a few thousand terms through some sixty layers.
FP32_BOUND = 1e-5
# In 16 bits we may be as far from float64 as diffusers is, and a little luck.
SIXTEEN_BIT_SLACK = 1.05


@dataclass(frozen=True)
class Bench:
    """Where things run, and how large they are.

    Attributes:
        latents: length that is timed: 47.5 s of Stable Audio.
        short: length of a graph that is replayed: 5 s.
        long: length that is computed in pieces: ten minutes.
        exact: length that is compared with float64.
        runs: timed calls of each side, behind two that are not.
        width: replaces the published ones in the rehearsal.
    """

    device: torch.device
    latents: int = 1024
    short: int = 108
    long: int = 12_920
    exact: int = 256
    runs: int = 9
    width: int | None = None

    def arch(self, name: str) -> OobleckArchConfig:
        if self.width is None:
            return ARCHS[name]
        narrow = {"encoder_hidden_size": 2 * self.width, "decoder_channels": self.width}
        return replace(ARCHS[name], **narrow, decoder_input_channels=self.width, channel_multiples=(1, 1, 2, 2, 2))

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

    def first_call(self, run: Callable[[], object]) -> float:
        """Time of a call that finds no memory that another one has left."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return self.seconds(run)

    def memory(self, run: Callable[[], object], resident: int) -> tuple[float, float]:
        """Peak of allocated and of reserved GiB in one call, with `resident` bytes of its own from before."""
        if self.device.type != "cuda":
            run()
            return math.nan, math.nan
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        run()
        torch.cuda.synchronize()
        peaks = torch.cuda.max_memory_allocated() - allocated, torch.cuda.max_memory_reserved() - reserved
        return (peaks[0] + resident) / GIB, (peaks[1] + resident) / GIB


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table; `theirs` is diffusers. Not a number: was not measured."""

    what: str
    ms: tuple[float, float] = field(metadata={"title": "ms", "digits": 1})
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
        where = torch.cuda.get_device_name() if on_gpu else "REHEARSAL on a CPU with tiny networks: no result"
        versions = (
            f"torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}, diffusers {diffusers.__version__},"
            f" Python {platform.python_version()}"
        )
        return (
            f"{datetime.now(UTC):%Y-%m-%d}, {where}, {versions}. Batch 1, published configurations with random weights,"
            f" TF32 off. Medians of {self.bench.runs} calls of each side in turns, between CUDA events, behind two that"
            " are not counted; a first call is one of a new model in a process that has used the GPU before. Peaks are"
            " those of the allocator and count the weights of the half. The reference is diffusers in float64 at a"
            f" length of {self.bench.exact} latents; the distance is relative."
        )


# -------------------------------------------------------------------- on the GPU

ON_GPU = Bench(torch.device("cuda"))


@pytest.fixture(scope="module", autouse=True)
def _without_tf32() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[Table]:
    """The table of this run, printed past pytest's capture when all rows are in."""
    measured = Table(ON_GPU)
    yield measured
    if path := os.environ.get("PARITY_TABLE"):
        Path(path).write_text(f"{measured}\n", encoding="utf-8")
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n\n{measured}\n")


CASES = [("Stable Audio", "fp16"), ("Stable Audio", "bf16"), ("Stable Audio", "fp32"), ("ACE-Step", "fp16")]


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "dtype"), CASES)
@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_as_exact_as_diffusers(table: Table, name: str, direction: Direction, dtype: str) -> None:
    check_accuracy(measure(ON_GPU, table, name, direction, dtype), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_pieces_and_streams_equal_one_call(direction: Direction) -> None:
    check_pieces(ON_GPU, direction, torch.float32, 1e-5)
    check_pieces(replace(ON_GPU, exact=40), direction, torch.float64, 1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_a_graph_gives_the_same_numbers(table: Table, direction: Direction) -> None:
    check_graph(ON_GPU, table, direction)


@pytest.mark.gpu
@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_long_audio_fits_the_budget_that_it_is_given(table: Table, direction: Direction) -> None:
    check_budget(ON_GPU, table, direction)


# -------------------------------------------------------------------- the rehearsal


def test_rehearsal_on_the_cpu() -> None:
    """Everything above, tiny and on the CPU, so that it works when a GPU is at hand. Graphs need the GPU itself."""
    bench = Bench(torch.device("cpu"), latents=3, short=2, long=1100, exact=3, runs=1, width=1)
    rehearsed = Table(bench)
    cases: list[tuple[str, Direction, str]] = [
        ("Stable Audio", "decode", "fp32"),
        ("Stable Audio", "encode", "bf16"),
        ("ACE-Step", "encode", "fp32"),
    ]
    with single_thread():
        for name, direction, dtype in cases:
            row = measure(bench, rehearsed, name, direction, dtype)
            # Networks of one or two channels are too few numbers to tell whose rounding is the smaller.
            if dtype == "fp32":
                check_accuracy(row, dtype)
        check_pieces(replace(bench, exact=40), "decode", torch.float64, 1e-12)
    text = str(rehearsed)
    assert "REHEARSAL" in text
    assert len(rehearsed.rows) == 3
    assert {line.count("|") for line in text.splitlines() if line.startswith("|")} == {11}


# -------------------------------------------------------------------- what is measured


def measure(bench: Bench, table: Table, name: str, direction: Direction, dtype: str) -> Row:
    """Both sides on the same input: first calls, memory, then times in turns; and, on a shorter one, the distance."""
    wanted = DTYPES[dtype]
    ours, theirs = sides(bench, name, wanted)
    x = example(bench, name, direction, bench.latents).to(bench.device, wanted)
    warm_up(bench, wanted)
    calls = [partial(run_theirs, theirs, direction, x), partial(run_ours, ours, direction, x)]
    first = [bench.first_call(call) for call in calls]
    memory = [bench.memory(call, half_bytes(ours, direction) + nbytes(x)) for call in calls]
    times = in_turns(bench, calls)
    operations = tflop(bench, name, direction)
    plan = plan_of(ours, direction, x)
    short = example(bench, name, direction, bench.exact).to(bench.device, wanted)
    made = [run_theirs(theirs, direction, short), run_ours(ours, direction, short)]
    distances = [relative_error(each, reference(bench, name, direction)) for each in made]
    row = Row(
        what=f"{name} {direction} {seconds_of(bench, name, bench.latents)} {dtype}",
        ms=(1000 * times[0], 1000 * times[1]),
        tflops=(operations / times[0], operations / times[1]),
        peak=(memory[0][0], memory[1][0]),
        predicted=plan.peak_bytes / GIB,
        reserved=(memory[0][1], memory[1][1]),
        first=(first[0], first[1]),
        distance=(distances[0], distances[1]),
    )
    table.rows.append(row)
    return row


def check_accuracy(row: Row, dtype: str) -> None:
    theirs, ours = row.distance
    assert ours <= (FP32_BOUND if dtype == "fp32" else SIXTEEN_BIT_SLACK * theirs), row


def check_pieces(bench: Bench, direction: Direction, dtype: torch.dtype, bound: float) -> None:
    """Pieces of uneven lengths in one call, and a stream of chunks; the largest absolute difference."""
    ours, _ = sides(bench, "Stable Audio", dtype)
    x = example(bench, "Stable Audio", direction, bench.exact).to(bench.device, dtype)
    whole = run_ours(ours, direction, x)
    tile = 17 * ours.hop_length + 5
    pieces = run_ours(ours, direction, x, plan_of(ours, direction, x, tile=(tile,)))
    with torch.no_grad():
        chunks = x.split(x.shape[2] // 5 + 3, 2)
        if direction == "decode":
            streamed = torch.cat(list(ours.decode_stream(chunks)), 2)
        else:
            streamed = torch.cat([each.parameters for each in ours.encode_stream(chunks)], 2)
    assert float((pieces - whole).abs().max()) <= bound
    assert float((streamed - whole).abs().max()) <= bound


def check_graph(bench: Bench, table: Table, direction: Direction) -> None:
    """Short and full length in float16: replayed from several threads' worth of inputs, as exact as a plain call."""
    ours, theirs = sides(bench, "Stable Audio", torch.float16)
    for latents in (bench.short, bench.latents):
        x = example(bench, "Stable Audio", direction, latents).to(bench.device, torch.float16)
        captured = Captured(ours, plan_of(ours, direction, x))

        def replay(x: Tensor = x, captured: Captured[Any] = captured) -> Tensor:
            made = captured(x)
            return made.sample if direction == "decode" else made.latent_dist.parameters

        for each in (x, x.flip(2)):
            assert torch.equal(replay(each), run_ours(ours, direction, each))
        plain = partial(run_ours, ours, direction, x)
        times = in_turns(bench, [partial(run_theirs, theirs, direction, x), replay, plain])
        operations = tflop(bench, "Stable Audio", direction) * latents / bench.latents
        row = Row(
            what=f"Stable Audio {direction} {seconds_of(bench, 'Stable Audio', latents)} fp16",
            ms=(1000 * times[0], 1000 * times[1]),
            tflops=(operations / times[0], operations / times[1]),
            peak=(math.nan, math.nan),
            predicted=math.nan,
            reserved=(math.nan, math.nan),
            first=(math.nan, math.nan),
            distance=(math.nan, math.nan),
            note=f"as a CUDA graph; {1000 * times[2]:.1f} ms without",
        )
        table.rows.append(row)


def check_budget(bench: Bench, table: Table, direction: Direction) -> None:
    """Ten minutes, in pieces as they come by themselves, and within what a piece of 64 latents needs."""
    ours, _ = sides(bench, "Stable Audio", torch.float16)
    x = example(bench, "Stable Audio", direction, bench.long).to(bench.device, torch.float16)
    tile = 64 * ours.hop_length
    budget = plan_of(ours, direction, x, tile=(tile,)).peak_bytes
    plans = [plan_of(ours, direction, x), plan_of(ours, direction, x, memory_budget=budget)]
    calls = [partial(run_ours, ours, direction, x, plan) for plan in plans]
    times = in_turns(replace(bench, runs=3), calls)
    memory = [bench.memory(call, half_bytes(ours, direction) + nbytes(x)) for call in calls]
    operations = tflop(bench, "Stable Audio", direction) * bench.long / bench.latents
    for plan, (peak, reserved), seconds in zip(plans, memory, times, strict=True):
        assert plan.tile is not None
        pieces = plan.tile[0] // ours.hop_length
        row = Row(
            what=f"Stable Audio {direction} {seconds_of(bench, 'Stable Audio', bench.long)} fp16",
            ms=(math.nan, 1000 * seconds),
            tflops=(math.nan, operations / seconds),
            peak=(math.nan, peak),
            predicted=plan.peak_bytes / GIB,
            reserved=(math.nan, reserved),
            first=(math.nan, math.nan),
            distance=(math.nan, math.nan),
            note=f"exact pieces of {pieces} latents",
        )
        table.rows.append(row)
    assert plans[1].tile is not None
    assert plans[1].tile >= (tile,)
    # What the allocator gave, workspaces of cuDNN included. Without a GPU there is nothing to compare.
    assert not memory[1][0] > budget / GIB, f"{memory[1][0]:.2f} GiB, more than the budget of {budget / GIB:.2f}"


# -------------------------------------------------------------------- its parts


def sides(bench: Bench, name: str, dtype: torch.dtype) -> tuple[AutoencoderOobleck, Any]:
    """Our model and diffusers', with the same weights."""
    arch, (plain, normed) = bench.arch(name), weights(bench, name)
    fields = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in arch.to_dict().items()
        if key != "scaling_factor"
    }
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        ours = AutoencoderOobleck(VAEConfig(arch_config=arch, fp16="retry"))
        theirs = diffusers.AutoencoderOobleck(**fields)
    ours.load_state_dict(plain, strict=True, assign=True)
    theirs.load_state_dict(normed, strict=True, assign=True)
    for model in (ours, theirs):
        model.to(bench.device, dtype).eval().requires_grad_(False)
    return ours, theirs


@cache
def weights(bench: Bench, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Random weights of the golden rule, float32 on the CPU: as we have them, and with weight norm as diffusers."""
    model = AutoencoderOobleck(VAEConfig(arch_config=bench.arch(name)))
    fill(model, gains={"*res_unit*.conv2.weight": 0.4, "*.conv2.weight": 0.4, "*.conv_t1.weight": 1.5})
    return model.state_dict(), weight_norm_state_dict(model)


@cache
def reference(bench: Bench, name: str, direction: Direction) -> Tensor:
    """diffusers in float64, or in float32 without TF32 where a GPU is too small for that; kept on the CPU."""
    for dtype in (torch.float64, torch.float32):
        _, theirs = sides(bench, name, dtype)
        x = example(bench, name, direction, bench.exact).to(bench.device, dtype)
        with contextlib.suppress(torch.OutOfMemoryError):
            return run_theirs(theirs, direction, x).cpu()
    pytest.skip(f"this GPU has too little memory for diffusers' {direction} of {bench.exact} latents in float32")


@cache
def tflop(bench: Bench, name: str, direction: Direction) -> float:
    """Operations of one call, a multiply-add counted as two; found on shapes alone."""
    with torch.device("meta"):
        model = AutoencoderOobleck(VAEConfig(arch_config=bench.arch(name)))
    x = example(bench, name, direction, bench.latents).to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model._decode(x) if direction == "decode" else model._encode(x)
    return float(counter.get_total_flops()) / 1e12


def example(bench: Bench, name: str, direction: Direction, latents: int) -> Tensor:
    arch = bench.arch(name)
    if direction == "encode":
        return make_input("gpu", (1, arch.audio_channels, arch.hop_length * latents), "audio")
    return make_input("gpu", (1, arch.decoder_input_channels, latents), "latent")


def seconds_of(bench: Bench, name: str, latents: int) -> str:
    return f"{latents * bench.arch(name).hop_length / bench.arch(name).sampling_rate:.1f} s"


@torch.no_grad()
def run_ours(model: AutoencoderOobleck, direction: Direction, x: Tensor, plan: Plan | None = None) -> Tensor:
    if direction == "encode":
        return model.encode(x, plan=plan).latent_dist.parameters
    return model.decode(x, plan=plan).sample


@torch.no_grad()
def run_theirs(model: Any, direction: Direction, x: Tensor) -> Tensor:
    if direction == "encode":
        return model.encode(x).latent_dist.parameters
    return model.decode(x).sample


def plan_of(model: AutoencoderOobleck, direction: Direction, x: Tensor, **options: Any) -> Plan:
    return (model.plan_encode if direction == "encode" else model.plan_decode)(tuple(x.shape), **options)


def in_turns(bench: Bench, calls: list[Callable[[], object]]) -> list[float]:
    """Median seconds of each call, taken in turns, so that what the machine does in between falls on all of them."""
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(bench.runs + 2):
        for index, call in enumerate(calls):
            seconds = bench.seconds(call)
            if turn >= 2:
                times[index].append(seconds)
    return [statistics.median(each) for each in times]


def warm_up(bench: Bench, dtype: torch.dtype) -> None:
    """Load the libraries of the device, so that no side pays for both in its first call."""
    x = torch.ones(1, 64, 4096, device=bench.device, dtype=dtype)
    for y in (
        torch.nn.functional.conv1d(x, x[:, :, :7].expand(64, -1, -1)),
        torch.nn.functional.conv2d(x[:, :, None], x[:, :, None, :7].expand(64, -1, -1, -1)),
    ):
        y.sum().item()


def half_bytes(model: AutoencoderOobleck, direction: Direction) -> int:
    modules = model.encoder_modules if direction == "encode" else model.decoder_modules
    return sum(nbytes(each) for name in modules for each in getattr(model, name).parameters())


def nbytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _number(value: float, digits: int | None) -> str:
    return f"{value:.1e}" if digits is None else f"{value:.{digits}f}"
