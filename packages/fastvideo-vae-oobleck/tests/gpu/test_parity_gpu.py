"""The published configurations at real sizes on a GPU: accuracy, time and memory beside diffusers in one process.

At the end one markdown table is printed, for the package's README, and written to $PARITY_TABLE if that is set. The
same code runs on every machine as a rehearsal with tiny networks on the CPU, whose numbers are thrown away.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastvideo_vae_core.config import VAEConfig
from fastvideo_vae_core.graphs import Captured
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

# What a latent may cost in shorter audio, and in ten minutes, as multiples of one of 47.5 s: small grids fill a GPU
# less well, and pieces are computed with the context around them. Convolutions off the tensor cores cost 20 times.
SHORT_TIMES, LONG_TIMES = 2.0, 1.5


@dataclass(frozen=True)
class Bench(benches.Bench):
    """Where things run, and how large they are.

    Attributes:
        latents: length that is timed: 47.5 s of Stable Audio.
        short: length of a graph that is replayed: 5 s.
        long: length that is computed in pieces: ten minutes.
        odd: lengths in between, whose times are compared: 10 s, and pieces of ten minutes.
        exact: length that is compared with float64.
        width: replaces the published ones in the rehearsal.
    """

    latents: int = 1024
    short: int = 108
    long: int = 12_920
    odd: tuple[int, ...] = (215, 430, 532, 700)
    exact: int = 64
    width: int | None = None

    def arch(self, name: str) -> OobleckArchConfig:
        if self.width is None:
            return ARCHS[name]
        narrow = {"encoder_hidden_size": 2 * self.width, "decoder_channels": self.width}
        return replace(ARCHS[name], **narrow, decoder_input_channels=self.width, channel_multiples=(1, 1, 2, 2, 2))


# -------------------------------------------------------------------- on the GPU

ON_GPU = Bench(torch.device("cuda"))
FOOTNOTE = (
    f"{HOW} The reference of the distance, which is relative, is diffusers in float64 at a length of {ON_GPU.exact}"
    " latents."
)


@pytest.fixture(scope="module", autouse=True)
def _without_tf32() -> Iterator[None]:
    with without_tf32():
        yield


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[Table]:
    """The table of this run."""
    with Table(ON_GPU, FOOTNOTE).published(request.config) as measured:
        yield measured


CASES = [("Stable Audio", "fp16"), ("Stable Audio", "bf16"), ("Stable Audio", "fp32"), ("ACE-Step", "fp16")]


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "dtype"), CASES)
@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_as_exact_as_diffusers(table: Table, name: str, direction: Direction, dtype: str) -> None:
    check_accuracy(measure(ON_GPU, table, name, direction, dtype))


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
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_no_length_is_slow(direction: Direction, dtype: str) -> None:
    check_lengths(ON_GPU, direction, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_long_audio_fits_the_budget_that_it_is_given(table: Table, direction: Direction) -> None:
    check_budget(ON_GPU, table, direction)


# -------------------------------------------------------------------- the rehearsal


def test_rehearsal_on_the_cpu() -> None:
    """Everything above, tiny and on the CPU, so that it works when a GPU is at hand. Graphs need the GPU itself."""
    bench = Bench(torch.device("cpu"), latents=3, short=2, long=1100, exact=3, runs=1, width=1)
    rehearsed = Table(bench, FOOTNOTE)
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
                check_accuracy(row)
        check_pieces(replace(bench, exact=40), "decode", torch.float64, 1e-12)
    text = str(rehearsed)
    assert "REHEARSAL" in text
    assert len(rehearsed.rows) == 3
    assert {line.count("|") for line in text.splitlines() if line.startswith("|")} == {11}


# -------------------------------------------------------------------- what is measured


def measure(bench: Bench, table: Table, name: str, direction: Direction, dtype: str) -> Row:
    """Both sides on the same input: first calls, memory and times; and, on a shorter one, the distance to float64."""
    wanted = DTYPES[dtype]
    ours, theirs = sides(bench, name, wanted)
    x = example(bench, name, direction, bench.latents).to(bench.device, wanted)
    warm_up(bench.device, wanted)
    row = compare(
        bench,
        f"{name} {direction} {seconds_of(bench, name, bench.latents)} {dtype}",
        (partial(run, theirs, direction, x), partial(run, ours, direction, x)),
        resident=resident_bytes(ours, direction, x),
        operations=tflop(bench, name, direction),
        predicted=plan_of(ours, direction, x).peak_bytes,
    )
    short, exact = example(bench, name, direction, bench.exact), reference(bench, name, direction)
    theirs_apart, ours_apart = (
        relative_error(run(side, direction, short.to(bench.device, wanted)), exact) for side in (theirs, ours)
    )
    row = replace(row, distance=(theirs_apart, ours_apart))
    table.add(row)
    return row


def check_pieces(bench: Bench, direction: Direction, dtype: torch.dtype, bound: float) -> None:
    """Pieces of uneven lengths in one call, and a stream of chunks; the largest absolute difference."""
    ours, _ = sides(bench, "Stable Audio", dtype)
    x = example(bench, "Stable Audio", direction, bench.exact).to(bench.device, dtype)
    whole = run(ours, direction, x)
    tile = 17 * ours.hop_length + 5
    pieces = run(ours, direction, x, plan_of(ours, direction, x, tile=(tile,)))
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
            run(theirs, direction, each)
            assert torch.equal(replay(each), run(ours, direction, each))
        times = bench.in_turns([partial(run, theirs, direction, x), replay, partial(run, ours, direction, x)])
        operations = tflop(bench, "Stable Audio", direction) * latents / bench.latents
        row = Row(
            what=f"Stable Audio {direction} {seconds_of(bench, 'Stable Audio', latents)} fp16",
            ms=(1000 * times[0], 1000 * times[1]),
            tflops=(operations / times[0], operations / times[1]),
            note=f"as a CUDA graph; {1000 * times[2]:.1f} ms without",
        )
        table.add(row)


def check_lengths(bench: Bench, direction: Direction, dtype: str) -> None:
    """A latent costs about the same in audio of any length; as CUDA graphs, so that launches do not count."""
    ours, _ = sides(bench, "Stable Audio", DTYPES[dtype])
    costs = {}
    for latents in (bench.latents, *bench.odd):
        x = example(bench, "Stable Audio", direction, latents).to(bench.device, DTYPES[dtype])
        replay = partial(Captured(ours, plan_of(ours, direction, x)), x)
        bench.seconds(replay)
        costs[latents] = bench.in_turns([replay], runs=3)[0] / latents
    times = {latents: round(cost / costs[bench.latents], 2) for latents, cost in costs.items()}
    assert max(times.values()) <= SHORT_TIMES, times


def check_budget(bench: Bench, table: Table, direction: Direction) -> None:
    """Ten minutes, in pieces as they come by themselves, and within what a piece of 64 latents needs."""
    ours, _ = sides(bench, "Stable Audio", torch.float16)
    x = example(bench, "Stable Audio", direction, bench.long).to(bench.device, torch.float16)
    tile = 64 * ours.hop_length
    budget = plan_of(ours, direction, x, tile=(tile,)).peak_bytes
    plans = [plan_of(ours, direction, x), plan_of(ours, direction, x, memory_budget=budget)]
    short = partial(run, ours, direction, x[..., : x.shape[2] * bench.latents // bench.long])
    bench.seconds(short)
    (whole,) = bench.in_turns([short], runs=3)
    found = []
    for plan in plans:
        assert plan.tile is not None
        row = alone(
            bench,
            f"Stable Audio {direction} {seconds_of(bench, 'Stable Audio', bench.long)} fp16",
            partial(run, ours, direction, x, plan),
            resident=resident_bytes(ours, direction, x),
            operations=tflop(bench, "Stable Audio", direction) * bench.long / bench.latents,
            predicted=plan.peak_bytes,
            runs=3,
            note=f"exact pieces of {plan.tile[0] // ours.hop_length} latents",
        )
        table.add(row)
        found.append(row)
    if bench.on_gpu:
        assert found[0].ms[1] <= LONG_TIMES * 1000 * whole * bench.long / bench.latents, (found[0], whole)
    assert plans[1].tile is not None
    assert plans[1].tile >= (tile,)
    # What the allocator gave, workspaces of cuDNN included. Without a GPU there is nothing to compare.
    assert not row.peak[1] > budget / GIB, f"{row.peak[1]:.2f} GiB, more than the budget of {budget / GIB:.2f}"


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
            return run(theirs, direction, x).cpu()
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
