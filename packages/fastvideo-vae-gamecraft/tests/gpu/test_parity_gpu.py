"""The published network at real sizes on a GPU: accuracy, time and memory beside diffusers in one process.

At the end one markdown table is printed, for the package's README, and written to $PARITY_TABLE if that is set. The
same code runs on every machine as a rehearsal with a tiny network on the CPU, whose numbers are thrown away.
"""

from __future__ import annotations

import contextlib
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastvideo_vae_core.config import VAEConfig
from fastvideo_vae_core.outputs import DecoderOutput
from fastvideo_vae_core.plan import Direction
from fastvideo_vae_core.testing import bench as benches
from fastvideo_vae_core.testing.bench import (
    HOW,
    Row,
    Table,
    alone,
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

# Largest absolute difference between ways to compute the same.
SAME = {"fp32": 1e-5, "fp64": 1e-12}
# Two computations in 16 bits, each some percent from the exact one.
SIXTEEN_BIT_BOUND = 0.1
# What 33 frames of 704 x 1216 may take on an H100 in 16 bits.
H100_DECODE_MS, H100_DECODE_GIB = 1700.0, 20.0


# diffusers' tiles, smaller in space, so that a small video has some.
SMALL_TILES = replace(DIFFUSERS, pixels=64, pixels_stride=48)


FOOTNOTE = (
    f"{HOW} Here one side's calls come behind the other's, and memory is in segments that grow. diffusers has its"
    " framewise flags off. Where the note says so its attention was given prefixes instead of its mask, which at 33"
    " frames of 704 x 1216 takes 54 GiB in float32 and then 27 GiB more. The reference of the"
    " distance, which is relative, is diffusers, in float64 for float32 and in float32 for the others; where there are"
    " times, too, it is diffusers in the same type."
)


@dataclass(frozen=True)
class Bench(benches.Bench):
    """Where things run, and how large they are.

    Attributes:
        grid: latents of what is timed; (9, 88, 152) is 33 frames of 704 x 1216.
        masked: latents of what is timed with diffusers' own mask, too; 33 frames of 352 x 608.
        small: latents of what is compared with float32 and float64.
        tile: extent of exact tiles for the small video.
        blend: overlapping tiles for the small video.
        widths: replaces the published ones in the rehearsal.
    """

    runs: int = 3
    grid: tuple[int, ...] = (9, 88, 152)
    masked: tuple[int, ...] = (9, 44, 76)
    small: tuple[int, ...] = (6, 12, 14)
    tile: tuple[int, ...] = (9, 70, 64)
    blend: Blend = SMALL_TILES
    widths: tuple[int, ...] | None = None

    @property
    def arch(self) -> HunyuanVideoArchConfig:
        if self.widths is None:
            return HUNYUANVIDEO
        return replace(HUNYUANVIDEO, block_out_channels=self.widths, layers_per_block=1)


# -------------------------------------------------------------------- on the GPU

ON_GPU = Bench(torch.device("cuda"))


@pytest.fixture(scope="module", autouse=True)
def _without_tf32() -> Iterator[None]:
    with without_tf32():
        yield


@pytest.fixture(scope="module", autouse=True)
def _growing_segments() -> Iterator[None]:
    """diffusers' whole clips fit into 80 GB only where free memory in pieces counts as one."""
    if not torch.cuda.is_available():
        yield
        return
    torch.cuda.empty_cache()
    grow_segments(True)
    try:
        torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    except RuntimeError:
        # Not every machine can map memory.
        grow_segments(False)
    yield
    grow_segments(False)


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
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_as_exact_as_diffusers(table: Table, direction: Direction, dtype: str) -> None:
    check_accuracy(distances(ON_GPU, table, direction, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16"])
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
    check_speed(measure(ON_GPU, table, direction, dtype, ON_GPU.grid), direction)


@pytest.mark.gpu
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_faster_and_leaner_than_diffusers_with_its_mask(table: Table, direction: Direction) -> None:
    row = measure(ON_GPU, table, direction, "bf16", ON_GPU.masked, masked=True)
    assert row.ms[1] < row.ms[0], row
    assert row.peak[1] <= row.peak[0], row


@pytest.mark.gpu
def test_the_official_tiles(table: Table) -> None:
    """What published videos were decoded with. diffusers has no such mode, so there is nothing to compare."""
    measure_blend(ON_GPU, table, OFFICIAL)


# -------------------------------------------------------------------- the rehearsal


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_prefixes_are_what_diffusers_computes_under_its_mask(direction: Direction) -> None:
    bench = Bench(torch.device("cpu"), widths=(32,) * 4)
    _, theirs = sides(bench, torch.float64)
    x = example(bench, direction, (3, 3, 4)).double()
    masked = run(theirs, direction, x)
    attend_to_prefixes(theirs)
    assert_close(run(theirs, direction, x), masked, 1e-12, "float64")


def test_rehearsal_on_the_cpu() -> None:
    """Everything above, tiny and on the CPU, so that it works when a GPU is at hand."""
    bench = Bench(
        torch.device("cpu"),
        grid=(2, 3, 4),
        masked=(3, 2, 3),
        small=(5, 5, 3),
        tile=(7, 20, 30),
        blend=replace(DIFFUSERS, pixels=32, pixels_stride=24),
        runs=1,
        widths=(32,) * 4,
    )
    rehearsed = Table(bench, FOOTNOTE)
    with single_thread():
        for direction, dtype in zip(DIRECTIONS, ("fp32", "bf16"), strict=True):
            check_accuracy(distances(bench, rehearsed, direction, dtype))
            check_ways(bench, direction, dtype)
        check_blend(bench, "decode")
        measure(bench, rehearsed, "decode", "bf16", bench.grid)
        measure(bench, rehearsed, "encode", "bf16", bench.masked, masked=True)
        measure_blend(bench, rehearsed, OFFICIAL)
    text = str(rehearsed)
    assert "REHEARSAL" in text
    assert len(rehearsed.rows) == 5
    assert {line.count("|") for line in text.splitlines() if line.startswith("|")} == {11}


def test_our_side_is_measured_where_diffusers_runs_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(z: Tensor) -> Tensor:
        raise torch.OutOfMemoryError

    row = beside(decode, monkeypatch)
    assert math.isnan(row.ms[0])
    assert row.ms[1] > 0
    assert "ran out of memory" in row.note


def test_our_side_is_measured_where_diffusers_gives_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    row = beside(lambda z: DecoderOutput(sample=z * math.nan), monkeypatch)
    assert min(row.ms) > 0
    assert math.isnan(row.distance[1])
    assert "its result is not finite" in row.note


def beside(decode: Callable[[Tensor], Any], monkeypatch: pytest.MonkeyPatch) -> Row:
    """What is measured where that is diffusers' decoder."""
    monkeypatch.setattr(sys.modules[__name__], "attend_to_prefixes", lambda theirs: setattr(theirs, "decode", decode))
    bench = Bench(torch.device("cpu"), runs=1, widths=(32,) * 4)
    rehearsed = Table(bench, FOOTNOTE)
    with single_thread():
        row = measure(bench, rehearsed, "decode", "bf16", (2, 3, 4))
    assert rehearsed.rows == [row]
    return row


# -------------------------------------------------------------------- what is measured


def distances(bench: Bench, table: Table, direction: Direction, dtype: str) -> Row:
    """Of both sides to the reference, on a small video."""
    x = example(bench, direction, bench.small).to(bench.device, DTYPES[dtype])
    exact = reference(bench, direction, "fp64" if dtype == "fp32" else "fp32")
    ours, theirs = (relative_error(run(side, direction, x), exact) for side in sides(bench, DTYPES[dtype]))
    row = Row(what=f"{direction} {sizes(bench, bench.small)} {dtype}", distance=(theirs, ours))
    table.add(row)
    return row


def check_ways(bench: Bench, direction: Direction, dtype: str) -> None:
    """Pieces, exact tiles, and frames that follow one another from and to the host, against the whole clip at once; in
    16 bits by the norm, else by the largest difference."""
    ours, _ = sides(bench, DTYPES[dtype])
    x = example(bench, direction, bench.small).to(bench.device, DTYPES[dtype])
    whole = run(ours, direction, x, plan_of(ours, direction, x, chunk=bench.small[0]))
    plans = [plan_of(ours, direction, x, **options) for options in ({"chunk": 1}, {"chunk": 3}, {"tile": bench.tile})]
    frames = plan_of(ours, direction, x, tile=(1, 1 << 20, 1 << 20))
    steps = len(ours._steps(direction))
    for places in (("slabs", "slabs"), ("slabs", "anew")):
        plans.append(replace(frames, places=(places * steps)[:steps], host_shares=(0.5,) * steps))
    for plan in plans:
        made = run(ours, direction, x, plan)
        if dtype in SAME:
            apart, largest = float((made - whole).abs().max()), float(whole.abs().max())
            assert apart <= SAME[dtype], f"{apart:.2e} apart, numbers up to {largest:.2f}, in\n{plan}"
        else:
            assert_close(made, whole, SIXTEEN_BIT_BOUND, f"16 bits, in\n{plan}")


def check_blend(bench: Bench, direction: Direction) -> None:
    """Float32, a video of several tiles in time and space."""
    ours, theirs = sides(bench, torch.float32)
    blend = bench.blend
    theirs.use_framewise_encoding = theirs.use_framewise_decoding = True
    theirs.enable_tiling(blend.pixels, blend.pixels, None, blend.pixels_stride, blend.pixels_stride, None)
    x = example(bench, direction, bench.small).to(bench.device)
    made = run(ours, direction, x, plan_of(ours, direction, x, blend=blend))
    assert_close(made, run(theirs, direction, x), 1e-5, "float32 sums in another order")


def measure(
    bench: Bench, table: Table, direction: Direction, dtype: str, grid: tuple[int, ...], masked: bool = False
) -> Row:
    """Both sides on the same input: first calls, memory and times. Outputs are compared before times count.

    masked: with diffusers' attention as it is; else its mask, for which no GPU of 80 GB has room at video sizes, is
    replaced by prefixes, which is the same attention and faster.
    """
    ours, theirs = sides(bench, DTYPES[dtype])
    if not masked:
        attend_to_prefixes(theirs)
    x = example(bench, direction, grid).to(bench.device, DTYPES[dtype])
    calls = partial(run, theirs, direction, x), partial(run, ours, direction, x)
    warm_up(bench.device, DTYPES[dtype])
    what, note = f"{direction} {sizes(bench, grid)} {dtype}", "" if masked else "diffusers without its mask"
    known = {
        "resident": resident_bytes(ours, direction, x),
        "operations": tflop(bench, direction, grid),
        "predicted": plan_of(ours, direction, x).peak_bytes,
    }
    row = None
    # Behind the block, nothing holds what lay on the GPU when memory ran out.
    with contextlib.suppress(torch.OutOfMemoryError):
        row = compare(bench, what, calls, **known, apart=True)
    if row is None:
        del theirs, calls
        free_memory()
        row = alone(bench, what, partial(run, ours, direction, x), **known, note=f"{note}; it ran out of memory")
    else:
        # One side at a time, and what it makes lies on the host.
        exact, made = (call().cpu() for call in calls)
        apart = math.nan
        if exact.isfinite().all():
            apart = assert_close(made, exact, SIXTEEN_BIT_BOUND, "two computations in 16 bits")
        else:
            # Seen of diffusers' decode at full size, where ours is finite.
            note = f"{note}; its result is not finite"
            halves = (*x.shape[2:3], *(max(size // 2, 1) for size in x.shape[3:]))
            tile = halves if direction == "encode" else ours.decoded_shape((1, x.shape[1], *halves))[2:]
            tiled = run(ours, direction, x, plan_of(ours, direction, x, tile=tile)).cpu()
            assert_close(made, tiled, SIXTEEN_BIT_BOUND, "two ways in 16 bits")
        row = replace(row, distance=(math.nan, apart), note=note.removeprefix("; "))
    table.add(row)
    return row


def attend_to_prefixes(theirs: Any) -> None:
    """Let diffusers' middle blocks run without a mask: each frame asks the frames up to it, in a call of its own. All
    layers and their order stay."""
    for half in (theirs.encoder, theirs.decoder):
        half.mid_block.forward = partial(middle_without_mask, half.mid_block)


def middle_without_mask(block: Any, x_BCTHW: Tensor) -> Tensor:
    """What `HunyuanVideoMidBlock3D.forward` computes."""
    x_BCTHW = block.resnets[0](x_BCTHW)
    for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        frames, frame = x_BCTHW.shape[2], x_BCTHW.shape[3] * x_BCTHW.shape[4]
        tokens_BNC = x_BCTHW.flatten(2).mT
        normed = attention.group_norm(tokens_BNC.mT).mT
        q, k, v = (layer(normed).unsqueeze(1) for layer in (attention.to_q, attention.to_k, attention.to_v))
        mixed = [
            F.scaled_dot_product_attention(
                q[:, :, at * frame : (at + 1) * frame],
                k[:, :, : (at + 1) * frame],
                v[:, :, : (at + 1) * frame],
            )
            for at in range(frames)
        ]
        made = attention.to_out[0](torch.cat(mixed, 2).squeeze(1)) + tokens_BNC
        x_BCTHW = resnet(made.mT.unflatten(2, x_BCTHW.shape[2:]))
    return x_BCTHW


def check_speed(row: Row, direction: Direction) -> None:
    # Where diffusers ran out of memory, there is nothing to compare.
    if not math.isnan(row.ms[0]):
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
    row = alone(
        bench,
        f"decode {sizes(bench, bench.grid)} bf16",
        partial(run, ours, "decode", x, plan),
        resident=resident_bytes(ours, "decode", x),
        predicted=plan.peak_bytes,
        runs=1,
        note=f"blended, {blend}",
    )
    table.add(row)


# -------------------------------------------------------------------- its parts


def grow_segments(wanted: bool) -> None:
    with warnings.catch_warnings():
        # Of a newer name that torch 2.11 may not have.
        warnings.simplefilter("ignore", FutureWarning)
        torch.cuda.memory._set_allocator_settings(f"expandable_segments:{wanted}")


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
    return run(theirs, direction, example(bench, direction, bench.small).to(bench.device, DTYPES[dtype])).cpu()


@cache
def tflop(bench: Bench, direction: Direction, grid: tuple[int, ...]) -> float:
    """Operations of one call as diffusers does it, a multiply-add counted as two; found on shapes alone."""
    with torch.device("meta"):
        model = twin(bench)
        x = example(bench, direction, grid).to("meta")
        with FlopCounterMode(display=False) as counter:
            run(model, direction, x)
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
