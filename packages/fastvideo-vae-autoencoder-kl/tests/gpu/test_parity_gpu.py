"""The published configurations at real sizes on a GPU: accuracy, time and memory beside diffusers in one process.

At the end one markdown table is printed, for the package's README, and written to $PARITY_TABLE if that is set. The
same code runs on every machine as a rehearsal with tiny networks on the CPU, whose numbers are thrown away.
"""

from __future__ import annotations

import contextlib
import gc
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastvideo_vae_autoencoder_kl import FLUX1, SDXL, AutoencoderKL, AutoencoderKLArchConfig
from fastvideo_vae_core.config import VAEConfig
from fastvideo_vae_core.plan import Direction
from fastvideo_vae_core.testing import bench as benches
from fastvideo_vae_core.testing.bench import (
    GIB,
    HOW,
    Row,
    Table,
    alone,
    check_accuracy,
    compare,
    plan_of,
    resident_bytes,
    run,
    warm_up,
    without_tf32,
)
from fastvideo_vae_core.testing.exhaustion import Exhaustion
from fastvideo_vae_core.testing.golden import fill, make_input
from fastvideo_vae_core.testing.parity import relative_error
from fastvideo_vae_core.testing.threads import single_thread

diffusers = pytest.importorskip("diffusers", reason="this machine has no diffusers to compare with")

ARCHS = {"SDXL": SDXL, "FLUX.1": FLUX1}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# Of two results in bfloat16, each with errors of its own.
TWO_WAYS = 0.05

FOOTNOTE = f"{HOW} The reference of the distance, which is relative, is diffusers in float64."


@dataclass(frozen=True)
class Bench(benches.Bench):
    """Where things run, and how large they are.

    Attributes:
        pixels: side of the pictures that are timed.
        large: side of the picture that is tiled to fit a budget.
        tile, small_tile: extents of tiles for the large picture and for one of `pixels`.
        widths: replaces the published ones in the rehearsal.
    """

    pixels: int = 1024
    large: int = 2048
    tile: int = 512
    small_tile: int = 384
    widths: tuple[int, ...] | None = None

    def arch(self, name: str) -> AutoencoderKLArchConfig:
        return ARCHS[name] if self.widths is None else replace(ARCHS[name], block_out_channels=self.widths)


# -------------------------------------------------------------------- on the GPU

ON_GPU = Bench(torch.device("cuda"))


@pytest.fixture(scope="module", autouse=True)
def _without_tf32() -> Iterator[None]:
    with without_tf32():
        yield


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[Table]:
    """The table of this run."""
    with Table(ON_GPU, FOOTNOTE).published(request.config) as measured:
        yield measured


@pytest.mark.gpu
@pytest.mark.parametrize("name", ARCHS)
@pytest.mark.parametrize("direction", ["decode", "encode"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_as_exact_as_diffusers(table: Table, name: str, direction: Direction, dtype: str) -> None:
    check_accuracy(measure(ON_GPU, table, name, direction, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_tiled_equals_whole(direction: Direction) -> None:
    check_tiled(ON_GPU, "SDXL", direction, torch.float32, 1e-5)
    check_tiled(replace(ON_GPU, pixels=ON_GPU.large, small_tile=ON_GPU.tile), "SDXL", direction, torch.float32, 1e-5)
    check_tiled(replace(ON_GPU, pixels=512, small_tile=200), "SDXL", direction, torch.float64, 1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_a_large_picture_fits_the_budget_that_it_is_given(table: Table, direction: Direction) -> None:
    check_budget(ON_GPU, table, "SDXL", direction)


@pytest.mark.gpu
@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_a_large_picture_fits_what_is_free(direction: Direction) -> None:
    check_scarce(ON_GPU, "SDXL", direction)


# -------------------------------------------------------------------- the rehearsal


def test_rehearsal_on_the_cpu() -> None:
    """Everything above, tiny and on the CPU, so that it works when a GPU is at hand."""
    bench = Bench(torch.device("cpu"), pixels=32, large=128, tile=64, small_tile=20, runs=1, widths=(32,) * 4)
    rehearsed = Table(bench, FOOTNOTE)
    cases: list[tuple[str, Direction, str]] = [
        ("SDXL", "decode", "fp32"),
        ("SDXL", "decode", "fp16"),
        ("FLUX.1", "encode", "bf16"),
    ]
    with single_thread():
        for name, direction, dtype in cases:
            check_accuracy(measure(bench, rehearsed, name, direction, dtype))
        check_tiled(bench, "SDXL", "encode", torch.float64, 1e-12)
        check_budget(bench, rehearsed, "SDXL", "decode")
        check_scarce(bench, "SDXL", "decode")
    text = str(rehearsed)
    assert "REHEARSAL" in text
    assert len(rehearsed.rows) == 5
    assert {line.count("|") for line in text.splitlines() if line.startswith("|")} == {11}


# -------------------------------------------------------------------- what is measured


def measure(bench: Bench, table: Table, name: str, direction: Direction, dtype: str) -> Row:
    """Both sides on the same input: first calls, memory and times, then the distance to float64."""
    wanted = DTYPES[dtype]
    ours, theirs = sides(bench, name, wanted)
    x = example(bench, name, direction, bench.pixels).to(bench.device, wanted)
    calls = partial(run, theirs, direction, x), partial(run, ours, direction, x)
    warm_up(bench.device, wanted)
    row = compare(
        bench,
        f"{name} {direction} {bench.pixels}² {dtype}",
        calls,
        resident=resident_bytes(ours, direction, x),
        operations=tflop(bench, name, direction),
        predicted=plan_of(ours, direction, x).peak_bytes,
    )
    theirs_apart, ours_apart = (relative_error(call(), reference(bench, name, direction)) for call in calls)
    row = replace(row, distance=(theirs_apart, ours_apart))
    table.add(row)
    return row


def check_tiled(bench: Bench, name: str, direction: Direction, dtype: torch.dtype, bound: float) -> None:
    """Uneven tiles; the largest absolute difference, in units of the largest number if that is more than 1.

    Log variances reach 4, and on a GPU the whole picture's own are 1.3e-5 from float64.
    """
    ours, _ = sides(bench, name, dtype)
    x = example(bench, name, direction, bench.pixels).to(bench.device, dtype)
    whole = run(ours, direction, x)
    tiled = run(ours, direction, x, plan_of(ours, direction, x, tile=(bench.small_tile, bench.small_tile + 33)))
    assert float((tiled - whole).abs().max()) <= bound * max(1.0, float(whole.abs().max()))


def check_budget(bench: Bench, table: Table, name: str, direction: Direction) -> None:
    """The large picture whole, and within a budget that only tiles keep; bfloat16, which is what people run."""
    ours, _ = sides(bench, name, torch.bfloat16)
    x = example(bench, name, direction, bench.large).to(bench.device, torch.bfloat16)
    budget = plan_of(ours, direction, x, tile=(bench.tile,) * 2).peak_bytes
    plans = [plan_of(ours, direction, x), plan_of(ours, direction, x, memory_budget=budget)]
    for plan in plans:
        row = alone(
            bench,
            f"{name} {direction} {bench.large}² bf16",
            partial(run, ours, direction, x, plan),
            resident=resident_bytes(ours, direction, x),
            operations=tflop(bench, name, direction) * (bench.large / bench.pixels) ** 2,
            predicted=plan.peak_bytes,
            note="whole" if plan.tile is None else f"exact tiles of {plan.tile}, for {budget / GIB:.2f} GiB",
        )
        table.add(row)
    assert plans[1].tile is not None
    assert plans[1].peak_bytes <= budget
    # What the allocator gave, workspaces of cuDNN included. Without a GPU there is nothing to compare.
    assert not row.peak[1] > budget / GIB, f"{row.peak[1]:.2f} GiB, more than the budget of {budget / GIB:.2f}"


def check_scarce(bench: Bench, name: str, direction: Direction) -> None:
    """With less free memory than the whole large picture takes: a call without a plan does with it, and one that was
    told to compute the whole runs out of it and goes on with less."""
    ours, _ = sides(bench, name, torch.bfloat16)
    x = example(bench, name, direction, bench.large).to(bench.device, torch.bfloat16)
    whole, tiled = plan_of(ours, direction, x), plan_of(ours, direction, x, tile=(bench.tile,) * 2)
    expected = run(ours, direction, x, whole)
    room = (whole.peak_bytes + tiled.peak_bytes) // 2 - resident_bytes(ours, direction, x)
    with scarce(ours, room) as exhaustion:
        begun = time.perf_counter()
        plan = plan_of(ours, direction, x, memory_budget="free")
        print(f"\n{1e3 * (time.perf_counter() - begun):.1f} ms for\n{plan}")
        assert plan.mode == "tiled"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            made = run(ours, direction, x)
        assert relative_error(made, expected) <= TWO_WAYS
        with exhaustion, pytest.warns(UserWarning, match="ran out of memory"):
            made = run(ours, direction, x, whole)
        assert relative_error(made, expected) <= TWO_WAYS


@contextlib.contextmanager
def scarce(ours: AutoencoderKL, room: int) -> Iterator[contextlib.AbstractContextManager[object]]:
    """So many bytes are free, because something else has the others; on a CPU the model is told so, and what it gives
    makes a call run out of memory."""
    if ours.device.type == "cpu":
        ours._free_bytes = lambda: room  # type: ignore[method-assign]
        yield Exhaustion(0)
        return
    gc.collect()
    torch.cuda.empty_cache()
    ballast = torch.empty(torch.cuda.mem_get_info(ours.device)[0] - room, dtype=torch.uint8, device=ours.device)
    yield contextlib.nullcontext()
    del ballast
    torch.cuda.empty_cache()


# -------------------------------------------------------------------- its parts


def sides(bench: Bench, name: str, dtype: torch.dtype) -> tuple[AutoencoderKL, Any]:
    """Our model and diffusers', with the same weights."""
    arch, state = bench.arch(name), weights(bench, name)
    with torch.device("meta"):
        ours = AutoencoderKL(VAEConfig(arch_config=arch, fp16="retry"))
        theirs = diffusers.AutoencoderKL(**arch.to_dict())
    for model in (ours, theirs):
        model.load_state_dict(state, strict=True, assign=True)
        model.to(bench.device, dtype).eval().requires_grad_(False)
    return ours, theirs


@cache
def weights(bench: Bench, name: str) -> dict[str, Tensor]:
    """Random weights of the golden rule, float32 on the CPU."""
    model = AutoencoderKL(VAEConfig(arch_config=bench.arch(name)))
    fill(model, gains={"decoder.conv_out.weight": 0.5})
    return model.state_dict()


@cache
def reference(bench: Bench, name: str, direction: Direction) -> Tensor:
    """diffusers in float64, or in float32 without TF32 where a GPU is too small for that; kept on the CPU."""
    for dtype in (torch.float64, torch.float32):
        _, theirs = sides(bench, name, dtype)
        x = example(bench, name, direction, bench.pixels).to(bench.device, dtype)
        with contextlib.suppress(torch.OutOfMemoryError):
            return run(theirs, direction, x).cpu()
    pytest.skip(f"this GPU has too little memory for diffusers' {direction} of {bench.pixels}² in float32")


@cache
def tflop(bench: Bench, name: str, direction: Direction) -> float:
    """Operations of one call as diffusers does it, a multiply-add counted as two; found on shapes alone."""
    with torch.device("meta"):
        model = diffusers.AutoencoderKL(**bench.arch(name).to_dict())
    x = example(bench, name, direction, bench.pixels).to("meta")
    with FlopCounterMode(display=False) as counter:
        run(model, direction, x)
    return float(counter.get_total_flops()) / 1e12


def example(bench: Bench, name: str, direction: Direction, pixels: int) -> Tensor:
    if direction == "encode":
        return make_input("gpu", (1, 3, pixels, pixels), "image")
    return make_input("gpu", (1, bench.arch(name).latent_channels, pixels // 8, pixels // 8), "latent")
