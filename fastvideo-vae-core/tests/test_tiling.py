"""Tile geometry, on layers of every kind that families have, and statistics that are merged over tiles."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import TypeVar

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastvideo_vae_core.errors import ShapeError
from fastvideo_vae_core.ops.norm import Moments, group_norm, group_norm_act
from fastvideo_vae_core.testing.contract.execution import tiles
from fastvideo_vae_core.testing.parity import relative_error
from fastvideo_vae_core.testing.toys import CausalConv, TimeDown, TimeUp
from fastvideo_vae_core.tiling import POINTWISE, WHOLE, Axis, Step, run_steps, spans

Layer = TypeVar("Layer", bound=nn.Module)

many = settings(max_examples=25, deadline=None, database=None)
few = settings(max_examples=12, deadline=None, database=None)


def seeded(shape: Sequence[int], seed: int = 0) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gap(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape
    return float((one - other).abs().max())


def double(layer: Layer) -> Layer:
    """A layer in float64, with weights that are the same in every run."""
    for index, each in enumerate(layer.parameters()):
        each.data = seeded(each.shape, index) / max(each[0].numel(), 1) ** 0.5
    return layer.requires_grad_(False)


class TestAxis:
    @pytest.mark.parametrize(
        ("axis", "size", "made"),
        [
            (POINTWISE, 5, 5),
            (Axis(up=2), 5, 10),
            (Axis(up=2, lead=1), 5, 9),
            (Axis(up=4, lead=3), 21, 81),
            (Axis(up=8, lead=7), 16, 121),
            (Axis(down=2), 7, 3),
            (Axis(down=2, lead=1), 9, 5),
            (Axis(down=4, lead=3), 81, 21),
            (Axis(down=2048), 8193, 4),
        ],
    )
    def test_sizes(self, axis: Axis, size: int, made: int) -> None:
        assert axis.output_size(size) == made

    @pytest.mark.parametrize(
        ("axis", "start", "stop", "size", "needed"),
        [
            (Axis(before=1, after=1), 0, 4, 9, (0, 5)),
            (Axis(before=1, after=1), 4, 9, 9, (3, 9)),
            (Axis(down=2, after=1), 2, 4, 16, (4, 9)),
            (Axis(down=2, before=1), 2, 4, 16, (2, 8)),
            (Axis(up=2, before=1, after=1), 3, 5, 8, (0, 4)),
            (Axis(up=2, lead=1, before=2), 7, 9, 8, (1, 5)),
            (Axis(down=2, lead=1, before=1), 3, 5, 16, (4, 9)),
            (WHOLE, 3, 4, 8, (0, 8)),
        ],
    )
    def test_needs(self, axis: Axis, start: int, stop: int, size: int, needed: tuple[int, int]) -> None:
        assert axis.needs(start, stop, size) == needed


class TestSpans:
    @given(size=st.integers(1, 500), tile=st.integers(1, 600))
    def test_they_cover_the_grid_evenly_and_are_as_few_as_can_be(self, size: int, tile: int) -> None:
        pieces = spans(size, tile)
        lengths = [stop - start for start, stop in pieces]
        assert pieces[0][0] == 0
        assert pieces[-1][1] == size
        assert all(one[1] == other[0] for one, other in itertools.pairwise(pieces))
        assert 1 <= min(lengths) <= max(lengths) <= tile
        assert max(lengths) - min(lengths) <= 1
        assert len(pieces) == -(-size // tile)

    @pytest.mark.parametrize("tile", [0, -3])
    def test_a_tile_of_nothing_is_refused(self, tile: int) -> None:
        with pytest.raises(ShapeError, match="at least 1 element"):
            spans(5, tile)


class Padded(nn.Module):
    """A convolution behind padding of its own."""

    def __init__(self, conv: nn.Module, *padding: int) -> None:
        super().__init__()
        self.conv, self.padding = conv, padding

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, self.padding))


class Up(nn.Module):
    """Nearest neighbour, then a convolution."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times, self.conv = times, nn.Conv1d(2, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.repeat_interleave(self.times, 2))


class Pool(nn.Module):
    """Groups of frames, the first of which lacks `lead`."""

    def __init__(self, down: int, lead: int) -> None:
        super().__init__()
        self.down, self.lead = down, lead

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (self.lead, 0), mode="replicate")
        x = x[..., : x.shape[-1] // self.down * self.down]
        # Weighted, so that the place inside a group counts.
        return (x.unflatten(-1, (-1, self.down)) * torch.arange(1.0, self.down + 1, dtype=x.dtype)).sum(-1)


class Spread(nn.Module):
    """Every frame many times, with its place inside the group; the first group lacks `lead`."""

    def __init__(self, up: int, lead: int) -> None:
        super().__init__()
        self.up, self.lead = up, lead

    def forward(self, x: Tensor) -> Tensor:
        y = x[..., None] * torch.arange(1.0, self.up + 1, dtype=x.dtype)
        return y.flatten(-2)[..., self.lead :]


LAYERS: dict[str, tuple[Callable[[], nn.Module], Axis]] = {
    "pointwise": (lambda: nn.Conv1d(2, 2, 1), POINTWISE),
    "convolution": (lambda: nn.Conv1d(2, 2, 5, padding=2), Axis(before=2, after=2)),
    "dilated": (lambda: nn.Conv1d(2, 2, 3, padding=9, dilation=9), Axis(before=9, after=9)),
    "causal": (lambda: Padded(nn.Conv1d(2, 2, 3), 2, 0), Axis(before=2)),
    "strided, padded behind": (lambda: Padded(nn.Conv1d(2, 2, 3, stride=2), 0, 1), Axis(down=2, after=1)),
    "strided, padded around": (lambda: nn.Conv1d(2, 2, 3, stride=2, padding=1), Axis(down=2, before=1)),
    "strided by five": (lambda: nn.Conv1d(2, 2, 10, stride=5, padding=3), Axis(down=5, before=3, after=4)),
    "nearest": (lambda: Up(2), Axis(up=2, before=1, after=1)),
    "nearest, three times": (lambda: Up(3), Axis(up=3, before=1, after=1)),
    "transposed": (
        lambda: nn.ConvTranspose1d(2, 2, 8, stride=4, padding=2),
        Axis(up=4, before=1, after=1),
    ),
    **{
        f"{kind.__name__.lower()} by {ratio} without {lead}": (
            lambda kind=kind, ratio=ratio, lead=lead: kind(ratio, lead),
            Axis(**{side: ratio}, lead=lead),  # type: ignore[arg-type]
        )
        for kind, side in ((Pool, "down"), (Spread, "up"))
        for ratio in (2, 4, 8)
        for lead in (0, 1, ratio - 1)
    },
}


@many
@given(tile=st.integers(1, 30), latents=st.integers(1, 12), surplus=st.integers(0, 3))
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_in_tiles_is_the_layer_at_once(name: str, tile: int, latents: int, surplus: int) -> None:
    make, axis = LAYERS[name]
    layer = double(make())
    size = latents if axis.up > 1 else latents * axis.down - axis.lead + surplus % axis.down
    x = seeded((1, 2, size))
    whole = layer(x)
    # Layers that pad around make one element more of a surplus, which the law of sizes refuses.
    assume(whole.shape[2] == axis.output_size(size) or not surplus % axis.down)
    step = Step(name=name, run=lambda grids, _: layer(grids[0]), axes=(axis,))
    assert gap(run_steps([step], x, (tile,)), whole) <= 1e-12


def test_a_halo_that_is_too_small_is_noticed() -> None:
    """The tests above would see a wrong halo."""
    layer = double(nn.Conv1d(2, 2, 5, padding=2))
    x = seeded((1, 2, 12))
    step = Step(name="conv", run=lambda grids, _: layer(grids[0]), axes=(Axis(before=1, after=2),))
    assert gap(run_steps([step], x, (4,)), layer(x)) > 1e-3


@few
@given(data=st.data(), grid=st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 6)))
@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_a_causal_network_in_tiles_is_the_network_at_once(
    direction: str, data: st.DataObject, grid: tuple[int, int, int]
) -> None:
    """Two changes of the frame rate, each of which keeps the first frame: 4k + 1 frames for k + 1 latents."""
    kind, axis = (
        (TimeDown, Axis(down=2, lead=1, before=1)) if direction == "encode" else (TimeUp, Axis(up=2, lead=1, before=2))
    )
    layers = [double(CausalConv(2, 2)), double(kind(2)), double(CausalConv(2, 2)), double(kind(2))]
    space = (Axis(before=1, after=1),) * 2
    axes = [(Axis(before=2), *space), (axis, POINTWISE, POINTWISE)] * 2
    steps = [
        Step(name=str(index), run=lambda grids, _, layer=layer: layer(grids[0]), axes=each)  # type: ignore[misc]
        for index, (layer, each) in enumerate(zip(layers, axes, strict=True))
    ]
    frames = grid[0] if direction == "decode" else 4 * grid[0] - 3
    x = seeded((1, 2, frames, *grid[1:]))
    whole = nn.Sequential(*layers)(x)
    assert whole.shape[2] == (4 * grid[0] - 3 if direction == "decode" else grid[0])
    tile = data.draw(tiles((4 * grid[0] - 3, *grid[1:])))
    assert gap(run_steps(steps, x, tile), whole) <= 1e-12


@few
@given(data=st.data(), size=st.tuples(st.integers(2, 11), st.integers(2, 11)))
def test_a_network_of_every_kind_of_step_in_tiles_is_the_network_at_once(
    data: st.DataObject, size: tuple[int, int]
) -> None:
    """Norms over the grid, a residual grid, a change of resolution and a step that needs everything."""
    network = double(Everything())
    x = seeded((2, 4, *size))
    tile = data.draw(tiles([2 * each for each in size]))
    assert gap(run_steps(network.steps(), x, tile), network(x)) <= 1e-12


class Everything(nn.Module):
    """x -> residual block -> softmax over all pixels -> twice the resolution -> norm and convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.GroupNorm(2, 4) for _ in range(3))
        self.conv1, self.conv2, self.conv3 = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x, None), x, None)
        return self.last(self.up(self.everywhere(x)), None)

    def first(self, x: Tensor, moments: Moments | None) -> Tensor:
        return self.conv1(group_norm_act(x, self.norm1, F.silu, moments))

    def second(self, residual: Tensor, x: Tensor, moments: Moments | None) -> Tensor:
        return self.conv2(group_norm_act(residual, self.norm2, F.silu, moments)) + x

    def everywhere(self, x: Tensor) -> Tensor:
        return x * x.flatten(2).softmax(-1).reshape(x.shape)

    def up(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2.0, mode="nearest")

    def last(self, x: Tensor, moments: Moments | None) -> Tensor:
        return self.conv3(group_norm(x, self.norm3, moments))

    def steps(self) -> list[Step]:
        conv = (Axis(before=1, after=1),) * 2
        return [
            Step(
                name="first",
                run=lambda grids, moments: self.first(grids[0], moments),
                axes=conv,
                writes="residual",
                norm=self.norm1,
            ),
            Step(
                name="second",
                run=lambda grids, moments: self.second(grids[0], grids[1], moments),
                axes=conv,
                reads=("residual", "x"),
                norm=self.norm2,
            ),
            Step(name="everywhere", run=lambda grids, _: self.everywhere(grids[0]), axes=(WHOLE, WHOLE)),
            Step(name="up", run=lambda grids, _: self.up(grids[0]), axes=(Axis(up=2),) * 2),
            Step(name="last", run=lambda grids, moments: self.last(grids[0], moments), axes=conv, norm=self.norm3),
        ]


class TestStatistics:
    """Where a step takes its statistics from, whatever came before it."""

    @staticmethod
    def norm_step(norm: nn.GroupNorm, **options: object) -> Step:
        return Step(
            name="norm",
            run=lambda grids, moments: group_norm(grids[0], norm, moments),
            axes=(POINTWISE,),
            norm=norm,
            **options,  # type: ignore[arg-type]
        )

    def test_a_grid_that_an_earlier_step_read_without_a_norm(self) -> None:
        norm = double(nn.GroupNorm(2, 4))
        x = seeded((1, 4, 12))
        copy = Step(name="copy", run=lambda grids, _: 2 * grids[0], axes=(POINTWISE,), writes="twice")
        both = Step(name="sum", run=lambda grids, _: grids[0] + grids[1], axes=(POINTWISE,), reads=("x", "twice"))
        made = run_steps([copy, self.norm_step(norm), both], x, (5,))
        assert gap(made, norm(x) + 2 * x) <= 1e-12

    def test_two_norms_of_one_grid_with_other_groups(self) -> None:
        one, other = double(nn.GroupNorm(2, 4)), double(nn.GroupNorm(4, 4))
        x = seeded((1, 4, 12))
        copy = Step(name="copy", run=lambda grids, _: 3 * grids[0], axes=(POINTWISE,))
        first = self.norm_step(one, writes="first")
        second = self.norm_step(other)
        both = Step(name="sum", run=lambda grids, _: grids[0] + grids[1], axes=(POINTWISE,), reads=("x", "first"))
        assert gap(run_steps([copy, first, second, both], x, (5,)), one(3 * x) + other(3 * x)) <= 1e-12


class TestMoments:
    @pytest.mark.parametrize("shape", [(2, 4, 50), (2, 4, 7, 9), (2, 4, 3, 5, 6)], ids=["audio", "image", "video"])
    def test_of_pieces_together_are_those_of_the_whole(self, shape: tuple[int, ...]) -> None:
        x = seeded(shape)
        whole = Moments.of(x, 2)
        for lengths in ((1, shape[-1] - 1), (2, 2, shape[-1] - 4)):
            merged = Moments.merged([Moments.of(piece, 2) for piece in x.split(lengths, dim=-1)])
            assert merged.size == whole.size
            assert gap(merged.mean, whole.mean) <= 1e-14
            assert relative_error(merged.spread, whole.spread) <= 1e-14

    def test_they_are_those_of_torch(self) -> None:
        x = seeded((2, 4, 50))
        moments = Moments.of(x, 2)
        grouped = x.reshape(2, 2, -1)
        assert gap(moments.mean, grouped.mean(-1)) <= 1e-14
        assert relative_error(moments.spread / moments.size, grouped.var(-1, correction=0)) <= 1e-14

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_a_large_mean_does_not_drown_a_small_deviation(self, dtype: torch.dtype) -> None:
        """Mean 1e4 and deviation 1: as a difference of squares, float32 would have no digit left."""
        x = (1e4 + seeded((1, 4, 32, 32))).to(dtype)
        merged = Moments.merged([Moments.of(piece, 2) for piece in x.split(5, dim=-1)])
        exact = x.double().reshape(1, 2, -1)
        assert relative_error(merged.mean, exact.mean(-1)) <= 1e-9
        assert relative_error(merged.spread / merged.size, exact.var(-1, correction=0)) <= 1e-6

    @pytest.mark.parametrize(("mean", "deviation"), [(0.0, 1.0), (1e4, 1.0), (1e4, 30.0), (-300.0, 0.1)])
    def test_normalising_with_them_is_as_exact_as_torch(self, mean: float, deviation: float) -> None:
        norm = nn.GroupNorm(2, 4).requires_grad_(False)
        x = (mean + deviation * seeded((2, 4, 24, 24))).float()
        exact = F.group_norm(x.double(), 2, norm.weight.double(), norm.bias.double(), norm.eps)
        ours = group_norm(x, norm, Moments.of(x, 2))
        # 3e-7: the last bits of float32 around one, where the mean does not cost them first.
        assert relative_error(ours, exact) <= max(1.5 * relative_error(norm(x), exact), 3e-7)


def test_grids_are_released_after_their_last_reader() -> None:
    alive: list[int] = []
    grids_made: list[weakref.ref[Tensor]] = []

    def run(grids: Sequence[Tensor], _: Moments | None) -> Tensor:
        made = grids[0] + 1
        grids_made.append(weakref.ref(made))
        alive.append(sum(each() is not None for each in grids_made))
        return made

    steps = [Step(name=str(index), run=run, axes=(POINTWISE,)) for index in range(6)]
    run_steps(steps, seeded((1, 2, 8)), (100,))
    # The grid that is read and the one that is made; the first step reads the input.
    assert alive == [1, 2, 2, 2, 2, 2]
