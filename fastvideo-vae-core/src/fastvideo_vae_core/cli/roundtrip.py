"""`fastvideo-vae roundtrip` and `fastvideo-vae demo`: there and back, and how much is lost on the way."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from fastvideo_vae_core import registry
from fastvideo_vae_core.cli.console import Console, rows, sizes
from fastvideo_vae_core.cli.model import Model, demo_families, open_model
from fastvideo_vae_core.cli.outputs import check_writable, make_folder, place
from fastvideo_vae_core.cli.parser import build_parser
from fastvideo_vae_core.cli.samples import Facts, Writing, common_media, medium_of
from fastvideo_vae_core.cli.trips import accompany, readable_metrics, sound_of, travel
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
    [output] = place([options.input], options.output, medium.suffix, medium.writable, writes=not console.mute)
    comparison = output.with_name(f"{output.stem}-comparison.png")
    if not console.mute:
        check_writable(comparison, [options.input])
    require("matplotlib.figure", "report")
    model = open_model(options, console, media)
    if not model.writes:
        accompany(model, options.input)
        return 0
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
    with ExitStack() as stack:
        way, sound, sound_document = stack.enter_context(sound_of(model, path, output))
        writing = Writing.of(model.options, sound)
        trip = travel(model, path, lambda facts, shape: model.medium.create(output, facts, shape, writing))
    title = f"{path.name} through {model.name}, {trip.compression:.3g} times fewer numbers"
    trip.judge.compare(comparison, title, readable_metrics(trip.metrics))
    document = {
        "model": model.describe(),
        "input": str(path),
        "output": str(output),
        "comparison": str(comparison),
        **trip.document(model),
    }
    if model.medium.media == "video":
        document["sound"] = None if way is None else {"way": way, **sound_document}
    return document, _told(document, trip.facts.describe(trip.sample_shape))


def _told(document: dict[str, Any], described: str) -> list[tuple[str, str]]:
    notes, sound = document["notes"], document.get("sound")
    told = [
        ("input", f"{document['input']}, {described}"),
        *([("notes", "\n".join(notes))] if notes else []),
        *_passage(document, document["model"]["device"]),
        *readable_metrics(document["metrics"]).items(),
    ]
    if sound is None:
        return told
    if sound["way"] == "copied":
        return [*told, ("sound", "the input's own")]
    described = Facts(sampling_rate=sound["sampling_rate"]).describe(sound["sample_shape"])
    return [
        *told,
        ("sound", "\n".join([f"{described}, back at {sound['decoded_sampling_rate']} Hz", *sound["notes"]])),
        *_passage(sound, sound["model"]["device"]),
        *readable_metrics(sound["metrics"]).items(),
    ]


def _passage(document: Mapping[str, Any], device: str) -> list[tuple[str, str]]:
    seconds = document["seconds"]
    where = f"{document['computed_in']} on {device}"
    return [
        ("latents", f"{sizes(document['latent_shape'][1:])}, {document['compression']:.3g} times fewer numbers"),
        ("time", f"encode {seconds['encode']:.2f} s, decode {seconds['decode']:.2f} s, {where}"),
    ]


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
