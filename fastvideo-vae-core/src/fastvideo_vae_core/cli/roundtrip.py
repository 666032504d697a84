"""`fastvideo-vae roundtrip` and `fastvideo-vae demo`: there and back, and how much is lost on the way."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastvideo_vae_core import registry
from fastvideo_vae_core.cli.console import Console, rows, sizes
from fastvideo_vae_core.cli.model import Model, compression, demo_families, open_model, plan_entry
from fastvideo_vae_core.cli.outputs import check_writable, make_folder, place
from fastvideo_vae_core.cli.parser import build_parser
from fastvideo_vae_core.cli.samples import Sample, common_media, medium_of
from fastvideo_vae_core.errors import FamilyError
from fastvideo_vae_core.family import Family
from fastvideo_vae_core.media.files import require


def roundtrip(options: argparse.Namespace) -> int:
    """Write the reconstruction and the comparison, and print what was lost."""
    console = Console.of(options)
    media = common_media([options.input])
    medium = medium_of(media)
    [output] = place([options.input], options.output, medium.suffix, medium.writable)
    comparison = output.with_name(f"{output.stem}-comparison.png")
    check_writable(comparison, [options.input])
    require("matplotlib.figure", "report")
    model = open_model(options, console, media)
    document = _there_and_back(model, options.input, output, comparison)
    console.say(*rows([*_facts(document), ("written", f"{output}\n{comparison}")]))
    console.finish(document)
    return 0


def demo(options: argparse.Namespace) -> int:
    """The same with a photograph and a miniature that ship with a family."""
    console = Console.of(options)
    family = _family_with_demo(options.family)
    original = family.resource(str(family.demo_media))
    medium = medium_of(family.components[0].media)
    make_folder(options.output)
    kept, output, comparison = (
        options.output / name
        for name in (f"original{medium.suffix}", f"reconstruction{medium.suffix}", "comparison.png")
    )
    for path in (kept, output, comparison):
        check_writable(path)
    require("matplotlib.figure", "report")
    defaults = build_parser().parse_args(["roundtrip", str(original), "-o", str(output)])
    defaults.family, defaults.device = family.name, options.device
    model = open_model(defaults, Console(json=options.json, quiet=True), medium.media)
    medium.write(kept, medium.read(original))
    document = {**_there_and_back(model, original, output, comparison), "original": str(kept)}
    console.say(
        f"A real {medium.noun} went through the trained miniature of {family.name} and came back.",
        *rows(_facts(document), indent=2),
        f"The three files are in {options.output}. Open this one to see what was lost:",
        f"  {comparison}",
        "With real weights: fastvideo-vae roundtrip FILE -o OUT --model FILE_OR_FOLDER_OR_HUB_ID",
    )
    console.finish(document)
    return 0


def _there_and_back(model: Model, path: Path, output: Path, comparison: Path) -> dict[str, Any]:
    """Encode and decode a file, write the reconstruction and the comparison, and measure."""
    sample = model.medium.read(path)
    encoded = model.encode(sample.x)
    decoded = model.decode(encoded.z)
    # What a file can hold; the decoder does not clamp.
    y = model.vae.crop_to(decoded.x, sample.x.shape).float().clamp(-1, 1)
    metrics = model.medium.measure(sample.x, y)
    model.medium.write(output, Sample(x=y, frame_rate=sample.frame_rate, sampling_rate=sample.sampling_rate))
    factor = compression(sample.x.shape, encoded.z.shape)
    title = f"{path.name} through {model.name}, {factor:.3g} times fewer numbers"
    model.medium.compare(comparison, sample.x, y, title, _readable(metrics))
    plan = {"encode": plan_entry(encoded.plan), "decode": plan_entry(decoded.plan)} if model.options.plan else None
    return {
        "model": model.describe(),
        "input": str(path),
        "output": str(output),
        "comparison": str(comparison),
        "sample_shape": tuple(sample.x.shape),
        "padded_shape": encoded.padded_shape,
        "latent_shape": tuple(encoded.z.shape),
        "compression": factor,
        "metrics": metrics,
        "computed_in": str(decoded.plan.dtype).removeprefix("torch."),
        "seconds": {"encode": encoded.seconds, "decode": decoded.seconds},
        "plan": plan,
    }


def _facts(document: dict[str, Any]) -> list[tuple[str, str]]:
    model, seconds, metrics = document["model"], document["seconds"], document["metrics"]
    where = f"{document['computed_in']} on {model['device']}"
    return [
        ("input", f"{document['input']}, {sizes(document['sample_shape'][1:])}"),
        ("latents", f"{sizes(document['latent_shape'][1:])}, {document['compression']:.3g} times fewer numbers"),
        ("time", f"encode {seconds['encode']:.2f} s, decode {seconds['decode']:.2f} s, {where}"),
        *_readable(metrics).items(),
    ]


def _readable(metrics: Mapping[str, float]) -> dict[str, str]:
    return {_LABELS[name]: f"{value:.2f} dB" if name == "psnr" else f"{value:.4f}" for name, value in metrics.items()}


_LABELS = {"psnr": "PSNR", "ssim": "SSIM", "ms_ssim": "MS-SSIM"}


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
