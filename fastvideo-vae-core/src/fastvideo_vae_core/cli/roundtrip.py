"""`fastvideo-vae roundtrip` and `fastvideo-vae demo`: there and back, and how much is lost on the way."""

from __future__ import annotations

import argparse
import math
import shutil
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvideo_vae_core import registry
from fastvideo_vae_core.cli.console import Console, rows, sizes
from fastvideo_vae_core.cli.model import Model, compression, demo_families, open_model, plan_entry
from fastvideo_vae_core.cli.outputs import check_writable, make_folder, place
from fastvideo_vae_core.cli.parser import build_parser
from fastvideo_vae_core.cli.running import Decoding, Encoding, Stopwatch
from fastvideo_vae_core.cli.samples import Source, Writing, common_media, medium_of
from fastvideo_vae_core.errors import FamilyError
from fastvideo_vae_core.family import Family
from fastvideo_vae_core.media.files import atomic_output, require


def roundtrip(options: argparse.Namespace) -> int:
    """Write the reconstruction and the comparison, and print what was lost."""
    console = Console.of(options)
    media = common_media([options.input])
    if media == "video" and Path(options.output).suffix.lower() in medium_of("audio").writable:
        media = "audio"
    medium = medium_of(media)
    [output] = place([options.input], options.output, medium.suffix, medium.writable)
    comparison = output.with_name(f"{output.stem}-comparison.png")
    check_writable(comparison, [options.input])
    require("matplotlib.figure", "report")
    model = open_model(options, console, media)
    document, facts = _there_and_back(model, options.input, output, comparison)
    console.say(*rows([*facts, ("written", f"{output}\n{comparison}")]))
    console.finish(document)
    return 0


def demo(options: argparse.Namespace) -> int:
    """The same with media and a miniature that ship with a family."""
    console = Console.of(options)
    family = _family_with_demo(options.family)
    original = family.resource(str(family.demo_media))
    medium = medium_of(family.components[0].media)
    make_folder(options.output)
    kept, output, comparison = (
        options.output / name
        for name in (f"original{original.suffix}", f"reconstruction{medium.suffix}", "comparison.png")
    )
    for path in (kept, output, comparison):
        check_writable(path)
    require("matplotlib.figure", "report")
    defaults = build_parser().parse_args(["roundtrip", str(original), "-o", str(output)])
    defaults.family, defaults.device = family.name, options.device
    model = open_model(defaults, Console(json=options.json, quiet=True), medium.media)
    with atomic_output(kept) as temporary:
        shutil.copyfile(original, temporary)
    document, facts = _there_and_back(model, original, output, comparison)
    console.say(
        f"A real {medium.noun} went through the trained miniature of {family.name} and came back.",
        *rows(facts, indent=2),
        f"The three files are in {options.output}. Open this one to see what was lost:",
        f"  {comparison}",
        "With real weights: fastvideo-vae roundtrip FILE -o OUT --model FILE_OR_FOLDER_OR_HUB_ID",
    )
    console.finish({**document, "original": str(kept)})
    return 0


def _there_and_back(
    model: Model, path: Path, output: Path, comparison: Path
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Encode and decode a file, write the reconstruction and the comparison, and measure; piece by piece.

    Returns what there is to say, for machines and for people.
    """
    medium, options, watch = model.medium, model.options, Stopwatch()
    with medium.open(path, model.reading) as opened:
        source, judge, facts = _Remembering(opened), medium.judge(opened.facts), opened.facts
        encoding = Encoding(model, source, path, watch)
        decoding = Decoding(model, encoding, encoding.latent_shape, watch)
        sound = path if medium.media == "video" and not options.no_sound else None
        total = source.expected and medium.count(source.expected, facts)
        with (
            medium.create(output, facts, source.shape, Writing.of(options, sound)) as sink,
            model.console.bar(total, path.name, medium.unit) as done,
        ):
            for decoded in decoding:
                x, y = source.matching(decoded)
                if not y.shape[2]:
                    continue
                sink.write(y)
                # What a file can hold; the decoder does not clamp.
                judge.update(x, y.float().clamp(-1, 1))
                done(medium.count(source.matched, facts))
    metrics, latent_shape = judge.metrics(), encoding.latent_shape
    factor = compression(source.shape, latent_shape)
    title = f"{path.name} through {model.name}, {factor:.3g} times fewer numbers"
    judge.compare(comparison, title, _readable(metrics))
    plans = {"encode": encoding.plan, "decode": decoding.plan}
    document = {
        "model": model.describe(),
        "input": str(path),
        "output": str(output),
        "comparison": str(comparison),
        "sample_shape": source.shape,
        "padded_shape": encoding.padded_shape,
        "latent_shape": latent_shape,
        **facts.entries(),
        "notes": [*source.notes, *sink.notes],
        "compression": factor,
        "metrics": metrics,
        "computed_in": str(decoding.plan.dtype).removeprefix("torch.") if decoding.plan else None,
        "seconds": {name: watch.seconds[name] for name in plans},
        "plan": {name: plan_entry(plan) for name, plan in plans.items()} if options.plan else None,
    }
    return document, _told(document, facts.describe(source.shape))


class _Remembering:
    """A source that keeps what it read until its reconstruction comes."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._pieces: deque[Tensor] = deque()
        self.facts, self.expected, self.notes = source.facts, source.expected, source.notes
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


def _told(document: dict[str, Any], described: str) -> list[tuple[str, str]]:
    model, seconds, notes = document["model"], document["seconds"], document["notes"]
    where = f"{document['computed_in']} on {model['device']}"
    return [
        ("input", f"{document['input']}, {described}"),
        *([("notes", "\n".join(notes))] if notes else []),
        ("latents", f"{sizes(document['latent_shape'][1:])}, {document['compression']:.3g} times fewer numbers"),
        ("time", f"encode {seconds['encode']:.2f} s, decode {seconds['decode']:.2f} s, {where}"),
        *_readable(document["metrics"]).items(),
    ]


def _readable(metrics: Mapping[str, float]) -> dict[str, str]:
    return {_LABELS[name]: _number(name, value) for name, value in metrics.items()}


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


def _family_with_demo(name: str | None) -> Family:
    if name is None:
        families = demo_families()
        if not families:
            raise FamilyError("no installed family ships a demonstration; pip install fastvideo-vae-autoencoder-kl")
        return families[0]
    family = registry.resolve(name)
    if not (family.demo and family.demo_media):
        raise FamilyError(f"{family.distribution} ships no demonstration")
    return family
