"""Running a model over files: what goes on in time streams through it, everything else is computed at once.

Everything is a generator that pulls from the one before it, so that only what is on its way is in memory: pieces of a
file, of its latents, of the samples that come back. Memory does not grow with the length of a file.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvideo_vae_core.cli.console import in_shell_words, sizes
from fastvideo_vae_core.cli.samples import Source
from fastvideo_vae_core.distribution import randn_like
from fastvideo_vae_core.errors import ConfigError, MediaError, MemoryBudgetError
from fastvideo_vae_core.media.images import from_uint8
from fastvideo_vae_core.plan import Direction, Plan
from fastvideo_vae_core.sharding import Sharding
from fastvideo_vae_core.vae import ParallelTiledVAE

if TYPE_CHECKING:
    from fastvideo_vae_core.cli.model import Model

Item = TypeVar("Item")

# Latents that go through a network at a time, by the axes of the samples: more gain nothing in speed.
_LATENTS = {1: 512, 3: 8}
_HELD = "tiles go through the whole time, so the clip is held in memory; without them it streams from file to file"
_STREAMED = "streamed: the plan of a stretch, whose peak is that of any length"


class Stopwatch:
    """Seconds spent in each stage of generators that pull from each other; a stage pays for its own work only."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._stages: list[str] = []
        self._since = 0.0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Whatever runs inside belongs to this stage, unless it enters another."""
        self._lap()
        self._stages.append(name)
        try:
            yield
        finally:
            self._lap()
            self._stages.pop()

    def timed(self, name: str, items: Iterable[Item]) -> Iterator[Item]:
        """The same items, whose making belongs to this stage."""
        iterator = iter(items)
        while True:
            with self.stage(name):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def _lap(self) -> None:
        now = time.perf_counter()
        if self._stages:
            self.seconds[self._stages[-1]] += now - self._since
        self._since = now


class Encoding:
    """A file on its way to raw latents (1, C, t, ...): iterate over it, once, and get them in order on the device.

    Sizes that the architecture cannot take are padded, unless --no-pad: every frame at its right and bottom, and the
    end with the last frame again, or with silence.

    Attributes:
        plan: how it is computed; of a stretch, where the file streams. There behind the first piece at the latest.
        padded_shape: of what was really encoded; complete at the end.

    Raises:
        ShapeError: a size is not legal, with --no-pad.
        MediaError: the file holds nothing, or is broken on the way.
        MemoryBudgetError: nothing fits.
    """

    def __init__(self, model: Model, source: Source, path: Path, watch: Stopwatch) -> None:
        self._model, self._source, self._path, self._watch = model, source, path, watch
        self._generator = torch.Generator().manual_seed(model.options.seed)
        (self._axis, *_), self._no_pad = model.vae.sample_axes, model.options.no_pad
        length = source.shape[2] or self._axis.output_size(1)
        self.padded_shape = self._padded((*source.shape[:2], length, *source.shape[3:]))
        self._pace: int | None = None
        self.plan: Plan | None = None
        if model.medium.unit is not None:
            self.plan, self._pace = stretch(model, "encode", self.padded_shape, model.sharding)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Of the latents; complete at the end."""
        return self._model.vae.encoded_shape(self.padded_shape)

    def __iter__(self) -> Iterator[Tensor]:
        posteriors = self._whole() if self._pace is None else self._stream(self._pace)
        for posterior in self._watch.timed("encode", posteriors):
            yield self._latents(posterior)

    def _whole(self) -> Iterator[Any]:
        vae = self._model.vae
        x = torch.cat([*self._read(1 << 20)], dim=2)
        self._end()
        padded = x if self._no_pad else vae.pad_to_valid(x)
        self.plan = whole(self._model, "encode", padded.shape, self._model.sharding)
        with out_of_memory(self.plan), self._model.console.units("encode") as progress:
            posterior = vae.encode(padded, plan=self.plan, progress=progress).latent_dist
            synchronize(vae)
        yield posterior

    def _stream(self, pace: int) -> Iterator[Any]:
        assert self.plan is not None
        vae = self._model.vae
        with out_of_memory(self.plan):
            for posterior in vae.encode_stream(self._chunks(pace), mesh=self._model.sharding):
                synchronize(vae)
                yield posterior

    def _chunks(self, pace: int) -> Iterator[Tensor]:
        """The samples, `pace` latents behind the first one at a time, padded to legal sizes."""
        vae, last = self._model.vae, None
        for x in self._read(pace * self._axis.up, self._axis.output_size(1)):
            spare = [new - old for new, old in zip(self.padded_shape[:2:-1], x.shape[:2:-1], strict=True)]
            amounts = [amount for each in (*spare, 0) for amount in (0, each)]
            last = F.pad(x, amounts, mode=vae.padding_mode) if any(amounts) else x
            yield last
        self._end()
        missing = self.padded_shape[2] - self._source.shape[2]
        if last is not None and missing:
            repeated = last[:, :, -1:].expand(-1, -1, missing, *last.shape[3:])
            yield repeated if vae.padding_mode == "replicate" else torch.zeros_like(repeated)

    def _read(self, count: int, more: int = 0) -> Iterator[Tensor]:
        """The samples, so many at a time, and at first some more."""
        while True:
            with self._watch.stage("read"):
                x = self._source.read(count + more)
            if not x.shape[2]:
                return
            yield x
            more = 0

    def _end(self) -> None:
        """The file was read, and its length is known."""
        shape = self._source.shape
        if not shape[2]:
            raise MediaError(f"{self._path} holds no {'frames' if len(shape) == 5 else 'samples'}")
        self.padded_shape = self._padded(shape)
        if self.padded_shape != shape:
            self._model.console.remark(
                f"{sizes(shape[2:])} is padded to {sizes(self.padded_shape[2:])}; decoding takes the padding off again"
            )

    def _padded(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape that is encoded. One that is not legal is refused before anything is computed, but for the length
        of a stream, which is known in the end."""
        if self._no_pad:
            self._model.vae.encoded_shape(shape)
            return tuple(shape)
        return self._model.vae.valid_sample_shape(shape)

    def _latents(self, posterior: Any) -> Tensor:
        if not self._model.options.sample:
            mode: Tensor = posterior.mode()
            return mode
        # Latent frame by latent frame, so that the noise does not depend on how the file was cut.
        mean: Tensor = posterior.mean
        frames = [mean] if self._model.medium.unit is None else mean.split(1, dim=2)
        noise = torch.cat([randn_like(frame, self._generator) for frame in frames], dim=2)
        drawn: Tensor = mean + posterior.std * noise
        return drawn


class Decoding:
    """Raw latents on their way to samples (1, C, T, ...): iterate over it, once; nothing is cropped.

    pieces: of the latents, in order; shape: of them all, as far as it is known.
    pixels: the samples are wanted for a file that holds 8-bit pixels, if they are pixels, and for nothing else.
    plan: as of an Encoding.
    """

    def __init__(
        self, model: Model, pieces: Iterable[Tensor], shape: Sequence[int], watch: Stopwatch, *, pixels: bool = False
    ) -> None:
        self._model, self._pieces, self._watch, self._sharding = model, pieces, watch, model.sharding
        if self._sharding is not None and pixels and model.medium.media != "audio":
            self._sharding = replace(self._sharding, pixels=True)
        self._pace: int | None = None
        self.plan: Plan | None = None
        if model.medium.unit is not None:
            self.plan, self._pace = stretch(model, "decode", shape, self._sharding)

    def __iter__(self) -> Iterator[Tensor]:
        for y in self._watch.timed("decode", self._whole() if self._pace is None else self._stream(self._pace)):
            # The levels that a file gets, which are what its writer is going to make of these samples.
            yield from_uint8(y) if y.dtype == torch.uint8 else y

    def _whole(self) -> Iterator[Tensor]:
        vae = self._model.vae
        z = torch.cat([piece.to(vae.device) for piece in self._pieces], dim=2)
        self.plan = whole(self._model, "decode", z.shape, self._sharding)
        with out_of_memory(self.plan), self._model.console.units("decode") as progress:
            sample = vae.decode(z, plan=self.plan, progress=progress).sample
            synchronize(vae)
        yield sample

    def _stream(self, pace: int) -> Iterator[Tensor]:
        assert self.plan is not None
        vae = self._model.vae
        pieces = (part for piece in self._pieces for part in piece.to(vae.device).split(pace, dim=2))
        with out_of_memory(self.plan):
            for y in vae.decode_stream(pieces, mesh=self._sharding):
                synchronize(vae)
                yield y


def through(pieces: Iterable[object]) -> None:
    """Compute everything for the rank that gets it."""
    for _ in pieces:
        pass


def stretch(
    model: Model, direction: Direction, shape: Sequence[int], sharding: Sharding | None
) -> tuple[Plan | None, int | None]:
    """How files of this kind stream through a model: a plan, and latents at a time; or (None, None) where they do not.

    They do not where the network has no stream, nor where tiles are asked for or needed: those go through all the time.
    """
    vae, options = model.vae, model.options
    if type(vae)._stream is ParallelTiledVAE._stream:
        return None, None
    if options.tile or options.tiling:
        model.console.remark(_HELD)
        return None, None
    if sharding is not None and not vae.shares_streams:
        raise ConfigError(f"the sound of {vae.family} is computed on one device; start the command without torchrun")
    make = partial(vae.plan_encode if direction == "encode" else vae.plan_decode, mesh=sharding)
    axes, axis = len(vae.sample_axes), vae.sample_axes[0]

    def of(latents: int) -> tuple[int, ...]:
        return (*shape[:2], axis.output_size(latents) if direction == "encode" else latents, *shape[3:])

    latents = _LATENTS[axes]
    plan = make(of(1 + 2 * latents if axes == 3 else latents))
    # The pieces of a network that keeps a cache are alike from the third on.
    latents = plan.chunk or latents
    plan = make(of(1 + 2 * latents if axes == 3 else latents), memory_budget=options.memory_budget)
    if plan.tile is not None:
        if axes == 3:
            model.console.remark(_HELD)
            return None, None
        latents = max(plan.tile[0] // axis.up, 1)
    plan = replace(plan, notes=(*plan.notes, _STREAMED))
    show(model, plan)
    return plan, plan.chunk or latents


def whole(model: Model, direction: Direction, shape: Sequence[int], sharding: Sharding | None) -> Plan:
    """The plan of a call that computes everything at once."""
    vae, tile = model.vae, model.options.tile
    if tile is not None and len(shape) == 5:
        # Tiles go through the whole time.
        other = vae.encoded_shape(shape) if direction == "encode" else vae.decoded_shape(shape)
        tile = (max(shape[2], other[2]), *tile)
    make = vae.plan_encode if direction == "encode" else vae.plan_decode
    plan = make(shape, memory_budget=model.options.memory_budget or "free", tile=tile, mesh=sharding)
    show(model, plan)
    return plan


def show(model: Model, plan: Plan) -> None:
    """Print the plan, where --plan asks for it."""
    if model.options.plan:
        model.console.say(in_shell_words(str(plan)), "")


def synchronize(vae: ParallelTiledVAE[Any]) -> None:
    """Wait for the device, so that its time counts where it is spent."""
    if vae.device.type == "cuda":
        torch.cuda.synchronize(vae.device)


@contextmanager
def out_of_memory(plan: Plan) -> Iterator[None]:
    """Say what to do about it."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise MemoryBudgetError(
            f"{plan.direction} of {sizes(plan.input_shape)} ran out of memory;"
            " pass --memory-budget, or --tile with a smaller tile"
        ) from None
