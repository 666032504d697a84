"""What the trainings of miniatures of sound share: files that the standard library alone reads and writes, random clips
of them, and what READMEs say of recordings."""

from __future__ import annotations

import wave
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from demo_card import credit_of, read_sources, source_tables

# The one of the recordings that ships: in the public domain, and held out.
SHIPPED = "house"


def write_wave(path: Path, x_CS: Tensor, rate: int) -> None:
    """Sound in [-1, 1] as 16 bits."""
    levels = (x_CS.clamp(-1, 1) * 32767).round().to(torch.int16)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(len(x_CS))
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(levels.T.contiguous().numpy().tobytes())


def read_wave(path: Path) -> Tensor:
    """(C, S) in [-1, 1]."""
    with wave.open(str(path), "rb") as file:
        levels = np.frombuffer(file.readframes(file.getnframes()), np.int16).reshape(-1, file.getnchannels())
    return torch.from_numpy(levels.T.astype(np.float32) / 32768)


class Row:
    """Random clips of one length of recordings (C, L, ...), which lie in the device's memory in a row.

    Attributes:
        generator: for all that is drawn at random.
    """

    def __init__(
        self, recordings: Iterable[Tensor], length: int, device: str, *, seed: int, silence: float = 0.0
    ) -> None:
        # What is too short goes on in silence.
        long = [F.pad(x, [0, 0] * (x.dim() - 2) + [0, max(length - x.shape[1], 0)], value=silence) for x in recordings]
        self.length, self.all = length, torch.cat(long, 1).to(device)
        lengths = torch.tensor([x.shape[1] for x in long], device=device)
        self.starts, self.room = lengths.cumsum(0) - lengths, lengths - length + 1
        self.chances = lengths.double().sqrt()
        self.generator = torch.Generator(device).manual_seed(seed)

    def choose(self, count: int) -> Tensor:
        """Which recordings so many clips are of."""
        return torch.multinomial(self.chances, count, replacement=True, generator=self.generator)

    def cut(self, chosen: Tensor, first: Tensor) -> Tensor:
        """Clips (B, C, length, ...); `first` says in [0, 1) where they begin."""
        start = self.starts[chosen] + (first * self.room[chosen]).long()
        return self.all[:, start[:, None] + torch.arange(self.length, device=start.device)].transpose(0, 1)


def about_recordings(folder: Path) -> dict[str, str]:
    """What a README says of those in a folder: the fields `shipped`, `kind` and `sources` of its Card."""
    listed = [each | each["package"] for each in read_sources(folder)]
    tables = source_tables(listed, ("name", "length", "from", "licence", "by"), _cells)
    return {
        "shipped": f'{credit_of(SHIPPED, listed)} It is the held-out recording "{SHIPPED}" of the table.',
        "kind": "Recordings",
        "sources": f"These were trained on. They come in packages and are not part of this one:\n\n{tables}",
    }


def _cells(entry: Mapping[str, Any]) -> Sequence[str]:
    return entry["name"], f"{entry['length']:.0f} s", entry["requirement"], entry["licence"], entry["credit"]
