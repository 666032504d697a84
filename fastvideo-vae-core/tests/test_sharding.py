"""What ranks exchange, what they agree on, and how they fail together. That families give the same numbers on several
devices is part of the contract, see `fastvideo_vae_core.testing.contract.execution`."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fastvideo_vae_core.errors import ConfigError, ShapeError, ShardError
from fastvideo_vae_core.media.images import to_uint8
from fastvideo_vae_core.ops.norm import Moments
from fastvideo_vae_core.ranks import Ranks
from fastvideo_vae_core.sharding import Sharding, run_sharded
from fastvideo_vae_core.testing.ranks import on_ranks
from fastvideo_vae_core.testing.threads import single_thread
from fastvideo_vae_core.testing.toys import Toy, ToyImage, toy
from fastvideo_vae_core.tiling import POINTWISE, WHOLE, Axis, Step

LATENTS = (1, 4, 9, 5)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with single_thread():
        yield


def decoder() -> Toy:
    return toy(ToyImage).double().requires_grad_(False)


def latents() -> Tensor:
    return torch.randn(LATENTS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def over(group: object, timeout: float = 20.0, **options: Any) -> Sharding:
    return Sharding(group=group, timeout=timeout, **{"axis": 0, **options})


def joined(world: int, steps: Callable[[], list[Step]], x: Tensor) -> Tensor:
    """The slabs of all ranks together."""
    return torch.cat(on_ranks(world, lambda group: run_sharded(steps(), x, None, over(group))), 2)


class TestSlabs:
    @given(size=st.integers(1, 200), world=st.integers(1, 40))
    def test_they_cover_an_axis_evenly(self, size: int, world: int) -> None:
        class Group:
            def rank(self) -> int:
                return world - 1

            def size(self) -> int:
                return world

        sharding = Sharding(group=Group())
        spans = sharding.spans(size)
        lengths = [stop - start for start, stop in spans]
        assert (spans[0][0], spans[-1][1], len(spans)) == (0, size, world)
        assert all(one[1] == other[0] for one, other in itertools.pairwise(spans))
        assert max(lengths) - min(lengths) <= 1
        assert sharding.span(size) == spans[-1]

    def test_the_axis_is_the_longest_of_those_that_are_cut(self) -> None:
        steps = [
            Step(name="a", run=lambda grids, _: grids[0], axes=(WHOLE, POINTWISE, POINTWISE)),
            Step(name="b", run=lambda grids, _: grids[0], axes=(WHOLE,) * 3),
        ]
        (sharding,) = on_ranks(1, lambda group: Sharding(group=group).along(steps, (90, 5, 7)))
        assert sharding.axis == 2

    @pytest.mark.parametrize("wrong", [{"axis": 2}, {"axis": -1}, {"destination": 2}, {"timeout": 0}])
    def test_impossible_options_are_refused(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(ConfigError):
            on_ranks(2, lambda group: decoder().plan_decode(LATENTS, mesh=Sharding(group=group, **wrong)))


class TestExchange:
    def conv(self, halo: int) -> list[Step]:
        layer = nn.Conv1d(2, 2, 5, padding=2).double().requires_grad_(False)
        for index, each in enumerate(layer.parameters()):
            each.data = torch.randn(each.shape, generator=torch.Generator().manual_seed(index), dtype=torch.float64)
        axes = (Axis(before=halo, after=halo),)
        return [Step(name=str(each), run=lambda grids, _: layer(grids[0]), axes=axes) for each in range(3)]

    @pytest.mark.parametrize("world", [2, 3, 8])
    def test_a_halo_that_is_too_short_shows(self, world: int) -> None:
        x = torch.arange(18, dtype=torch.float64).view(1, 2, 9)
        whole = x
        for step in self.conv(2):
            whole = step.run([whole], None)
        assert (joined(world, lambda: self.conv(2), x) - whole).abs().max() <= 1e-12 * whole.abs().max()
        assert (joined(world, lambda: self.conv(1), x) - whole).abs().max() > 1e-3 * whole.abs().max()

    def test_only_halos_travel(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The input is everywhere; then two rows go each way between neighbours, for each further convolution."""
        sent: list[tuple[int, int, tuple[int, ...]]] = []
        operation = Ranks._operation

        def recorded(self: Ranks, kind: Any, rows: Tensor, peer: int) -> dist.P2POp:
            if kind is dist.isend:
                sent.append((self.rank, peer, tuple(rows.shape)))
            return operation(self, kind, rows, peer)

        monkeypatch.setattr(Ranks, "_operation", recorded)
        joined(3, lambda: self.conv(2), torch.ones(1, 2, 30, dtype=torch.float64))
        pairs = [(0, 1), (1, 0), (1, 2), (2, 1)]
        assert sorted(sent) == sorted((*pair, (1, 2, 2)) for pair in pairs for _ in range(2))

    @pytest.mark.parametrize("world", [2, 3, 5])
    def test_all_ranks_normalise_by_the_same_bits(self, world: int) -> None:
        seen: list[Moments] = []
        norm = nn.GroupNorm(2, 4).double()
        copy = Step(name="copy", run=lambda grids, _: grids[0].clone(), axes=(POINTWISE,))

        def run(grids: Any, moments: Moments | None) -> Tensor:
            assert moments is not None
            seen.append(moments)
            return grids[0]

        x = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 100
        joined(world, lambda: [copy, Step(name="norm", run=run, axes=(POINTWISE,), norm=norm)], x)
        whole = Moments.of(x, 2)
        assert len(seen) == world
        for moments in seen:
            assert moments.size == whole.size
            assert torch.equal(moments.mean, seen[0].mean)
            assert torch.equal(moments.spread, seen[0].spread)
            torch.testing.assert_close(moments.mean, whole.mean, rtol=1e-14, atol=0)
            torch.testing.assert_close(moments.spread, whole.spread, rtol=1e-12, atol=0)

    def test_channels_last_stays(self) -> None:
        layer = nn.Conv2d(8, 8, 3, padding=1).to(memory_format=torch.channels_last).requires_grad_(False)
        layouts: list[bool] = []

        def run(grids: Any, _: object) -> Tensor:
            layouts.append(grids[0].is_contiguous(memory_format=torch.channels_last))
            return layer(grids[0])

        step = Step(name="conv", run=run, axes=(Axis(before=1, after=1),) * 2)
        x = torch.randn(1, 8, 12, 6).contiguous(memory_format=torch.channels_last)
        on_ranks(2, lambda group: run_sharded([step] * 3, x, None, over(group)))
        assert layouts == [True] * 6


class TestPlan:
    def test_it_prints_the_devices_and_predicts_less_memory(self) -> None:
        vae = decoder()
        shape = (1, 4, 64, 64)
        plans = on_ranks(4, lambda group: vae.plan_decode(shape, mesh=group))
        assert "devices 4 ranks, slabs along axis 0 behind (B, C), whole on rank 0" in str(plans[0])
        assert len({plan.peak_bytes for plan in plans}) == 1
        assert plans[0].peak_bytes < vae.plan_decode(shape).peak_bytes

    def test_a_budget_counts_for_each_device(self) -> None:
        vae = decoder()
        shape = (1, 4, 64, 64)
        alone = vae.plan_decode(shape).peak_bytes
        plans = on_ranks(2, lambda group: vae.plan_decode(shape, mesh=group, memory_budget=alone - 1))
        assert [plan.mode for plan in plans] == ["whole", "whole"]
        assert vae.plan_decode(shape, memory_budget=alone - 1).mode == "tiled"

    def test_gradients_are_refused(self) -> None:
        x = latents().requires_grad_()
        with pytest.raises(ConfigError, match="differentiable"), torch.enable_grad():
            on_ranks(1, lambda group: graded(decoder(), group, x))

    def test_other_plans_on_other_ranks_are_refused(self) -> None:
        vae, z = decoder(), latents()

        def call(group: Any) -> str:
            plan = vae.plan_decode(LATENTS, mesh=over(group, axis=group.rank() // 2))
            with pytest.raises(ConfigError) as caught:
                vae.decode(z, plan=plan)
            return str(caught.value)

        for rank, said in enumerate(on_ranks(3, call)):
            assert f"ranks {[2] if rank < 2 else [0, 1]} made other plans" in said

    def test_float32_again_on_all_ranks_if_one_overflows(self) -> None:
        def call(group: Any) -> list[bool]:
            ranks = Ranks(over(group))
            return [ranks.agree_on_any(group.rank() == 1 and each, torch.device("cpu")) for each in (True, False)]

        assert on_ranks(3, call) == [[True, False]] * 3


class TestPixels:
    @pytest.mark.parametrize("world", [2, 3, 5])
    def test_they_are_those_of_one_device_bit_for_bit_and_nothing_else_is_sent(
        self, world: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        vae, z = decoder(), latents()
        whole = vae.decode(z).sample
        sent: list[torch.dtype] = []
        assemble = Ranks.assemble

        def noted(self: Ranks, own: Tensor, size: int) -> Tensor:
            sent.append(own.dtype)
            return assemble(self, own, size)

        monkeypatch.setattr(Ranks, "assemble", noted)

        def call(group: Any) -> Tensor:
            return vae.decode(z, plan=vae.plan_decode(LATENTS, mesh=over(group, pixels=True))).sample

        first, *others = on_ranks(world, call)
        assert torch.equal(first, to_uint8(whole))
        assert sent == [torch.uint8] * world
        assert {made.dtype for made in others} == {torch.uint8}

    def test_a_stream_sends_them_too(self) -> None:
        vae, z = decoder(), latents().expand(2, -1, -1, -1)
        sharding = {"pixels": True}
        pieces = on_ranks(2, lambda group: list(vae.decode_stream(z, mesh=over(group, **sharding))))
        assert torch.equal(torch.cat(pieces[0]), to_uint8(vae.decode(z).sample))
        assert pieces[1] == []

    def test_what_no_pixel_can_show_is_refused(self) -> None:
        z = latents()
        z[0, 0, -1, -1] = torch.nan
        with pytest.raises((ShapeError, ShardError), match="NaN"):
            on_ranks(
                2, lambda group: decoder().decode(z, plan=decoder().plan_decode(LATENTS, mesh=over(group, pixels=True)))
            )


class TestStreams:
    def test_a_reader_who_leaves_ends_the_others(self) -> None:
        """Whoever gets the pieces may stop; nobody else may wait for it then."""
        vae, z, started = decoder(), latents().expand(4, -1, -1, -1), time.monotonic()

        def call(group: Any) -> str:
            stream = vae.decode_stream(z, mesh=over(group, timeout=60.0))
            if group.rank() == 0:
                next(stream)
                stream.close()  # type: ignore[attr-defined]
                return ""
            with pytest.raises(ShardError) as caught:
                list(stream)
            return str(caught.value)

        _, said = on_ranks(2, call)
        assert "rank 0 failed with GeneratorExit" in said
        assert time.monotonic() - started < 10

    def test_it_needs_a_rank_that_gets_the_pieces(self) -> None:
        with pytest.raises(ConfigError, match="destination"):
            on_ranks(2, lambda group: list(decoder().decode_stream(latents(), mesh=over(group, destination=None))))


def graded(vae: Toy, group: Any, x: Tensor) -> Tensor:
    with torch.enable_grad():
        return vae.decode(x, plan=vae.plan_decode(LATENTS, mesh=group)).sample


class TestFailure:
    @pytest.mark.parametrize("world", [2, 3, 5])
    def test_a_rank_that_raises_makes_the_others_fail_at_once_with_its_reason(self, world: int) -> None:
        """Long before their time is over, and however far away they are."""
        z, started = latents(), time.monotonic()

        def call(group: Any) -> str:
            vae = decoder()
            if group.rank() == 1:
                last_convolution(vae).register_forward_pre_hook(fail)
            with pytest.raises(ArithmeticError if group.rank() == 1 else ShardError) as caught:
                vae.decode(z, plan=vae.plan_decode(LATENTS, mesh=over(group, timeout=60.0)))
            return str(caught.value)

        first, own, *others = on_ranks(world, call)
        assert own == "out of luck"
        for said in (first, *others):
            assert "rank 1 failed with ArithmeticError: out of luck" in said
        assert time.monotonic() - started < 5


def fail(*_: object) -> None:
    raise ArithmeticError("out of luck")


def last_convolution(vae: Toy) -> nn.Module:
    """A place in the middle of a call: others wait for what comes behind."""
    return [module for module in vae.decoder.modules() if isinstance(module, nn.Conv2d)][-1]


def start(job: str, world: int, folder: Path) -> list[subprocess.Popen[bytes]]:
    """So many ranks, in processes of their own."""
    script = Path(__file__).with_name("rank_jobs.py")
    command = [sys.executable, str(script), job, str(world), str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(world)]


def finish(processes: list[subprocess.Popen[bytes]], seconds: float) -> list[int | None]:
    """How each process ended; None for those that had to be ended."""
    end = time.monotonic() + seconds
    try:
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(end - time.monotonic(), 0.0))
        return [process.poll() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_processes_and_groups(tmp_path: Path) -> None:
    """A mesh over the world, and groups of two of which every process is in two."""
    assert finish(start("two_groups", 3, tmp_path), 60) == [0] * 3
    answers = [torch.load(tmp_path / f"{rank}.pt") for rank in range(3)]
    whole = decoder().decode(latents()).sample
    assert (answers[0]["mesh"] - whole).abs().max() <= 1e-12
    assert [answer["mesh"].shape[2] for answer in answers[1:]] == [whole.shape[2] // 3] * 2
    for one, other in ((0, 1), (1, 2), (0, 2)):
        made = torch.cat([answers[rank][f"{one}{other}"] for rank in (one, other)], 2)
        assert (made - whole).abs().max() <= 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("job", ["killed", "stopped"])
def test_a_rank_that_is_lost_makes_the_others_fail_in_time(tmp_path: Path, job: str) -> None:
    """Rank 1 of 3 goes in the middle of a call; the others have 10 s, and then their processes end by themselves."""
    processes = start(job, 3, tmp_path)
    ended = finish([processes[0], processes[2]], 60)
    finish(processes, 0)
    assert ended == [0, 0]
    for rank in (0, 2):
        answer = torch.load(tmp_path / f"{rank}.pt")
        assert answer["seconds"] < 11
        assert answer["error"].startswith("ShardError")
