"""What the benchmarks of layers share: parts that stand for themselves, times by device events, the busiest kernels."""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Options = argparse.Namespace
Call = Callable[[], Any]


def run_parts(description: str | None, parts: Mapping[str, Callable[[Options], None]]) -> None:
    """A command line that runs the parts, or those that `--parts` names, while there is time.

    A part that fails says so, and the others go on.
    """
    start = time.monotonic()
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seconds", type=float, default=225, help="after these no further part begins")
    parser.add_argument("--parts", default="", help=f"some of {','.join(parts)}")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes, to see whether the script runs")
    options = parser.parse_args()
    # For long parts, which look at the clock themselves.
    options.late = lambda: time.monotonic() - start > options.seconds
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    about()
    for name in [name for name in options.parts.split(",") if name] or parts:
        print(f"\n=== {name} (at {time.monotonic() - start:.0f} s)", flush=True)
        if options.late():
            print("left out: no time")
            continue
        try:
            with torch.no_grad():
                parts[name](options)
        except Exception:
            print(traceback.format_exc(limit=6))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    print(f"\ndone at {time.monotonic() - start:.0f} s")


def about() -> None:
    """Versions, and the two ceilings of the card."""
    print("torch", torch.__version__, "cudnn", torch.backends.cudnn.version())
    if not torch.cuda.is_available():
        return
    print(torch.cuda.get_device_name())
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    big = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    other = torch.empty_like(big)
    print(f"matmul {2 * 8192**3 / timed(lambda: a @ b) / 1e9:.0f} TFLOP/s", end=", ")
    print(f"copy {2 * big.numel() / timed(lambda: other.copy_(big)) / 1e9:.2f} TB/s")


def measure(name: str, run: Call, runs: int = 3) -> None:
    """The time of the first call, the median of the next ones, and their peak memory."""
    if not torch.cuda.is_available():
        run()
        print(name)
        return
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    torch.cuda.synchronize()
    first = time.perf_counter() - begin
    resting = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    times = sorted(once(run) for _ in range(runs))
    peak = (torch.cuda.max_memory_allocated() - resting) / 2**30
    print(f"{name:45} {times[len(times) // 2]:9.1f} ms  {peak:5.2f} GiB over weights and input  first {first:.1f} s")


def timed(run: Call, least: int = 5, budget: float = 60.0) -> float:
    """Median of several runs in milliseconds, by device events; a rehearsal on a CPU takes one."""
    if not torch.cuda.is_available():
        begin = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - begin)
    for _ in range(2):
        run()
    times: list[float] = []
    while len(times) < least or (sum(times) < budget and len(times) < 50):
        times.append(once(run))
    return sorted(times)[len(times) // 2]


def once(run: Call) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def attempt(run: Call) -> float:
    """Its time, or NaN if it fails."""
    try:
        return timed(run)
    except Exception:
        return float("nan")


def busiest(name: str, run: Call, most: int = 20) -> None:
    """The kernels that the time goes into; on a CPU the operations."""
    run()
    kinds = [torch.profiler.ProfilerActivity.CPU]
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as profiled:
        run()
        if on_gpu:
            torch.cuda.synchronize()
    field = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    rows = [(getattr(each, field), each.count, each.key) for each in profiled.key_averages()]
    rows = sorted((row for row in rows if row[0] > 0), reverse=True)
    total = sum(spent for spent, _, _ in rows)
    print(f"{name}: {total / 1e3:.1f} ms of kernels")
    for spent, count, key in rows[:most]:
        print(f"{spent / 1e3:9.2f} ms {100 * spent / total:5.1f} % {count:5d} x {key[:110]}")


def by_prefixes(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor, frame: int
) -> Tensor:
    """`ops.attention.prefix_attention` with another way to attend."""
    parts = zip(q.split(frame, dim=-2), range(frame, k.shape[-2] + 1, frame), strict=True)
    return torch.cat([attend(part, k[..., :end, :], v[..., :end, :]) for part, end in parts], dim=-2)


def error(ours: Tensor, exact: Tensor) -> float:
    """Relative, in float64."""
    return float((ours.double() - exact.double()).norm() / exact.double().norm())


@contextmanager
def cudnn_benchmark(on: bool) -> Iterator[None]:
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = on
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
