"""The published configurations at real sizes on a GPU: accuracy, time and memory beside diffusers in one process.

At the end one markdown table is printed, for the package's README, and written to $PARITY_TABLE if that is set. The
same code runs on every machine as a rehearsal with tiny networks on the CPU, whose numbers are thrown away.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastvideo_vae_core.config import VAEConfig
from fastvideo_vae_core.plan import Direction
from fastvideo_vae_core.testing import bench as benches
from fastvideo_vae_core.testing.bench import (
    HOW,
    Row,
    Table,
    check_accuracy,
    compare,
    free_memory,
    plan_of,
    resident_bytes,
    run,
    warm_up,
    without_tf32,
)
from fastvideo_vae_core.testing.golden import fill, make_input
from fastvideo_vae_core.testing.parity import relative_error
from fastvideo_vae_core.testing.threads import single_thread
from fastvideo_vae_wan import WAN21, WAN22, AutoencoderKLWan, WanArchConfig

diffusers = pytest.importorskip("diffusers", reason="this machine has no diffusers to compare with")
# It warns of a list of modules to keep in float32, which is empty.
diffusers.logging.set_verbosity_error()

ARCHS = {"Wan 2.1": WAN21, "Wan 2.2": WAN22}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Largest absolute difference between ways to compute the same in float32.
SAME = 1e-5


@dataclass(frozen=True)
class Bench(benches.Bench):
    """Where things run, and how large they are, as grids of latents.

    Attributes:
        exact: what is compared with float64: 9 frames of 96 x 160.
        real: what is timed, and how often: 81 x 480 x 832, decoded at 81 x 720 x 1280, too; 121 x 704 x 1280.
        width: replaces the published ones in the rehearsal.
    """

    runs: int = 3
    exact: tuple[tuple[str, tuple[int, int, int]], ...] = (("Wan 2.1", (3, 12, 20)), ("Wan 2.2", (3, 6, 10)))
    real: tuple[tuple[str, Direction, tuple[int, int, int], int], ...] = (
        ("Wan 2.1", "decode", (21, 60, 104), 3),
        ("Wan 2.1", "encode", (21, 60, 104), 3),
        ("Wan 2.2", "decode", (31, 44, 80), 2),
        ("Wan 2.2", "encode", (31, 44, 80), 3),
        ("Wan 2.1", "decode", (21, 90, 160), 2),
    )
    width: int | None = None

    def arch(self, name: str) -> WanArchConfig:
        arch = ARCHS[name]
        if self.width is None:
            return arch
        return replace(arch, base_dim=self.width, decoder_base_dim=self.width if arch.is_residual else None)


# -------------------------------------------------------------------- on the GPU

ON_GPU = Bench(torch.device("cuda"))
FOOTNOTE = f"{HOW} The reference of the distance, which is relative, is diffusers in float64 at 9 frames of 96 x 160."


@pytest.fixture(scope="module", autouse=True)
def _without_tf32() -> Iterator[None]:
    with without_tf32():
        yield


@pytest.fixture(autouse=True)
def _memory_back() -> Iterator[None]:
    """The memory of one test is given back before the next."""
    yield
    free_memory()


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
    check_accuracy(measure(ON_GPU, table, name, direction, dict(ON_GPU.exact)[name], dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ARCHS)
def test_every_way_gives_the_same(name: str) -> None:
    check_ways(ON_GPU, name, torch.float32, SAME)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "direction", "grid", "runs"), ON_GPU.real, ids=str)
def test_faster_and_leaner_than_diffusers(
    table: Table, name: str, direction: Direction, grid: tuple[int, int, int], runs: int
) -> None:
    """bfloat16, which is what people run."""
    row = measure(ON_GPU, table, name, direction, grid, "bf16", runs)
    check_accuracy(row)
    assert row.ms[1] < row.ms[0]
    assert row.peak[1] <= row.peak[0]


# -------------------------------------------------------------------- the rehearsal


def test_rehearsal_on_the_cpu() -> None:
    """Everything above, tiny and on the CPU, so that it works when a GPU is at hand."""
    grid = (3, 3, 4)
    bench = Bench(torch.device("cpu"), runs=1, exact=(("Wan 2.1", grid), ("Wan 2.2", grid)), width=4)
    rehearsed = Table(bench, FOOTNOTE)
    cases: list[tuple[str, Direction]] = [("Wan 2.1", "decode"), ("Wan 2.2", "encode")]
    with single_thread():
        for name, direction in cases:
            check_accuracy(measure(bench, rehearsed, name, direction, grid, "fp32"))
        check_ways(bench, "Wan 2.1", torch.float64, 1e-12)
    text = str(rehearsed)
    assert "REHEARSAL" in text
    assert len(rehearsed.rows) == 2
    assert {line.count("|") for line in text.splitlines() if line.startswith("|")} == {11}


# -------------------------------------------------------------------- what is measured


def measure(
    bench: Bench,
    table: Table,
    name: str,
    direction: Direction,
    grid: tuple[int, int, int],
    dtype: str,
    runs: int | None = None,
) -> Row:
    """Both sides on the same input: first calls, memory and times; and, on a smaller one, the distance to float64."""
    wanted = DTYPES[dtype]
    ours, theirs = sides(bench, name, wanted)
    x = example(bench, name, direction, grid).to(bench.device, wanted)
    frames = x.shape if direction == "encode" else ours.decoded_shape(x.shape)
    warm_up(bench.device, wanted)
    row = compare(
        bench,
        f"{name} {direction} {'x'.join(map(str, frames[2:]))} {dtype}",
        (partial(run, theirs, direction, x), partial(run, ours, direction, x)),
        resident=resident_bytes(ours, direction, x),
        operations=tflop(bench, name, direction, grid),
        predicted=plan_of(ours, direction, x).peak_bytes,
        runs=runs,
    )
    small = example(bench, name, direction, dict(bench.exact)[name]).to(bench.device, wanted)
    theirs_apart, ours_apart = (
        relative_error(run(side, direction, small), reference(bench, name, direction)) for side in (theirs, ours)
    )
    row = replace(row, distance=(theirs_apart, ours_apart))
    table.add(row)
    return row


def check_ways(bench: Bench, name: str, dtype: torch.dtype, bound: float) -> None:
    """Pieces of several lengths, tiles, and a stream; the largest absolute difference."""
    ours, _ = sides(bench, name, dtype)
    z, x = (
        example(bench, name, each, dict(bench.exact)[name]).to(bench.device, dtype) for each in ("decode", "encode")
    )
    sample, parameters = run(ours, "decode", z), run(ours, "encode", x)
    for options in ({"chunk": 1}, {"chunk": 3}, {"tile": (x.shape[2], 2 * x.shape[3] // 3, x.shape[4] // 2)}):
        decoded = run(ours, "decode", z, plan_of(ours, "decode", z, **options))
        encoded = run(ours, "encode", x, plan_of(ours, "encode", x, **options))
        assert (decoded - sample).abs().max() <= bound, options
        assert (encoded - parameters).abs().max() <= bound * max(1, float(parameters.abs().max())), options
    with torch.no_grad():
        streamed = torch.cat(list(ours.decode_stream(z.split(2, 2))), 2)
    assert (streamed - sample).abs().max() <= bound


# -------------------------------------------------------------------- its parts


def sides(bench: Bench, name: str, dtype: torch.dtype) -> tuple[AutoencoderKLWan, Any]:
    """Our model and diffusers', with the same weights."""
    arch, state = bench.arch(name), weights(bench, name)
    config = {key: value for key, value in arch.to_dict().items() if key not in ("scaling_factor", "clip_output")}
    with torch.device("meta"):
        ours = AutoencoderKLWan(VAEConfig(arch_config=arch, fp16="retry"))
        theirs = diffusers.AutoencoderKLWan(**config)
    for model in (ours, theirs):
        model.load_state_dict(state, strict=True, assign=True)
        model.to(bench.device, dtype).eval().requires_grad_(False)
    return ours, theirs


@cache
def weights(bench: Bench, name: str) -> dict[str, Tensor]:
    """Random weights of the golden rule, float32 on the device; both sides only read them."""
    model = AutoencoderKLWan(VAEConfig(arch_config=bench.arch(name)))
    fill(model, gains={"decoder.conv_out.weight": 0.5})
    return model.to(bench.device).state_dict()


@cache
def reference(bench: Bench, name: str, direction: Direction) -> Tensor:
    """diffusers in float64, or in float32 without TF32 where a GPU is too small for that; kept on the CPU."""
    for dtype in (torch.float64, torch.float32):
        _, theirs = sides(bench, name, dtype)
        x = example(bench, name, direction, dict(bench.exact)[name]).to(bench.device, dtype)
        with contextlib.suppress(torch.OutOfMemoryError):
            return run(theirs, direction, x).cpu()
    pytest.skip(f"this GPU has too little memory for diffusers' {direction} in float32")


@cache
def tflop(bench: Bench, name: str, direction: Direction, grid: tuple[int, int, int]) -> float:
    """Operations of one call as diffusers does it, a multiply-add counted as two; found on shapes alone."""
    _, theirs = sides(bench, name, torch.float32)
    with FlopCounterMode(display=False) as counter:
        run(theirs.to("meta"), direction, example(bench, name, direction, grid, device="meta"))
    return float(counter.get_total_flops()) / 1e12


def example(bench: Bench, name: str, direction: Direction, grid: tuple[int, int, int], device: str = "cpu") -> Tensor:
    arch = bench.arch(name)
    shape: tuple[int, ...] = (1, arch.z_dim, *grid)
    kind = "latent"
    if direction == "encode":
        space = arch.scale_factor_spatial
        shape, kind = (1, 3, 4 * grid[0] - 3, space * grid[1], space * grid[2]), "video"
    return torch.empty(shape, device=device) if device == "meta" else make_input("gpu", shape, kind)
