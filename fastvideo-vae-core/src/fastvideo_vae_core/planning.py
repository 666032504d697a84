"""What calls of a network are going to do: the law of its sizes, and the plans that follow from a configuration, a
budget, several devices or a blend. How a plan is then computed is not known here.

Shape legend: as in `vae`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from fastvideo_vae_core import execution
from fastvideo_vae_core.blending import Blend, BlendedTiles
from fastvideo_vae_core.budget import choose
from fastvideo_vae_core.config import VAEConfig
from fastvideo_vae_core.errors import ConfigError, ShapeError
from fastvideo_vae_core.memory import Forecast, parse_bytes
from fastvideo_vae_core.plan import Direction, Plan
from fastvideo_vae_core.prediction import Rehearsals
from fastvideo_vae_core.sharding import Sharding
from fastvideo_vae_core.tiling import Axis, Step
from fastvideo_vae_core.units import Units

# The ranks that compute a call together.
Mesh = DeviceMesh | ProcessGroup | Sharding

# Tiles that a memory budget may choose from, in elements of the grid that is being computed.
_TILES = (2048, 1024, 512, 256, 128, 64)
_SLABS = (*_TILES, 32, 16)


class Planned(nn.Module, ABC):
    """A network of which calls can be planned: the half of `ParallelTiledVAE` that needs no numbers."""

    # Top-level modules of each half; those of a half that is not loaded do not exist.
    encoder_modules: ClassVar[tuple[str, ...]] = ("encoder",)
    decoder_modules: ClassVar[tuple[str, ...]] = ("decoder",)
    sample_layout: ClassVar[str]
    padding_mode: ClassVar[Literal["replicate", "constant"]] = "replicate"

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.blend: Blend | None = None
        self._forecasts: dict[tuple[Hashable, ...], Forecast] = {}

    # ---------------------------------------------------------------- what it has to know

    @property
    @abstractmethod
    def sample_axes(self) -> tuple[Axis, ...]:
        """From latent to sample sizes: an axis of n latents has `n * up - lead` samples."""

    @property
    @abstractmethod
    def channels(self) -> tuple[int, int]:
        """Channels of samples and of latents."""

    @abstractmethod
    def encode_steps(self) -> Sequence[Step]:
        """`_encode` in pieces that can be run tile by tile."""

    @abstractmethod
    def decode_steps(self) -> Sequence[Step]:
        """`_decode` in pieces that can be run tile by tile."""

    @abstractmethod
    def _compute(self, plan: Plan, x: Tensor, units: Units | None = None) -> Tensor:
        """A call as the plan says, which is also how its plan is rehearsed."""

    # ---------------------------------------------------------------- plans

    def plan_encode(
        self,
        shape: Sequence[int],
        *,
        memory_budget: int | str | None = None,
        tile: Sequence[int] | None = None,
        items: int | None = None,
        chunk: int | None = None,
        mesh: Mesh | None = None,
        blend: Blend | None = None,
    ) -> Plan:
        """Say how `encode` would compute samples of that shape.

        memory_budget: bytes, or a string such as "6GiB"; the plan that recomputes least and is predicted to fit. "free"
            is what the device has left, as for calls without a plan; a device that cannot say sets no budget.
        tile: extent of a tile along each axis behind (B, C), instead of the configured one.
        items: items of the batch at a time.
        chunk: latent frames of a piece, for video that streams.
        mesh: the ranks that compute it together: every one makes this plan and then the call, with the same input. The
            first gets the result, the others their slab of it; a `Sharding` says otherwise, and how long to wait.
        blend: overlapping tiles that are blended, see `enable_blending`.

        Raises:
            ShapeError: the architecture cannot take the shape.
            ConfigError: a chunk for a network that does not stream, a mesh of several axes, a blend beside other tiles,
                a budget or a mesh, or of sizes that do not fit the network.
            MemoryBudgetError: nothing fits; the message says the least that would do.
        """
        return self._planned("encode", shape, memory_budget, mesh, blend, tile=tile, items=items, chunk=chunk)

    def plan_decode(
        self,
        shape: Sequence[int],
        *,
        memory_budget: int | str | None = None,
        tile: Sequence[int] | None = None,
        items: int | None = None,
        chunk: int | None = None,
        mesh: Mesh | None = None,
        blend: Blend | None = None,
    ) -> Plan:
        """Say how `decode` would compute latents of that shape; arguments and errors as in `plan_encode`."""
        return self._planned("decode", shape, memory_budget, mesh, blend, tile=tile, items=items, chunk=chunk)

    # ---------------------------------------------------------------- sizes

    def encoded_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the latents of samples of that shape.

        Raises:
            ShapeError: a size is not legal; the message names the nearest ones.
        """
        self._check_layout("encode", shape)
        axes = self.sample_axes
        for size, axis in zip(shape[2:], axes, strict=True):
            surplus = (size + axis.lead) % axis.up
            if size < axis.up - axis.lead or (surplus and self.config.illegal_sizes == "refuse"):
                raise ShapeError(f"{self._illegal(shape)}, or use pad_to_valid() and crop_to()")
        latents = ((size + axis.lead) // axis.up for size, axis in zip(shape[2:], axes, strict=True))
        return (shape[0], self.channels[1], *latents)

    def decoded_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the samples of latents of that shape."""
        self._check_layout("decode", shape)
        if min(shape[2:]) < 1:
            raise ShapeError(f"latents need at least one element along each axis, got {tuple(shape)}")
        sizes = (axis.output_size(size) for size, axis in zip(shape[2:], self.sample_axes, strict=True))
        return (shape[0], self.channels[0], *sizes)

    def valid_sample_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The smallest legal sample shape that holds the given one."""
        sizes = (_round_up(size, axis) for size, axis in zip(shape[2:], self.sample_axes, strict=True))
        return (*shape[:2], *sizes)

    def pad_to_valid(self, x: Tensor) -> Tensor:
        """Extend samples at their far ends to the smallest legal shape: the last picture, row and column repeated, or
        silence for audio. `crop_to` with the shape that x had takes it off again."""
        target = self.valid_sample_shape(x.shape)
        amounts = [amount for new, old in zip(target[:1:-1], x.shape[:1:-1], strict=True) for amount in (0, new - old)]
        return F.pad(x, amounts, mode=self.padding_mode) if any(amounts) else x

    def crop_to(self, y: Tensor, shape: Sequence[int]) -> Tensor:
        """Cut samples to the sizes of `shape`, taking off what `pad_to_valid` added."""
        if any(want > have for want, have in zip(shape[2:], y.shape[2:], strict=True)):
            raise ShapeError(f"cannot crop {tuple(y.shape)} to the larger {tuple(shape)}")
        return y[(slice(None), slice(None), *(slice(size) for size in shape[2:]))]

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    # ---------------------------------------------------------------- what a family may say of its plans

    def _formulation(self, direction: Direction, dtype: torch.dtype) -> tuple[str, ...]:
        """For people: which of several ways to compute the same the network takes on this device in that type."""
        return ()

    def _configured_tile(self, shape: Sequence[int], output: Sequence[int]) -> tuple[int, ...] | None:
        """The tile that the configuration asks for; None computes whole grids."""
        if not self.config.use_tiling:
            return None
        return _tile((self.config.tile_sample_min_height, self.config.tile_sample_min_width), shape, output)

    def _chunk(
        self, direction: Direction, shape: Sequence[int], output: Sequence[int], asked: int | None
    ) -> int | None:
        """Latent frames of a piece for a call of these shapes; None where nothing streams."""
        if asked is not None:
            raise ConfigError(f"{type(self).__name__} does not stream in time; leave out chunk={asked}")
        return None

    def _budget_tiles(self, direction: Direction, shape: Sequence[int], output: Sequence[int]) -> list[tuple[int, ...]]:
        """Tiles that a memory budget may choose from, the largest first."""
        largest = max(*shape[-2:], *output[-2:])
        axes = min(2, len(shape) - 2)
        return [_tile((length,) * axes, shape, output) for length in _TILES if length < largest]

    def _budget_slabs(self, direction: Direction, shape: Sequence[int], output: Sequence[int]) -> list[tuple[int, ...]]:
        """Tiles that are cut along their height only, the largest first; none where there is no height."""
        if len(shape) < 4:
            return []
        height, width = (max(shape[axis], output[axis]) for axis in (-2, -1))
        return [_tile((rows, width), shape, output) for rows in _SLABS if rows < height]

    def _steps_know(self, plan: Plan) -> Hashable:
        """What the steps know of a plan beside its type and its device. Where it is the same, as in most of a search,
        a step does the same with crops of the same sizes, and is rehearsed once."""
        return plan.chunk

    def _blended_tiles(self, direction: Direction, shape: Sequence[int], blend: Blend) -> BlendedTiles:
        """How an input of that shape is cut and put together.

        Raises:
            ConfigError: the family has no blended tiles, or not with such sizes.
        """
        raise ConfigError(f"{type(self).__name__} has no blended tiles; leave out the blend ({blend})")

    # ---------------------------------------------------------------- how plans are made

    def _planned(
        self,
        direction: Direction,
        shape: Sequence[int],
        memory_budget: int | str | None = None,
        mesh: Mesh | None = None,
        blend: Blend | None = None,
        **options: Any,
    ) -> Plan:
        """A plan for this device or several, with the options of `_plan`."""
        blend = self.blend if blend is None else blend
        if memory_budget == "free":
            memory_budget = None
            if mesh is None and blend is None:
                return self._fastest(self._plan(direction, tuple(shape), **options), options)
        if mesh is None and blend is None:
            return self._plan(direction, tuple(shape), memory_budget, **options)
        plan = self._plan(direction, tuple(shape), **options)
        if blend is not None:
            if memory_budget is not None or plan.tile is not None:
                raise ConfigError(f"a blend ({blend}) brings its own tiles; leave out tiling and budgets")
            self._check_tiles(direction, shape, blend)
            plan = replace(plan, mode="blended", blend=blend, notes=(*plan.notes, "not the numbers of the whole"))
            if mesh is None:
                return plan
        latents = plan.output_shape if direction == "encode" else plan.input_shape
        sharding = Sharding.over(mesh).along(self._steps(direction), latents[2:])
        if sharding.pixels and len(shape) < 4:
            raise ConfigError("sound has no pixels; leave out pixels=True")
        plan = replace(plan, sharding=sharding)
        if blend is None and plan.chunk is not None and options.get("chunk") is None and sharding.axis:
            # A rank has less of every frame, so it takes more frames at a time, and exchanges are fewer.
            chunk = self._chunk(direction, plan.input_shape, plan.output_shape, plan.chunk * sharding.world)
            plan = replace(plan, chunk=chunk)
        return plan if memory_budget is None else self._within(plan, parse_bytes(memory_budget))

    def _plan(
        self,
        direction: Direction,
        shape: tuple[int, ...],
        memory_budget: int | str | None = None,
        tile: Sequence[int] | None = None,
        items: int | None = None,
        chunk: int | None = None,
    ) -> Plan:
        if tile is not None and len(tile) != len(shape) - 2:
            raise ShapeError(f"a tile of {self.sample_layout} has {len(shape) - 2} sizes, got {tuple(tile)}")
        output = self.encoded_shape(shape) if direction == "encode" else self.decoded_shape(shape)
        stored = self._half_dtype(direction)
        dtype, retry, notes = self._fp16(stored)
        tile = self._configured_tile(shape, output) if tile is None else tile
        chunk = self._chunk(direction, shape, output, chunk)
        plan = Plan(
            direction=direction,
            mode="whole" if tile is None else "tiled",
            input_shape=shape,
            output_shape=output,
            items=items or (1 if self.config.use_slicing else shape[0]),
            tile=None if tile is None else tuple(tile),
            dtype=dtype,
            device=self.device,
            retry=retry,
            chunk=chunk,
            notes=(*notes, *self._formulation(direction, dtype)),
            _predict=self._forecast,
        )
        return plan if memory_budget is None else self._within(plan, parse_bytes(memory_budget))

    def _fp16(self, stored: torch.dtype) -> tuple[torch.dtype, bool, tuple[str, ...]]:
        """Type to compute in, whether to retry in float32, and why."""
        if stored != torch.float16:
            return stored, False, ()
        policy, reason = self.config.fp16, "fp16='upcast'"
        if policy == "auto":
            if getattr(self.config.arch_config, "force_upcast", False):
                policy, reason = "upcast", "force_upcast of the checkpoint; fp16='retry' is faster on a GPU"
            elif self.device.type == "cpu":
                policy, reason = "upcast", "CPUs are many times slower in float16"
            else:
                policy = "retry"
        if policy == "upcast":
            return torch.float32, False, (f"float16 weights computed in float32: {reason}",)
        return stored, policy == "retry", ("float32 again if float16 overflows",) if policy == "retry" else ()

    def _check_tiles(self, direction: Direction, shape: Sequence[int], blend: Blend) -> None:
        """Refuse tiles that the network would refuse alone: what is left over for the last one may be too small."""
        sizes = {
            (*shape[:2], *(len(range(*part.indices(size))) for part, size in zip(crop[2:], shape[2:], strict=True)))
            for crop in self._blended_tiles(direction, shape, blend).crops
        }
        for each in sorted(sizes):
            try:
                self._plan(direction, each)
            except ShapeError as error:
                raise ShapeError(f"a tile of the blend ({blend}) does not work: {error}") from None

    def _within(self, plan: Plan, budget: int) -> Plan:
        """The fastest plan that is predicted to fit."""
        shapes = plan.direction, plan.input_shape, plan.output_shape
        rehearsed = replace(plan, _predict=Rehearsals(self).forecast)
        found = choose(rehearsed, budget, self._budget_tiles(*shapes), self._budget_slabs(*shapes))
        # Plans may be kept for long, and the rehearsals with them.
        return replace(found, _predict=plan._predict)

    def _fastest(self, plan: Plan, options: Mapping[str, Any]) -> Plan:
        """The plan, or a smaller one where it does not fit; what was asked for is not touched."""
        asked = self.config.use_tiling or self.config.use_slicing or any(each is not None for each in options.values())
        return plan if asked else execution.fitting(self, plan)

    def _free_bytes(self) -> int | None:
        """Memory that a call can have; None where the device cannot say."""
        return execution.free_bytes(self.device)

    def _forecast(self, plan: Plan) -> Forecast:
        """What a call will take as the plan says."""
        return Rehearsals(self).forecast(plan)

    def _shadow(self, direction: Direction) -> Self:
        """One half of this model without its weights, on the meta device."""
        half = replace(self.config, load_encoder=direction == "encode", load_decoder=direction == "decode")
        with torch.device("meta"):
            return type(self)(half)

    # ---------------------------------------------------------------- its halves

    def _steps(self, direction: Direction) -> Sequence[Step]:
        return self.encode_steps() if direction == "encode" else self.decode_steps()

    def _half_parameters(self, direction: Direction) -> Iterator[nn.Parameter]:
        loaded = self.config.load_encoder if direction == "encode" else self.config.load_decoder
        if not loaded:
            raise ConfigError(f"this model was loaded with load_{direction}r=False; load it with the {direction}r")
        modules = self.encoder_modules if direction == "encode" else self.decoder_modules
        return (each for name in modules for each in getattr(self, name).parameters())

    def _half_dtype(self, direction: Direction) -> torch.dtype:
        return next(self._half_parameters(direction)).dtype

    def _check_layout(self, direction: Direction, shape: Sequence[int]) -> None:
        channels = self.channels[0] if direction == "encode" else self.channels[1]
        axes = len(self.sample_axes) + 2
        if len(shape) != axes or shape[1] != channels or shape[0] < 1:
            what = f"samples {self.sample_layout}" if direction == "encode" else "latents"
            raise ShapeError(f"{direction} takes {what} with {axes} axes and {channels} channels, got {tuple(shape)}")

    def _illegal(self, shape: Sequence[int]) -> str:
        laws, lower, upper = [], [], []
        for size, axis in zip(shape[2:], self.sample_axes, strict=True):
            laws.append(f"{axis.up}k" + (f" + {axis.up - axis.lead}" if axis.lead else ""))
            upper.append(_round_up(size, axis))
            lower.append(upper[-1] if upper[-1] <= size else max(upper[-1] - axis.up, axis.up - axis.lead))
        nearest = " or ".join(dict.fromkeys(" x ".join(map(str, sizes)) for sizes in (lower, upper)))
        got = " x ".join(map(str, shape[2:]))
        return f"{type(self).__name__} needs sizes of the form {' x '.join(laws)}, got {got}; pass {nearest}"


def _tile(extent: Sequence[int], shape: Sequence[int], output: Sequence[int]) -> tuple[int, ...]:
    """A tile of that extent along the last axes; those in front of them, such as time, are not cut."""
    return (*map(max, shape[2 : -len(extent)], output[2 : -len(extent)]), *extent)


def _round_up(size: int, axis: Axis) -> int:
    latents = max(-(-(size + axis.lead) // axis.up), 1)
    return latents * axis.up - axis.lead
