"""The published configurations at real sizes on a GPU: accuracy, time and memory beside diffusers in one process.

At the end one markdown table is printed, for the package's README, and written to $PARITY_TABLE if that is set. The
same code runs on every machine as a rehearsal with tiny networks on the CPU, whose numbers are thrown away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastvideo_vae_core.config import VAEArchConfig, VAEConfig
from fastvideo_vae_core.graphs import Captured
from fastvideo_vae_core.plan import Direction
from fastvideo_vae_core.testing import bench as benches
from fastvideo_vae_core.testing.bench import (
    HOW,
    Row,
    Table,
    check_accuracy,
    compare,
    copied_bytes,
    free_memory,
    plan_of,
    resident_bytes,
    run,
    warm_up,
    without_tf32,
)
from fastvideo_vae_core.testing.golden import make_input
from fastvideo_vae_core.testing.parity import relative_error
from fastvideo_vae_core.testing.threads import single_thread
from fastvideo_vae_ltx2 import (
    LTX2_AUDIO,
    LTX20_VIDEO,
    LTX20_VOCODER,
    LTX23_VIDEO,
    LTX23_VOCODER,
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    LTX2AudioArchConfig,
    LTX2VideoArchConfig,
    LTX2Vocoder,
    LTX2VocoderArchConfig,
)

MODELS = {
    LTX2VideoArchConfig: AutoencoderKLLTX2Video,
    LTX2AudioArchConfig: AutoencoderKLLTX2Audio,
    LTX2VocoderArchConfig: LTX2Vocoder,
}
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DIRECTIONS: tuple[Direction, ...] = ("decode", "encode")
VIDEO = ("LTX-2.0 video", "LTX-2.3 video")
VOCODERS = ("LTX-2.0 vocoder", "LTX-2.3 vocoder")
# Grids of latents of 121 x 512 x 768 and of 121 x 1088 x 1920.
REAL, LARGE = (16, 16, 24), (16, 34, 60)
# What 121 frames of 512 x 768 may take on an H100 in bfloat16.
H100_DECODE_MS = 170.0
# Largest absolute difference between ways to compute the same in float32.
SAME = 1e-5


@dataclass(frozen=True, kw_only=True)
class Bench(benches.Bench):
    """Where things run, and how large they are.

    Attributes:
        twin: from our model to diffusers' own with the same weights.
        archs: the networks, by name.
        exact: latents of the video that is compared with float64: 17 frames of 128 x 160.
        short: frames of the spectrogram that is compared with float64.
        frames: of the spectrogram that is timed: five seconds.
    """

    twin: Callable[[Any], Any]
    runs: int = 3
    archs: tuple[tuple[str, Any], ...] = (
        ("LTX-2.0 video", LTX20_VIDEO),
        ("LTX-2.3 video", LTX23_VIDEO),
        ("audio", LTX2_AUDIO),
        ("LTX-2.0 vocoder", LTX20_VOCODER),
        ("LTX-2.3 vocoder", LTX23_VOCODER),
    )
    exact: tuple[int, ...] = (3, 4, 5)
    short: int = 101
    frames: int = 501

    def arch(self, name: str) -> Any:
        return dict(self.archs)[name]

    def small(self, name: str) -> tuple[int, ...]:
        """Extent of what is compared with float64."""
        return self.exact if name in VIDEO else (self.short,)


# -------------------------------------------------------------------- on the GPU

FOOTNOTE = (
    f"{HOW} The reference of the distance, which is relative, is diffusers in float64 at 17 frames of 128 x 160, and at"
    " 101 frames of a spectrogram. Spectrograms are 100 frames a second. 16-bit weights of the LTX-2.3 vocoder are"
    " computed in float32 here, as officially; its first stage is clamped on both sides."
)


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
def on_gpu(diffusers_twin: Callable[[Any], Any]) -> Bench:
    return Bench(torch.device("cuda"), twin=diffusers_twin)


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest, on_gpu: Bench) -> Iterator[Table]:
    """The table of this run."""
    with Table(on_gpu, FOOTNOTE).published(request.config) as measured:
        yield measured


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", VIDEO)
def test_as_exact_as_diffusers(table: Table, on_gpu: Bench, name: str, direction: Direction, dtype: str) -> None:
    check_accuracy(distances(on_gpu, table, name, direction, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "grid", "direction"),
    [
        ("LTX-2.0 video", REAL, "decode"),
        ("LTX-2.0 video", REAL, "encode"),
        ("LTX-2.0 video", LARGE, "decode"),
        ("LTX-2.3 video", REAL, "decode"),
        ("LTX-2.3 video", REAL, "encode"),
    ],
    ids=str,
)
def test_faster_and_leaner_than_diffusers(
    table: Table, on_gpu: Bench, name: str, grid: tuple[int, ...], direction: Direction
) -> None:
    """bfloat16, which is what people run."""
    row = measure(on_gpu, table, name, direction, grid, "bf16")
    check_accuracy(row)
    assert row.ms[1] < row.ms[0], row
    assert row.peak[1] <= row.peak[0] / (2 if grid == LARGE else 1), row
    timed = name == "LTX-2.0 video" and direction == "decode" and grid == REAL
    if timed and "H100" in torch.cuda.get_device_name():
        assert row.ms[1] <= H100_DECODE_MS, row


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "direction", "dtype"),
    [
        ("audio", "decode", "bf16"),
        ("audio", "encode", "bf16"),
        ("audio", "decode", "fp32"),
        ("audio", "encode", "fp32"),
        ("LTX-2.0 vocoder", "decode", "fp32"),
        ("LTX-2.0 vocoder", "decode", "bf16"),
        ("LTX-2.3 vocoder", "decode", "fp32"),
        ("LTX-2.3 vocoder", "decode", "bf16"),
    ],
)
def test_sound_is_as_exact_as_diffusers(
    table: Table, on_gpu: Bench, name: str, direction: Direction, dtype: str
) -> None:
    check_accuracy(measure(on_gpu, table, name, direction, (on_gpu.frames,), dtype))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "direction"), [("audio", "decode"), ("audio", "encode"), ("LTX-2.0 vocoder", "decode")]
)
def test_a_graph_replays_sound(table: Table, on_gpu: Bench, name: str, direction: Direction) -> None:
    check_graph(on_gpu, table, name, direction)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*VIDEO, "audio", *VOCODERS])
def test_every_way_gives_the_same(on_gpu: Bench, name: str) -> None:
    check_ways(on_gpu, name, torch.float32, SAME)


# -------------------------------------------------------------------- the rehearsal


def test_rehearsal_on_the_cpu(diffusers_twin: Callable[[Any], Any], random_model: Callable[[str], Any]) -> None:
    """Everything above, tiny and on the CPU, so that it works when a GPU is at hand."""
    narrow = {"LTX-2.0 video": "2.0", "LTX-2.3 video": "2.3", "audio": "audio"}
    narrow |= {"LTX-2.0 vocoder": "vocoder 2.0", "LTX-2.3 vocoder": "vocoder 2.3"}
    bench = Bench(
        torch.device("cpu"),
        twin=diffusers_twin,
        runs=1,
        archs=tuple((name, random_model(which).arch) for name, which in narrow.items()),
        exact=(3, 2, 2),
        short=13,
        frames=13,
    )
    rehearsed = Table(bench, FOOTNOTE)
    cases: list[tuple[str, Direction]] = [("audio", "encode"), *((name, "decode") for name in VOCODERS)]
    with single_thread():
        check_accuracy(distances(bench, rehearsed, "LTX-2.0 video", "decode", "bf16"))
        check_accuracy(distances(bench, rehearsed, "LTX-2.3 video", "encode", "fp32"))
        check_accuracy(measure(bench, rehearsed, "LTX-2.3 video", "decode", (2, 2, 2), "fp32"))
        for name, direction in cases:
            check_accuracy(measure(bench, rehearsed, name, direction, (bench.frames,), "fp32"))
        for name in ("LTX-2.0 video", "audio", "LTX-2.0 vocoder"):
            check_ways(bench, name, torch.float64, 1e-12)
    text = str(rehearsed)
    assert "REHEARSAL" in text
    assert len(rehearsed.rows) == 6
    assert {line.count("|") for line in text.splitlines() if line.startswith("|")} == {11}


# -------------------------------------------------------------------- what is measured


def distances(bench: Bench, table: Table, name: str, direction: Direction, dtype: str) -> Row:
    """Of both sides to diffusers in float64, on something small."""
    apart = both_apart(bench, name, direction, dtype)
    row = Row(what=f"{title(bench, name, direction, bench.small(name))} {dtype}", distance=apart)
    table.add(row)
    return row


def measure(bench: Bench, table: Table, name: str, direction: Direction, grid: tuple[int, ...], dtype: str) -> Row:
    """Both sides on the same input: first calls, memory and times; and, on a smaller one, the distance to float64."""
    ours, theirs = sides(bench, name, dtype)
    x = example(bench, name, direction, grid).to(bench.device, DTYPES[dtype])
    warm_up(bench.device, DTYPES[dtype])
    row = compare(
        bench,
        f"{title(bench, name, direction, grid)} {dtype}",
        (partial(call, theirs, direction, x), partial(call, ours, direction, x)),
        resident=resident_bytes(ours, direction, x),
        copied=copied_bytes(ours, direction),
        operations=tflop(bench, name, direction, grid),
        predicted=plan_of(ours, direction, x).peak_bytes,
    )
    del ours, theirs, x
    row = replace(row, distance=both_apart(bench, name, direction, dtype))
    table.add(row)
    return row


def both_apart(bench: Bench, name: str, direction: Direction, dtype: str) -> tuple[float, float]:
    """Distances of diffusers and of ours, whose stream must be as exact as its one call."""
    exact = reference(bench, name, direction)
    x = example(bench, name, direction, bench.small(name)).to(bench.device, DTYPES[dtype])
    ours, theirs = sides(bench, name, dtype)
    apart = [relative_error(call(side, direction, x), exact) for side in (theirs, ours)]
    streamed = relative_error(stream(ours, direction, x, -(-x.shape[2] // 3)), exact)
    return apart[0], max(apart[1], streamed)


def check_graph(bench: Bench, table: Table, name: str, direction: Direction) -> None:
    """Replayed in bfloat16 the numbers are those of a call."""
    ours, theirs = sides(bench, name, "bf16")
    x = example(bench, name, direction, (bench.frames,)).to(bench.device, torch.bfloat16)
    captured = Captured(ours, plan_of(ours, direction, x))

    def replay(x: Tensor = x) -> Tensor:
        made = captured(x)
        return made.sample if direction == "decode" else made.latent_dist.parameters

    for each in (x, x.flip(2)):
        assert torch.equal(replay(each), call(ours, direction, each))
    times = bench.in_turns([partial(call, theirs, direction, x), replay, partial(call, ours, direction, x)])
    operations = tflop(bench, name, direction, (bench.frames,))
    row = Row(
        what=f"{title(bench, name, direction, (bench.frames,))} bf16",
        ms=(1000 * times[0], 1000 * times[1]),
        tflops=(operations / times[0], operations / times[1]),
        note=f"as a CUDA graph; {1000 * times[2]:.1f} ms without",
    )
    table.add(row)
    assert row.ms[1] < row.ms[0], row


def check_ways(bench: Bench, name: str, dtype: torch.dtype, bound: float) -> None:
    """Pieces of several lengths, tiles, and a stream; the largest absolute difference."""
    ours, _ = sides(bench, name, next(key for key, each in DTYPES.items() if each == dtype))
    for direction in DIRECTIONS[: 1 if name in VOCODERS else 2]:
        x = example(bench, name, direction, bench.small(name)).to(bench.device, dtype)
        whole = call(ours, direction, x)
        limit = bound * max(1, float(whole.abs().max()))
        for options in ways(bench, name):
            made = run(ours, direction, x, plan_of(ours, direction, x, **options))
            assert float((made - whole).abs().max()) <= limit, (direction, options)
        for chunk in (1, 9):
            assert float((stream(ours, direction, x, chunk) - whole).abs().max()) <= limit, (direction, chunk)


def ways(bench: Bench, name: str) -> list[dict[str, Any]]:
    """Options of plans."""
    if name in VIDEO:
        time, height, width = (8 * bench.exact[0] - 7, *(32 * size for size in bench.exact[1:]))
        return [{"chunk": 1}, {"chunk": 2}, {"tile": (time, 2 * height // 3, width // 2)}]
    if name in VOCODERS:
        return [{"tile": (7 * bench.arch(name).hop,)}]
    return [{"tile": (12, bench.arch(name).mel_bins)}]


# -------------------------------------------------------------------- its parts


@torch.no_grad()
def call(model: Any, direction: Direction, x: Tensor) -> Tensor:
    """`run`, of vocoders too, which diffusers calls like any module."""
    if hasattr(model, "decode"):
        return run(model, direction, x)
    waveform: Tensor = model(x)
    return waveform


@torch.no_grad()
def stream(model: Any, direction: Direction, x: Tensor, chunk: int) -> Tensor:
    """Our model over chunks of that many frames, joined."""
    chunks = x.split(chunk, 2)
    if direction == "decode":
        return torch.cat(list(model.decode_stream(chunks)), 2)
    return torch.cat([posterior.parameters for posterior in model.encode_stream(chunks)], 2)


def sides(bench: Bench, name: str, dtype: str) -> tuple[Any, Any]:
    """Our model and diffusers', with the same weights."""
    arch = bench.arch(name)
    with torch.device("meta"):
        ours = MODELS[type(arch)](VAEConfig(arch_config=arch))
    # Copies, because each side puts its weights into an order in memory of its own.
    ours.load_state_dict({key: each.clone() for key, each in weights(bench, name).items()}, strict=True, assign=True)
    theirs = bench.twin(ours)
    if getattr(arch, "extension", None) is not None:
        # As the official code does, and ours.
        theirs.vocoder.final_act_fn = "clamp"
    return (side.to(bench.device, DTYPES[dtype]).eval().requires_grad_(False) for side in (ours, theirs))


@lru_cache(maxsize=1)
def weights(bench: Bench, name: str) -> dict[str, Tensor]:
    """Random weights, drawn on the device, because there are a billion of them."""
    arch: VAEArchConfig = bench.arch(name)
    torch.manual_seed(0)
    with bench.device:
        model = MODELS[type(arch)](VAEConfig(arch_config=arch)).requires_grad_(False)
    for key, buffer in model.named_buffers():
        if key.endswith(("filter", "_basis")):
            buffer.uniform_(0.0, 2.0 / buffer.shape[-1])
    return {key: each.detach() for key, each in model.state_dict().items()}


@cache
def reference(bench: Bench, name: str, direction: Direction) -> Tensor:
    """diffusers in float64, kept on the CPU."""
    _, theirs = sides(bench, name, "fp64")
    x = example(bench, name, direction, bench.small(name)).to(bench.device, torch.float64)
    return call(theirs, direction, x).cpu()


@cache
def tflop(bench: Bench, name: str, direction: Direction, grid: tuple[int, ...]) -> float:
    """Operations of one call as diffusers does it, a multiply-add counted as two; found on shapes alone."""
    _, theirs = sides(bench, name, "fp32")
    with FlopCounterMode(display=False) as counter:
        call(theirs.to("meta"), direction, example(bench, name, direction, grid, device="meta"))
    return float(counter.get_total_flops()) / 1e12


def example(bench: Bench, name: str, direction: Direction, grid: tuple[int, ...], device: str = "cpu") -> Tensor:
    """What goes in: of video by its grid of latents, of sound by its frames."""
    shape, kind = shape_of(bench, name, direction, grid)
    return torch.empty(shape, device=device) if device == "meta" else make_input("gpu", shape, kind)


def shape_of(bench: Bench, name: str, direction: Direction, grid: tuple[int, ...]) -> tuple[tuple[int, ...], str]:
    arch = bench.arch(name)
    if name in VOCODERS:
        return (1, arch.out_channels, *grid, arch.in_channels // arch.out_channels), "mel"
    if name == "audio":
        if direction == "encode":
            return (1, arch.in_channels, *grid, arch.mel_bins), "mel"
        return (
            1,
            arch.latent_channels,
            (grid[0] + arch.ratio - 1) // arch.ratio,
            arch.mel_bins // arch.ratio,
        ), "latent"
    if direction == "encode":
        return (1, 3, *pixels(grid)), "video"
    return (1, arch.latent_channels, *grid), "latent"


def pixels(grid: tuple[int, ...]) -> tuple[int, ...]:
    return (8 * grid[0] - 7, *(32 * size for size in grid[1:]))


def title(bench: Bench, name: str, direction: Direction, grid: tuple[int, ...]) -> str:
    if name in VIDEO:
        return f"{name} {direction} {'x'.join(map(str, pixels(grid)))}"
    return f"{name}{'' if name in VOCODERS else f' {direction}'} {grid[0]} frames"
