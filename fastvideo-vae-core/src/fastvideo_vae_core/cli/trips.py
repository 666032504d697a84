"""There and back: one file, or the sound of one, through a model and compared with what it was."""

from __future__ import annotations

import math
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvideo_vae_core.cli.model import Model, compression, open_sound, plan_entry
from fastvideo_vae_core.cli.running import Decoding, Encoding, Stopwatch, through
from fastvideo_vae_core.cli.samples import Facts, Judge, Sink, Source, Writing
from fastvideo_vae_core.cli.together import everywhere
from fastvideo_vae_core.media.sound_tracks import sound_start
from fastvideo_vae_core.plan import Plan

Create = Callable[[Facts, Sequence[int]], AbstractContextManager[Sink]]


@dataclass(frozen=True, kw_only=True)
class Trip:
    """What came of one.

    Attributes:
        facts: of what was encoded; `written` of what came back.
        judge: ready to compare.
    """

    facts: Facts
    written: Facts
    judge: Judge
    metrics: dict[str, float]
    sample_shape: tuple[int, ...]
    padded_shape: tuple[int, ...]
    latent_shape: tuple[int, ...]
    notes: list[str]
    seconds: dict[str, float]
    plans: dict[str, Plan | None]

    @property
    def compression(self) -> float:
        """How many numbers of the samples one number of the latents stands for."""
        return compression(self.sample_shape, self.latent_shape)

    def document(self, model: Model) -> dict[str, Any]:
        """For JSON."""
        decoded, planned = self.plans["decode"], model.options.plan
        rate = self.written.sampling_rate
        return {
            "sample_shape": self.sample_shape,
            "padded_shape": self.padded_shape,
            "latent_shape": self.latent_shape,
            **self.facts.entries(),
            **({"decoded_sampling_rate": rate} if rate != self.facts.sampling_rate else {}),
            "notes": self.notes,
            "compression": self.compression,
            "metrics": self.metrics,
            "computed_in": str(decoded.dtype).removeprefix("torch.") if decoded else None,
            "seconds": self.seconds,
            "plan": {name: plan_entry(plan) for name, plan in self.plans.items()} if planned else None,
        }


def travel(model: Model, path: Path, create: Create) -> Trip:
    """Encode and decode a file into a sink, and measure; piece by piece."""
    medium, back, watch = model.medium, model.decoding, Stopwatch()
    with ExitStack() as stack:
        opened = stack.enter_context(medium.open(path, model.reading))
        source: _Remembering | _Beside = _Remembering(opened)
        if back is not model or model.sharding is not None:
            source = _Beside(opened, stack.enter_context(medium.open(path, back.reading)))
        judge, written = medium.judge(source.written), source.written
        encoding = Encoding(model, source, path, watch)
        decoding = Decoding(back, relayed(model, encoding), encoding.latent_shape, watch)
        total = opened.expected and medium.count(opened.expected, opened.facts)
        sink = stack.enter_context(create(written, source.shape))
        done = stack.enter_context(model.console.bar(total, path.name, medium.unit))
        for decoded in decoding:
            x, y = source.matching(decoded)
            if not y.shape[2]:
                continue
            sink.write(y)
            # What a file can hold; the decoder does not clamp.
            judge.update(x, y.float().clamp(-1, 1))
            done(medium.count(source.matched, written))
    return Trip(
        facts=opened.facts,
        written=written,
        judge=judge,
        metrics=judge.metrics(),
        sample_shape=source.shape,
        padded_shape=encoding.padded_shape,
        latent_shape=encoding.latent_shape,
        notes=[*source.notes, *sink.notes],
        seconds={name: watch.seconds[name] for name in ("encode", "decode")},
        plans={"encode": encoding.plan, "decode": decoding.plan},
    )


def accompany(model: Model, path: Path) -> None:
    """Encode and decode a file for the rank that writes it."""
    watch = Stopwatch()
    with model.medium.open(path, model.reading) as source:
        encoding = Encoding(model, source, path, watch)
        through(Decoding(model, relayed(model, encoding), encoding.latent_shape, watch))


def relayed(model: Model, encoding: Encoding) -> Iterator[Tensor]:
    """The latents as they come; on several devices, where one gets them and all decode, when all have come."""
    if model.sharding is None:
        yield from encoding
        return
    pieces = list(encoding)
    [like, *_] = getattr(model.vae, model.vae.encoder_modules[0]).parameters()
    yield everywhere(pieces, encoding.latent_shape, model.sharding, like)


@contextmanager
def sound_of(model: Model, path: Path, output: Path) -> Iterator[tuple[str | None, Path | None, dict[str, Any]]]:
    """The sound that goes with the pictures of a clip: how it got there, a file that has it, and what to say of it.

    It is "decoded" where the checkpoint holds the networks, or else "copied". The file of decoded sound is there as
    long as the block runs, and begins with the first picture.
    """
    start, tracks = Fraction(), 0
    if model.medium.media == "video" and not model.options.no_sound:
        start, tracks = sound_start(path)
    sound = open_sound(model) if tracks and not model.options.keep_sound else None
    if sound is None:
        yield ("copied", path, {}) if tracks else (None, None, {})
        return
    with tempfile.TemporaryDirectory(prefix=".", dir=output.parent) as folder:
        file = Path(folder) / "sound.wav"
        document = _decode_sound(sound, path, file, start)
        # The networks go, so that they take no memory from the pictures.
        del sound
        if tracks > 1:
            document["notes"] = [*document["notes"], f"the first of {tracks} tracks"]
        yield "decoded", file, document


def _decode_sound(sound: Model, path: Path, file: Path, start: Fraction) -> dict[str, Any]:
    """Write the sound of a clip as the networks make it, from the first picture on, and say what there is to say."""
    medium = sound.medium

    @contextmanager
    def create(facts: Facts, shape: Sequence[int]) -> Iterator[Sink]:
        lead = round(start * (facts.sampling_rate or 1))
        with medium.create(file, facts, shape, Writing()) as sink:
            yield _Shifted(sink, lead)

    trip = travel(sound, path, create)
    return {
        "model": sound.describe(),
        **trip.document(sound),
        "decoded_sampling_rate": trip.written.sampling_rate,
    }


def readable_metrics(metrics: Mapping[str, float]) -> dict[str, str]:
    """Metrics by their names for people."""
    return {_LABELS[name]: _number(name, value) for name, value in metrics.items()}


class _Remembering:
    """A source that keeps what it read until its reconstruction comes."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._pieces: deque[Tensor] = deque()
        self.facts, self.expected, self.notes = source.facts, source.expected, source.notes
        self.written = source.facts
        self.matched = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return self._source.shape

    def read(self, count: int) -> Tensor:
        x = self._source.read(count)
        if x.shape[2]:
            self._pieces.append(x)
        return x

    def matching(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The next samples as long as y, and y without what padding added: none was read for that."""
        length = min(y.shape[2], sum(piece.shape[2] for piece in self._pieces))
        missing = length
        taken: list[Tensor] = []
        while missing:
            piece = self._pieces.popleft()
            taken.append(piece[:, :, :missing])
            if piece.shape[2] > missing:
                self._pieces.appendleft(piece[:, :, missing:])
            missing -= taken[-1].shape[2]
        self.matched += length
        x = torch.cat(taken, dim=2) if taken else y[:, :, :0]
        return x, y[(slice(None), slice(None), *(slice(size) for size in x.shape[2:]))]


class _Beside:
    """A source whose reconstruction comes at another rate, and the same file at that rate to compare with."""

    def __init__(self, source: Source, beside: Source) -> None:
        self._source, self._beside = source, beside
        self.facts, self.expected, self.notes = source.facts, source.expected, source.notes
        self.written = beside.facts
        self.matched = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return self._source.shape

    def read(self, count: int) -> Tensor:
        return self._source.read(count)

    def matching(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The next samples as long as y, and y without what padding added."""
        x = self._beside.read(y.shape[2])
        self.matched += x.shape[2]
        return x, y[(slice(None), slice(None), *(slice(size) for size in x.shape[2:]))]


class _Shifted:
    """A sink whose samples come later, behind silence, or earlier, without the first ones."""

    def __init__(self, sink: Sink, lead: int) -> None:
        self._sink, self._silence, self._dropped = sink, max(lead, 0), max(-lead, 0)
        self.notes = sink.notes

    def write(self, y: Tensor) -> None:
        if self._silence:
            self._sink.write(y.new_zeros((*y.shape[:2], self._silence)))
            self._silence = 0
        kept = y[:, :, self._dropped :]
        self._dropped -= y.shape[2] - kept.shape[2]
        if kept.shape[2]:
            self._sink.write(kept)


def _number(name: str, value: float) -> str:
    if math.isnan(value):
        return "none for silence"
    return f"{value:.2f} dB" if name in _DECIBELS else f"{value:.4f}"


_LABELS = {
    "psnr": "PSNR",
    "ssim": "SSIM",
    "ms_ssim": "MS-SSIM",
    "si_sdr": "SI-SDR",
    "stft_distance": "STFT distance",
}
_DECIBELS = ("psnr", "si_sdr")
