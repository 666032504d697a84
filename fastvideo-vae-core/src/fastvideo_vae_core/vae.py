"""ParallelTiledVAE: the base class of every family. It carries execution, as planned by its base class in `planning`; a
family gives it the mathematics.

Shape legend: B batch, C channels; upper case T, H, W, S the sample grid, lower case t, h, w, s the latent grid.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import ClassVar, Generic, Literal, Self, TypeVar, overload

import torch
from torch import Tensor, nn

from fastvideo_vae_core import execution
from fastvideo_vae_core.blending import Blend, BlendedTiles
from fastvideo_vae_core.checkpoint import fingerprint
from fastvideo_vae_core.config import VAEConfig
from fastvideo_vae_core.errors import ConfigError, ShapeError
from fastvideo_vae_core.finite import is_finite
from fastvideo_vae_core.latents import Provenance
from fastvideo_vae_core.memory import excerpt, repeating, standing_for
from fastvideo_vae_core.ops.causal import CausalConv3d
from fastvideo_vae_core.outputs import DecoderOutput, EncoderOutput
from fastvideo_vae_core.plan import Direction, Plan
from fastvideo_vae_core.planning import Mesh as Mesh
from fastvideo_vae_core.planning import Planned
from fastvideo_vae_core.rehearsal import device_of
from fastvideo_vae_core.sharding import Sharding, run_blended, run_sharded
from fastvideo_vae_core.strips import Strip
from fastvideo_vae_core.tiling import Step, run_steps
from fastvideo_vae_core.units import Progress, Units, count_parts

Posterior = TypeVar("Posterior")


class ParallelTiledVAE(Planned, Generic[Posterior]):
    """An autoencoder that computes one answer, whatever the way: at once, item by item, or in tiles with exact halos.

    A family derives from it and gives the network in pieces: `_encode` and `_decode` on whole grids; `encode_steps` and
    `decode_steps`, which say of every piece how far it sees, what needs the whole grid and where statistics are
    global; and `sample_axes`, the law of sizes. Streaming families override `_stream`.

    Calls keep their state to themselves: they are re-entrant, and an exception leaves nothing behind.
    """

    family: ClassVar[str]
    component: ClassVar[str] = "vae"

    def __init__(self, config: VAEConfig) -> None:
        super().__init__(config)
        self._provenance: Provenance | None = None
        self._twins: dict[tuple[Direction, torch.dtype], tuple[VAEConfig, Self]] = {}

    # ---------------------------------------------------------------- what a family gives

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

    # ---------------------------------------------------------------- settings, under diffusers' names

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights; the decoder's where the halves differ."""
        return next(self._half_parameters("decode" if self.config.load_decoder else "encode")).dtype

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


def _in_16_bits_on_a_gpu(weight: Tensor) -> bool:
    return device_of(weight).type == "cuda" and weight.dtype in (torch.float16, torch.bfloat16)


def _pixels(y: Tensor) -> Tensor:
    """Levels of samples, which have to be numbers."""
    from fastvideo_vae_core.media.images import to_uint8

    if not is_finite(y):
        raise ShapeError("what was decoded holds NaN or infinity, which no pixel can show; bfloat16 does not overflow")
    return to_uint8(y)
