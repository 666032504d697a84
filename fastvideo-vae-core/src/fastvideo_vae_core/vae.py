"""ParallelTiledVAE: the base class of every family. It carries execution; a family gives it the mathematics.

Shape legend: B batch, C channels; upper case T, H, W, S the sample grid, lower case t, h, w, s the latent grid.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from fastvideo_vae_core import execution
from fastvideo_vae_core.blending import Blend, BlendedTiles
from fastvideo_vae_core.budget import choose
from fastvideo_vae_core.checkpoint import fingerprint
from fastvideo_vae_core.config import VAEConfig
from fastvideo_vae_core.errors import ConfigError, ShapeError
from fastvideo_vae_core.finite import is_finite
from fastvideo_vae_core.latents import Provenance
from fastvideo_vae_core.memory import Forecast, excerpt, parse_bytes, repeating, standing_for
from fastvideo_vae_core.ops.causal import CausalConv3d
from fastvideo_vae_core.outputs import DecoderOutput, EncoderOutput
from fastvideo_vae_core.plan import Direction, Plan
from fastvideo_vae_core.prediction import Rehearsals
from fastvideo_vae_core.rehearsal import device_of
from fastvideo_vae_core.sharding import Sharding, run_blended, run_sharded
from fastvideo_vae_core.strips import Strip
from fastvideo_vae_core.tiling import Axis, Step, run_steps
from fastvideo_vae_core.units import Progress, Units, count_parts

Posterior = TypeVar("Posterior")

# The ranks that compute a call together.
Mesh = DeviceMesh | ProcessGroup | Sharding

# Tiles that a memory budget may choose from, in elements of the grid that is being computed.
_TILES = (2048, 1024, 512, 256, 128, 64)
_SLABS = (*_TILES, 32, 16)


class ParallelTiledVAE(nn.Module, ABC, Generic[Posterior]):
    """An autoencoder that computes one answer, whatever the way: at once, item by item, or in tiles with exact halos.

    A family derives from it and gives the network in pieces: `_encode` and `_decode` on whole grids; `encode_steps` and
    `decode_steps`, which say of every piece how far it sees, what needs the whole grid and where statistics are
    global; and `sample_axes`, the law of sizes. Streaming families override `_stream`.

    Calls keep their state to themselves: they are re-entrant, and an exception leaves nothing behind.
    """

    family: ClassVar[str]
    component: ClassVar[str] = "vae"
    # Top-level modules of each half; those of a half that is not loaded do not exist.
    encoder_modules: ClassVar[tuple[str, ...]] = ("encoder",)
    decoder_modules: ClassVar[tuple[str, ...]] = ("decoder",)
    sample_layout: ClassVar[str]
    padding_mode: ClassVar[Literal["replicate", "constant"]] = "replicate"

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.blend: Blend | None = None
        self._provenance: Provenance | None = None
        self._forecasts: dict[tuple[Hashable, ...], Forecast] = {}
        self._twins: dict[tuple[Direction, torch.dtype], tuple[VAEConfig, Self]] = {}

    # ---------------------------------------------------------------- what a family gives

    @property
    @abstractmethod
    def sample_axes(self) -> tuple[Axis, ...]:
        """From latent to sample sizes: an axis of n latents has `n * up - lead` samples."""

    @property
    @abstractmethod
    def channels(self) -> tuple[int, int]:
        """Channels of samples and of latents."""

    @abstractmethod
    def _encode(self, x: Tensor) -> Tensor:
        """Samples to the parameters of the posterior, on the whole grid."""

    @abstractmethod
    def _decode(self, z: Tensor) -> Tensor:
        """Un-normalised latents to samples, on the whole grid."""

    @abstractmethod
    def posterior(self, parameters: Tensor) -> Posterior:
        """The distribution that the encoder's output describes."""

    @abstractmethod
    def encode_steps(self) -> Sequence[Step]:
        """`_encode` in pieces that can be run tile by tile."""

    @abstractmethod
    def decode_steps(self) -> Sequence[Step]:
        """`_decode` in pieces that can be run tile by tile."""

    @abstractmethod
    def normalize_latents(self, z: Tensor) -> Tensor:
        """Raw latents to those that the diffusion model sees, in the official order of operations."""

    @abstractmethod
    def denormalize_latents(self, z: Tensor) -> Tensor:
        """The inverse of `normalize_latents`."""

    # ---------------------------------------------------------------- calls

    @overload
    def encode(
        self,
        x: Tensor,
        return_dict: Literal[True] = True,
        *,
        plan: Plan | None = None,
        progress: Progress | None = None,
    ) -> EncoderOutput[Posterior]: ...

    @overload
    def encode(
        self, x: Tensor, return_dict: Literal[False], *, plan: Plan | None = None, progress: Progress | None = None
    ) -> tuple[Posterior]: ...

    def encode(
        self, x: Tensor, return_dict: bool = True, *, plan: Plan | None = None, progress: Progress | None = None
    ) -> EncoderOutput[Posterior] | tuple[Posterior]:
        """Compress samples in [-1, 1] to a distribution over un-normalised latents.

        x: samples in `sample_layout`, on the model's device; computed in the encoder's dtype.
        plan: from `plan_encode`; without one what the configuration asks for, or else, where the device can say how
            much memory is free, the fastest that is predicted to fit.
        progress: called between the units of the plan (items, tiles, layers or pieces of frames) with those that are
            done and how many there are, from (0, total) on; from 0 anew where a call is computed again. What it raises
            ends the call, and leaves nothing behind.

        Raises:
            ShapeError: the architecture cannot take the shape; the message names the nearest legal ones.
            ConfigError: the encoder was not loaded, or the plan is another call's.
            MemoryBudgetError: nothing is predicted to fit, or memory ran out, and again in a smaller plan.
        """
        posterior = self.posterior(self._run("encode", x, plan, progress))
        return EncoderOutput(posterior) if return_dict else (posterior,)

    @overload
    def decode(
        self,
        z: Tensor,
        return_dict: Literal[True] = True,
        generator: torch.Generator | None = None,
        *,
        plan: Plan | None = None,
        progress: Progress | None = None,
    ) -> DecoderOutput: ...

    @overload
    def decode(
        self,
        z: Tensor,
        return_dict: Literal[False],
        generator: torch.Generator | None = None,
        *,
        plan: Plan | None = None,
        progress: Progress | None = None,
    ) -> tuple[Tensor]: ...

    def decode(
        self,
        z: Tensor,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
        *,
        plan: Plan | None = None,
        progress: Progress | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Decode un-normalised latents to samples, nominally in [-1, 1].

        z: (B, latent channels, ...) on the model's device; computed in the decoder's dtype.
        generator: for decoders that draw noise; the others are deterministic and leave it alone.
        plan, progress: as in `encode`; the plan is from `plan_decode`.

        Raises:
            ShapeError: z has the wrong number of axes or channels.
            ConfigError: the decoder was not loaded, or the plan is another call's.
            MemoryBudgetError: as in `encode`.
        """
        sample = self._run("decode", z, plan, progress)
        return DecoderOutput(sample) if return_dict else (sample,)

    def encode_stream(self, x: Tensor | Iterable[Tensor], *, mesh: Mesh | None = None) -> Iterator[Posterior]:
        """Yield the posterior of each finished piece. Images stream item by item; see `_stream` of video and audio.

        mesh: the ranks that compute it together, see `plan_encode`. Each of them has to be given the same chunks and to
            iterate to the end, but only the destination gets pieces.

        Raises:
            ConfigError: the network streams on one device only, or no rank is to have the pieces.
        """
        for piece in self._streamed("encode", x, mesh):
            yield self.posterior(piece)

    def decode_stream(self, z: Tensor | Iterable[Tensor], *, mesh: Mesh | None = None) -> Iterator[Tensor]:
        """Yield each finished piece of the samples. Images stream item by item; see `_stream` of video and audio, and
        `encode_stream` for the mesh."""
        return self._streamed("decode", z, mesh)

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction through the mode of the posterior; differentiable, for training."""
        return self._decode(self.posterior(self._encode(x)).mode())  # type: ignore[attr-defined]

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

    # ---------------------------------------------------------------- settings, under diffusers' names

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights; the decoder's where the halves differ."""
        return next(self._half_parameters("decode" if self.config.load_decoder else "encode")).dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    @property
    def shares_streams(self) -> bool:
        """Whether several devices can compute a stream together."""
        streams, shares = type(self)._stream, type(self)._shared_stream
        return streams is ParallelTiledVAE._stream or shares is not ParallelTiledVAE._shared_stream

    @property
    def provenance(self) -> Provenance:
        """Which checkpoint this is, as latent files record it."""
        if self._provenance is None:
            return Provenance(
                family=self.family,
                component=self.component,
                checkpoint=fingerprint(self.state_dict().items()),
            )
        return self._provenance

    def enable_tiling(
        self, tile_sample_min_height: int | None = None, tile_sample_min_width: int | None = None
    ) -> None:
        """Compute in tiles from now on, with the same result as at once."""
        height = self.config.tile_sample_min_height if tile_sample_min_height is None else tile_sample_min_height
        width = self.config.tile_sample_min_width if tile_sample_min_width is None else tile_sample_min_width
        self.config = replace(self.config, use_tiling=True, tile_sample_min_height=height, tile_sample_min_width=width)

    def disable_tiling(self) -> None:
        """Compute whole grids from now on."""
        self.config = replace(self.config, use_tiling=False)

    def enable_slicing(self) -> None:
        """Compute one item of the batch at a time from now on."""
        self.config = replace(self.config, use_slicing=True)

    def disable_slicing(self) -> None:
        """Compute the batch at once from now on."""
        self.config = replace(self.config, use_slicing=False)

    def enable_blending(self, blend: Blend) -> None:
        """Cut into overlapping tiles and blend them from now on: published numbers, not the network's own."""
        self.config = replace(self.config, use_tiling=False)
        self.blend = blend

    def disable_blending(self) -> None:
        """Compute the network's own numbers from now on."""
        self.blend = None

    # ---------------------------------------------------------------- execution

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Behind every `.to()`: 16-bit convolutions on a GPU run fastest on channels-last grids, and grids take the
        layout of the weights; everywhere else the plain layout keeps to the reference's order of operations."""
        self._twins.clear()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for module in self.modules():
            if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
                weight = module.weight
                last = _in_16_bits_on_a_gpu(weight)
                order = (0, *range(2, weight.ndim), 1) if last else range(weight.ndim)
                inverse = (0, weight.ndim - 1, *range(1, weight.ndim - 1)) if last else range(weight.ndim)
                weight.data = weight.data.permute(*order).contiguous().permute(*inverse)
                if last and isinstance(module, CausalConv3d):
                    module.arrange()
            elif isinstance(module, nn.ConvTranspose1d):
                # Taps in rows of channels, as `ops.conv1d` copies them; or plain.
                order = (2, 1, 0) if _in_16_bits_on_a_gpu(module.weight) else (0, 1, 2)
                module.weight.data = module.weight.data.permute(*order).contiguous().permute(*order)
        return self

    def _run(self, direction: Direction, x: Tensor, plan: Plan | None, progress: Progress | None = None) -> Tensor:
        x = self._as_planned(x)
        return execution.run(self, self._matching(direction, x, plan), x, progress)

    def _as_planned(self, x: Tensor) -> Tensor:
        """What is given to a call in the shape that plans have; the same again of what is in that shape already."""
        return x

    def _matching(self, direction: Direction, x: Tensor, plan: Plan | None) -> Plan:
        """The plan, which must be for this call, or one made for it."""
        if plan is None:
            return self._planned(direction, tuple(x.shape), "free")
        if (plan.direction, plan.input_shape) != (direction, tuple(x.shape)):
            wanted = f"{plan.direction} of {plan.input_shape}"
            raise ConfigError(f"the plan is for {wanted}, not for {direction} of {tuple(x.shape)}; make a new one")
        return plan

    def _finish(self, direction: Direction, y: Tensor) -> Tensor:
        """The last touch on what the network made, such as an official clamp; behind the check for overflow, which a
        clamp would hide."""
        return y

    def _compute(self, plan: Plan, x: Tensor, units: Units | None = None) -> Tensor:
        dtype = x.dtype
        units = Units() if units is None else units
        model = self if plan.dtype == dtype else self._twin(plan.direction, plan.dtype)
        result: Tensor | None = None
        for start, times in excerpt(range(0, len(x), plan.items), lambda start: min(plan.items, len(x) - start)):
            if not times:
                continue
            part = x[start : start + plan.items].to(plan.dtype)
            with standing_for(times):
                made = model._execute(plan, part, units).to(dtype).contiguous()
            if plan.items >= len(x):
                return made
            if result is None:
                result = made.new_empty((len(x), *made.shape[1:]))
            result[start : start + plan.items] = made
        assert result is not None
        return result

    def _execute(self, plan: Plan, x: Tensor, units: Units) -> Tensor:
        """Compute some items of a batch in the plan's type, as the plan says; says `units.begin` and what is done."""
        if plan.in_steps:
            return self._run_steps(plan, self._steps(plan.direction), x, units)
        if isinstance(plan.blend, Blend):
            return self._run_tiles(plan, self._blended_tiles(plan.direction, x.shape, plan.blend), x, units)
        return self._at_once(plan, x, units)

    def _steps_know(self, plan: Plan) -> Hashable:
        """What the steps know of a plan beside its type and its device. Where it is the same, as in most of a search,
        a step does the same with crops of the same sizes, and is rehearsed once."""
        return plan.chunk

    def _at_once(self, plan: Plan, x: Tensor, units: Units) -> Tensor:
        """Whole grids through the network, in pieces of frames if the plan says so."""
        units.begin(1)
        made = self._encode(x) if plan.direction == "encode" else self._decode(x)
        units.done()
        return made

    def _run_steps(self, plan: Plan, steps: Sequence[Step], x: Tensor, units: Units) -> Tensor:
        """The network in steps, tile by tile, on this device or together with others."""
        units.begin(count_parts(steps, x.shape[2:], plan))
        if plan.sharding is not None:
            return run_sharded(steps, x, plan.tile, plan.sharding, units.done)
        assert plan.tile is not None
        with repeating(steps):
            return run_steps(steps, x, plan.tile, plan.places, plan.host_shares, tiles=plan.tiles, done=units.done)

    def _run_tiles(self, plan: Plan, tiles: BlendedTiles, x: Tensor, units: Units) -> Tensor:
        """The network on each of the tiles that are blended then, on this device or in turns with others."""

        def compute(crop: Sequence[slice]) -> Tensor:
            made = self._at_once(plan, x[tuple(crop)], Units())
            units.done()
            return made

        if plan.sharding is not None:
            units.begin(len(tiles.crops[plan.sharding.rank :: plan.sharding.world]))
            return run_blended(tiles, compute, x, plan.sharding)
        units.begin(len(tiles.crops))
        return tiles.join(map(compute, tiles.crops))

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

    def _blended_tiles(self, direction: Direction, shape: Sequence[int], blend: Blend) -> BlendedTiles:
        """How an input of that shape is cut and put together.

        Raises:
            ConfigError: the family has no blended tiles, or not with such sizes.
        """
        raise ConfigError(f"{type(self).__name__} has no blended tiles; leave out the blend ({blend})")

    def _stream(self, direction: Direction, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Finished pieces along the axis that streams: for images the batch, one item at a time."""
        for chunk in chunks:
            for item in chunk.split(1):
                yield self._run(direction, item, None)

    def _streamed(self, direction: Direction, chunks: Tensor | Iterable[Tensor], mesh: Mesh | None) -> Iterator[Tensor]:
        """The pieces of a stream, on the rank that is to have them."""
        chunks = (chunks,) if isinstance(chunks, Tensor) else chunks
        if mesh is None:
            return self._stream(direction, chunks)
        sharding = Sharding.over(mesh)
        if sharding.destination is None:
            raise ConfigError("a stream needs a rank that gets the pieces; pass a Sharding with a destination")
        return self._at_destination(self._shared_stream(direction, chunks, sharding), sharding)

    def _at_destination(self, pieces: Iterator[Tensor], sharding: Sharding) -> Iterator[Tensor]:
        with sharding.line.watched():
            for piece in pieces:
                if sharding.rank == sharding.destination:
                    yield piece

    def _shared_stream(self, direction: Direction, chunks: Iterable[Tensor], sharding: Sharding) -> Iterator[Tensor]:
        """`_stream` on several devices, whole pieces at the destination; families that stream in time override it."""
        if not self.shares_streams:
            raise ConfigError(f"{type(self).__name__} streams on one device only; leave out the mesh")
        for chunk in chunks:
            for item in chunk.split(1):
                yield self._run(direction, item, self._planned(direction, tuple(item.shape), mesh=sharding))

    def _strip(self, direction: Direction, piece: Tensor, sharding: Sharding) -> Strip:
        """This rank's strip of the pictures of a stream, of which this is the first piece."""
        shape = tuple(piece.shape)
        latents = self.encoded_shape(shape) if direction == "encode" else shape
        sharding = sharding.along(self._steps(direction), latents[2:])
        if sharding.axis == 0:
            raise ConfigError("a stream is cut in rows or columns; leave out axis=0")
        strip = Strip(sharding, latents[2 + (sharding.axis or 0)])
        strip.ranks.agree((direction, shape, self._fp16(self._half_dtype(direction)), str(sharding)), piece.device)
        return strip

    def _sent(self, direction: Direction, made: Tensor, sharding: Sharding) -> Tensor:
        """What a rank has computed, as the destination is to get it."""
        return _pixels(made) if sharding.pixels and direction == "decode" else made

    def _steps(self, direction: Direction) -> Sequence[Step]:
        return self.encode_steps() if direction == "encode" else self.decode_steps()

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

    def _fastest(self, plan: Plan, options: Mapping[str, Any]) -> Plan:
        """The plan, or a smaller one where it does not fit; what was asked for is not touched."""
        asked = self.config.use_tiling or self.config.use_slicing or any(each is not None for each in options.values())
        return plan if asked else execution.fitting(self, plan)

    def _free_bytes(self) -> int | None:
        """Memory that a call can have; None where the device cannot say."""
        return execution.free_bytes(self.device)

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

    def _within(self, plan: Plan, budget: int) -> Plan:
        """The fastest plan that is predicted to fit."""
        shapes = plan.direction, plan.input_shape, plan.output_shape
        rehearsed = replace(plan, _predict=Rehearsals(self).forecast)
        found = choose(rehearsed, budget, self._budget_tiles(*shapes), self._budget_slabs(*shapes))
        # Plans may be kept for long, and the rehearsals with them.
        return replace(found, _predict=plan._predict)

    def _forecast(self, plan: Plan) -> Forecast:
        """What a call will take as the plan says."""
        return Rehearsals(self).forecast(plan)

    def _shadow(self, direction: Direction) -> Self:
        """One half of this model without its weights, on the meta device."""
        half = replace(self.config, load_encoder=direction == "encode", load_decoder=direction == "decode")
        with torch.device("meta"):
            return type(self)(half)

    def _twin(self, direction: Direction, dtype: torch.dtype) -> Self:
        """One half of this model in another type. A copy, so that calls at the same time do not see each other.

        Where every call needs it, it is kept, because making the modules costs more than many a call, and is given the
        weights as they are now: always the same numbers unless somebody changes them.
        """
        if dtype != self._fp16(self._half_dtype(direction))[0] or torch.is_grad_enabled():
            return self._new_twin(direction, dtype)
        # Not made in inference mode, whose tensors could not be written outside it.
        with torch.inference_mode(False), torch.no_grad():
            config, twin = self._twins.get((direction, dtype), (None, self))
            if config is not self.config:
                twin = self._new_twin(direction, dtype)
                self._twins[direction, dtype] = self.config, twin
                return twin
            own = self.state_dict()
            names, theirs = zip(*twin.state_dict().items(), strict=True)
            torch._foreach_copy_(theirs, [own[name] for name in names])
        return twin

    def _new_twin(self, direction: Direction, dtype: torch.dtype) -> Self:
        twin = self._shadow(direction)
        wanted = twin.state_dict().keys()
        weights = {name: each.to(dtype) for name, each in self.state_dict().items() if name in wanted}
        twin.load_state_dict(weights, strict=True, assign=True)
        frozen = not any(each.requires_grad for each in self._half_parameters(direction))
        return twin.to(dtype).train(self.training).requires_grad_(not frozen)

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


def _in_16_bits_on_a_gpu(weight: Tensor) -> bool:
    return device_of(weight).type == "cuda" and weight.dtype in (torch.float16, torch.bfloat16)


def _pixels(y: Tensor) -> Tensor:
    """Levels of samples, which have to be numbers."""
    from fastvideo_vae_core.media.images import to_uint8

    if not is_finite(y):
        raise ShapeError("what was decoded holds NaN or infinity, which no pixel can show; bfloat16 does not overflow")
    return to_uint8(y)


def _round_up(size: int, axis: Axis) -> int:
    latents = max(-(-(size + axis.lead) // axis.up), 1)
    return latents * axis.up - axis.lead
