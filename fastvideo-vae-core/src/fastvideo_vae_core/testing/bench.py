"""Time, memory and accuracy of a network beside another one in the same process, as one markdown table.

Every family's GPU suite measures through here, so that the tables in the READMEs mean the same. The same code runs on
a CPU as a rehearsal, whose times mean nothing.
"""

from __future__ import annotations

import gc
import math
import os
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvideo_vae_core.plan import Direction, Plan

GIB = 2**30
_NAN = math.nan
_UNKNOWN = (_NAN, _NAN)


@dataclass(frozen=True)
class Bench:
    """Where things run, and how often.

    Attributes:
        runs: timed calls of each side, behind at least two that are not.
    """

    device: torch.device
    runs: int = 9

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def seconds(self, run: Callable[[], object]) -> float:
        """Time of one call: on a GPU between CUDA events."""
        if not self.on_gpu:
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
        if self.on_gpu:
            torch.cuda.empty_cache()
        return self.seconds(run)

    def in_turns(self, calls: Sequence[Callable[[], object]], runs: int | None = None) -> list[float]:
        """Median seconds of each call, taken in turns, so that what the machine does in between falls on all."""
        times: list[list[float]] = [[] for _ in calls]
        for _ in range(runs or self.runs):
            for call, found in zip(calls, times, strict=True):
                found.append(self.seconds(call))
        return [statistics.median(each) for each in times]

    def by_itself(self, call: Callable[[], object], runs: int | None = None) -> float:
        """Median seconds of a call behind one that finds no memory of others."""
        self.first_call(call)
        return self.in_turns([call], runs)[0]

    def memory(self, run: Callable[[], object], resident: int) -> tuple[float, float]:
        """Peak of allocated and of reserved GiB in one call, with `resident` bytes of its own from before."""
        if not self.on_gpu:
            run()
            return _UNKNOWN
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        # Not what is reserved now: a workspace that a library keeps can hold on to gigabytes, which the call then uses.
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        peaks = torch.cuda.max_memory_allocated() - before, torch.cuda.max_memory_reserved() - before
        return (peaks[0] + resident) / GIB, (peaks[1] + resident) / GIB


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table; the first of each pair is the reference. Not a number: was not measured."""

    what: str
    ms: tuple[float, float] = field(default=_UNKNOWN, metadata={"title": "ms", "digits": 1})
    tflops: tuple[float, float] = field(default=_UNKNOWN, metadata={"title": "TFLOP/s", "digits": 0})
    peak: tuple[float, float] = field(default=_UNKNOWN, metadata={"title": "peak GiB", "digits": 2})
    predicted: float = field(default=_NAN, metadata={"title": "predicted GiB", "digits": 2})
    reserved: tuple[float, float] = field(default=_UNKNOWN, metadata={"title": "reserved GiB", "digits": 2})
    first: tuple[float, float] = field(default=_UNKNOWN, metadata={"title": "first call s", "digits": 2})
    distance: tuple[float, float] = field(default=_UNKNOWN, metadata={"title": "distance", "digits": None})
    note: str = ""

    def cells(self) -> list[str]:
        cells = [self.what]
        for item in fields(self)[1:-1]:
            value, digits = getattr(self, item.name), item.metadata["digits"]
            pair = value if isinstance(value, tuple) else (value,)
            cells.append(" → ".join("–" if math.isnan(each) else _number(each, digits) for each in pair))
        return [*cells, "–" if math.isnan(self.ms[0]) else f"{self.ms[0] / self.ms[1]:.2f}x", self.note]


class Table:
    """Rows as they are measured, so that a failure later loses none; each time the whole goes to $PARITY_TABLE, if set.

    footnote: what the columns are, behind date, machine and versions.
    """

    def __init__(self, bench: Bench, footnote: str, reference: str = "diffusers") -> None:
        self.bench, self.footnote, self.reference = bench, footnote, reference
        self.rows: list[Row] = []

    def add(self, row: Row) -> None:
        self.rows.append(row)
        if self.bench.on_gpu and (path := os.environ.get("PARITY_TABLE")):
            Path(path).write_text(f"{self}\n", encoding="utf-8")

    def __str__(self) -> str:
        titles = [f"{self.reference} → ours", *(item.metadata["title"] for item in fields(Row)[1:-1]), "speed-up", ""]
        lines = [titles, ["---", *["---:"] * (len(titles) - 2), "---"], *(row.cells() for row in self.rows)]
        where = (
            torch.cuda.get_device_name() if self.bench.on_gpu else "REHEARSAL on a CPU with tiny networks: no result"
        )
        about = (
            f"{datetime.now(UTC):%Y-%m-%d}, {where}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()},"
            f" {self.reference} {version(self.reference)}, Python {platform.python_version()}. {self.footnote}"
        )
        return "\n".join([*("| " + " | ".join(line) + " |" for line in lines), "", about])

    @contextmanager
    def published(self, config: Any) -> Iterator[Table]:
        """At the end, print the table past the capture of pytest."""
        yield self
        with config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(f"\n\n{self}\n")


HOW = (
    "Published configurations with random weights, batch 1, TF32 off. Medians of calls of each side in turns, between"
    " CUDA events, behind at least two that are not counted; a first call is one of a new model in a process that has"
    " used the GPU before. Peaks are those of the allocator and count the weights of the half."
)


def compare(
    bench: Bench,
    what: str,
    calls: tuple[Callable[[], Tensor], Callable[[], Tensor]],
    *,
    resident: int,
    copied: int = 0,
    operations: float = _NAN,
    predicted: float = _NAN,
    runs: int | None = None,
    apart: bool = False,
) -> Row:
    """Both sides' first calls, memory, then times in turns; all but the distance.

    calls: the reference and ours.
    resident: bytes of weights and input that each holds from before.
    copied: bytes of weights that ours holds besides, see `copied_bytes`.
    operations: TFLOP of a call.
    predicted: bytes.
    apart: one side's times after the other's, where a GPU has no room for what both leave to the next call.
    """
    first = [bench.first_call(call) for call in calls]
    memory = [bench.memory(call, resident + more) for call, more in zip(calls, (0, copied), strict=True)]
    times = [bench.by_itself(call, runs) for call in calls] if apart else bench.in_turns(calls, runs)
    return Row(
        what=what,
        ms=(1000 * times[0], 1000 * times[1]),
        tflops=(operations / times[0], operations / times[1]),
        peak=(memory[0][0], memory[1][0]),
        predicted=predicted / GIB,
        reserved=(memory[0][1], memory[1][1]),
        first=(first[0], first[1]),
    )


def alone(
    bench: Bench,
    what: str,
    call: Callable[[], object],
    *,
    resident: int,
    note: str,
    operations: float = _NAN,
    predicted: float = _NAN,
    runs: int | None = None,
) -> Row:
    """Time and memory of our side only; see `compare`."""
    bench.seconds(call)
    peak, reserved = bench.memory(call, resident)
    (seconds,) = bench.in_turns([call], runs)
    return Row(
        what=what,
        ms=(_NAN, 1000 * seconds),
        tflops=(_NAN, operations / seconds),
        peak=(_NAN, peak),
        predicted=predicted / GIB,
        reserved=(_NAN, reserved),
        note=note,
    )


def check_accuracy(row: Row) -> None:
    """As close to float64 as the reference is in the same type, and a little luck; or at rounding in float32."""
    theirs, ours = row.distance
    assert ours <= max(1.05 * theirs, 1e-5), row


@contextmanager
def without_tf32() -> Iterator[None]:
    """float32 means float32 while the block runs."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def warm_up(device: torch.device, dtype: torch.dtype) -> None:
    """Load the libraries of the device, so that no side pays for both in its first call."""
    x = torch.ones(1, 64, 64, 64, device=device, dtype=dtype)
    y = torch.nn.functional.conv2d(x, x[:, :, :3, :3], padding=1)
    z = torch.nn.functional.conv1d(x[..., 0], x[..., :3, 0])
    tokens = x.flatten(2).transpose(1, 2)
    torch.nn.functional.scaled_dot_product_attention(tokens, tokens, tokens).sum().item()
    y.sum().item()
    z.sum().item()


def free_memory() -> None:
    """Give a test's memory back before the next. Python keeps the last exception and with it all that its frames hold,
    so one test that fails for memory would take the others with it."""
    failure: BaseException | None = getattr(sys, "last_value", None)
    while failure is not None:
        traceback.clear_frames(failure.__traceback__)
        failure = failure.__context__
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@torch.no_grad()
def run(model: Any, direction: Direction, x: Tensor, plan: Plan | None = None) -> Tensor:
    """Parameters of the posterior or samples, of our model or of diffusers'."""
    options = {} if plan is None else {"plan": plan}
    if direction == "encode":
        parameters: Tensor = model.encode(x, **options).latent_dist.parameters
        return parameters
    sample: Tensor = model.decode(x, **options).sample
    return sample


def plan_of(model: Any, direction: Direction, x: Tensor, **options: Any) -> Plan:
    plan: Plan = (model.plan_encode if direction == "encode" else model.plan_decode)(tuple(x.shape), **options)
    return plan


def resident_bytes(model: Any, direction: Direction, x: Tensor) -> int:
    """Bytes of the weights of that half, and of its input."""
    return sum(each.numel() * each.element_size() for each in [*model._half_parameters(direction), x])


def copied_bytes(model: Any, direction: Direction) -> int:
    """Bytes of the copy of that half that a model keeps from its first call on, where it computes in another type than
    its weights have."""
    stored = model._half_dtype(direction)
    computed: torch.dtype = model._fp16(stored)[0]
    numbers = sum(each.numel() for each in model._half_parameters(direction))
    return 0 if computed == stored else numbers * computed.itemsize


def _number(value: float, digits: int | None) -> str:
    return f"{value:.1e}" if digits is None else f"{value:.{digits}f}"
