"""A plan: what a call is going to do, decided before it does it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import torch

from fastvideo_vae_core.grids import Place
from fastvideo_vae_core.memory import Forecast, format_bytes
from fastvideo_vae_core.sharding import Sharding

Direction = Literal["encode", "decode"]
Mode = Literal["whole", "tiled", "blended"]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How one call is computed. It prints as a short table, and `encode` and `decode` accept it.

    Attributes:
        direction: "encode" or "decode".
        mode: "whole", or "tiled" with exact halos and global statistics, or "blended", which is another function of the
            input, for those who must match published numbers.
        input_shape, output_shape: of the whole call; for encode the output is the mean of the posterior.
        items: how many items of the batch are computed at a time.
        tile: extent of a tile along each axis behind (B, C), in elements of the grid that is being computed.
        tiles: likewise of each step, where they have memory for tiles of other sizes; empty: `tile` for all.
        places: where the grid of each step of a tiled plan lies: in one tensor on the device, in slabs that go as their
            last reader passes, or nowhere, because each reader computes it anew. Empty: all on the device.
        host_shares: of each step's grid in slabs, how much of it lies in pinned memory of the host. Empty: nothing.
        chunk: latent frames at a time, where networks run in pieces of frames; else None. Where they stream, the first
            one comes alone.
        blend: how tiles overlap in mode "blended", as the family describes it; else None.
        dtype: of the arithmetic.
        device: where it runs.
        retry: compute again in float32 when the result is not finite.
        sharding: which ranks compute it together, and how; None: this device alone.
        notes: why, where it is not plain.
    """

    direction: Direction
    mode: Mode
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    items: int
    tile: tuple[int, ...] | None
    dtype: torch.dtype
    device: torch.device
    retry: bool
    chunk: int | None = None
    blend: Hashable | None = None
    sharding: Sharding | None = None
    notes: tuple[str, ...] = ()
    tiles: tuple[tuple[int, ...], ...] = ()
    places: tuple[Place, ...] = ()
    host_shares: tuple[float, ...] = ()
    _predict: Callable[[Plan], Forecast] = field(repr=False, compare=False)

    @cached_property
    def forecast(self) -> Forecast:
        """What a rehearsal of the call on shapes alone takes."""
        return self._predict(self)

    @property
    def peak_bytes(self) -> int:
        """Predicted peak of what PyTorch's allocator gives out for the call: weights of the half, input, result and
        everything between, and on a GPU the workspace of matrix products, which stays for later calls. Of several
        devices it is one in the middle, which also gets the whole result if any does."""
        return self.forecast.peak

    @cached_property
    def recompute(self) -> float:
        """Predicted multiplications beyond those of the whole, as a share of these: what halos cost, and grids that are
        computed anew. 0.0 for a whole plan, and not known of several devices."""
        if (self.tile is None and self.blend is None) or self.sharding is not None:
            return 0.0
        least = self.whole.forecast.work
        return self.forecast.work / least - 1.0 if least else 0.0

    @property
    def whole(self) -> Plan:
        """The same call without tiles."""
        return replace(self, mode="whole", tile=None, tiles=(), places=(), host_shares=(), blend=None)

    @property
    def in_steps(self) -> bool:
        """Whether the network is run step by step, on parts of grids, and not at once on all or on blended tiles."""
        return self.blend is None and (self.tile is not None or self.sharding is not None)

    def __str__(self) -> str:
        rows = [
            (self.direction, f"{_sizes(self.input_shape)} -> {_sizes(self.output_shape)}"),
            ("mode", ", ".join(self.mode_parts())),
            ("batch", f"{self.items} of {self.input_shape[0]} at a time"),
            ("compute", f"{str(self.dtype).removeprefix('torch.')} on {self.device}"),
            *(() if self.sharding is None else (("devices", str(self.sharding)),)),
            ("peak", f"{format_bytes(self.peak_bytes)} predicted"),
            *(("work", text) for text in self._work()),
            *(("note", note) for note in self.notes),
        ]
        return "\n".join(f"{name:<8}{value}" for name, value in rows)

    def mode_parts(self) -> Iterator[str]:
        """For people: whole or in parts, and in which."""
        yield self.mode
        if self.tile is not None:
            most = max(self.tiles, key=math.prod, default=self.tile)
            yield f"tiles of {_sizes(self.tile)}" + (f" to {_sizes(most)}" if most != self.tile else "")
        if places := Counter(self.places):
            on_host = sum(share > 0 for share in self.host_shares)
            where: dict[Place, str] = {
                "slabs": "in slabs" + (f" ({on_host} of them partly on the host)" if on_host else ""),
                "anew": "computed anew",
            }
            yield "grids: " + ", ".join(f"{places[each]} {text}" for each, text in where.items() if places[each])
        if self.chunk is not None:
            yield f"{self.chunk} latent frames at a time"
        if self.blend is not None:
            yield str(self.blend)

    def _work(self) -> Iterator[str]:
        if self.sharding is None and (self.tile is not None or self.blend is not None):
            yield f"{100 * self.recompute:.1f} % computed more than once, predicted"
        if self.forecast.uploaded or self.forecast.downloaded:
            up, down = (format_bytes(int(each)) for each in (self.forecast.uploaded, self.forecast.downloaded))
            yield f"{up} from the host, {down} to it"


def _sizes(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
