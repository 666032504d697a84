"""`fastvideo-vae encode` and `fastvideo-vae decode`: media to latent files and back."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastvideo_vae_core import registry
from fastvideo_vae_core.cli.console import Console, sizes
from fastvideo_vae_core.cli.model import Model, compression, open_model, plan_entry
from fastvideo_vae_core.cli.outputs import place
from fastvideo_vae_core.cli.samples import Sample, common_media, medium_of
from fastvideo_vae_core.errors import CheckpointError, MediaError, ShapeError
from fastvideo_vae_core.latents import LatentFile, read_latents, write_latents

_LATENTS = (".safetensors",)


def encode(options: argparse.Namespace) -> int:
    """Write the latents of every input."""
    console = Console.of(options)
    media = common_media(options.inputs)
    medium_of(media)
    outputs = place(options.inputs, options.output, _LATENTS[0], _LATENTS)
    model = open_model(options, console, media, decoder=False)
    pairs = list(zip(options.inputs, outputs, strict=True))
    files = [_encode_file(model, *pair, console) for pair in console.progress(pairs, "encode")]
    console.finish({"model": model.describe(), "files": files})
    return 0


def decode(options: argparse.Namespace) -> int:
    """Write the media of every latent file."""
    console = Console.of(options)
    latents = [read_latents(path) for path in options.inputs]
    for path, file in zip(options.inputs, latents, strict=True):
        if len(file.latents) != 1:
            raise MediaError(f"{path} holds a batch of {len(file.latents)}; this command takes one item to a file")
    made_by = latents[0].provenance
    family = registry.resolve(options.family or made_by.family)
    medium = medium_of(family.component(options.component or made_by.component).media)
    outputs = place(options.inputs, options.output, medium.suffix, medium.writable)
    model = open_model(options, console, medium.media, made_by=made_by, encoder=False)
    jobs = list(zip(options.inputs, latents, outputs, strict=True))
    for path, file, _ in jobs:
        _check_maker(model, path, file, console)
    files = [_decode_file(model, *job, console) for job in console.progress(jobs, "decode")]
    console.finish({"model": model.describe(), "files": files})
    return 0


def _encode_file(model: Model, path: Path, output: Path, console: Console) -> dict[str, Any]:
    sample = model.medium.read(path)
    encoded = model.encode(sample.x)
    normalized = model.options.normalized
    z = model.vae.normalize_latents(encoded.z) if normalized else encoded.z
    file = LatentFile(
        latents=z,
        provenance=model.vae.provenance,
        space="normalized" if normalized else "raw",
        sample_shape=tuple(sample.x.shape),
        frame_rate=sample.frame_rate,
        sampling_rate=sample.sampling_rate,
    )
    write_latents(output, file)
    factor = compression(file.sample_shape, z.shape)
    console.say(
        f"{path} -> {output}: {sizes(file.sample_shape[1:])} to {file.space} latents {sizes(z.shape[1:])},"
        f" {factor:.3g} times fewer numbers, {encoded.seconds:.2f} s"
    )
    return {
        "input": str(path),
        "output": str(output),
        "sample_shape": file.sample_shape,
        "padded_shape": encoded.padded_shape,
        "latent_shape": tuple(z.shape),
        "space": file.space,
        "compression": factor,
        "seconds": encoded.seconds,
        "plan": plan_entry(encoded.plan) if model.options.plan else None,
    }


def _decode_file(model: Model, path: Path, file: LatentFile, output: Path, console: Console) -> dict[str, Any]:
    z = model.vae.denormalize_latents(file.latents) if file.space == "normalized" else file.latents
    shape = _shape_to_keep(model, path, file)
    decoded = model.decode(z)
    x = model.vae.crop_to(decoded.x, shape)
    model.medium.write(output, Sample(x=x, frame_rate=file.frame_rate, sampling_rate=file.sampling_rate))
    console.say(
        f"{path} -> {output}: {file.space} latents {sizes(z.shape[1:])} to {sizes(x.shape[1:])},"
        f" {decoded.seconds:.2f} s"
    )
    return {
        "input": str(path),
        "output": str(output),
        "latent_shape": tuple(z.shape),
        "space": file.space,
        "decoded_shape": tuple(decoded.x.shape),
        "sample_shape": tuple(x.shape),
        "seconds": decoded.seconds,
        "plan": plan_entry(decoded.plan) if model.options.plan else None,
    }


def _check_maker(model: Model, path: Path, file: LatentFile, console: Console) -> None:
    """Refuse latents that another network made, unless they are forced upon this one."""
    try:
        file.check(model.vae.provenance)
    except CheckpointError as error:
        if not model.options.force:
            way_out = "; pass their checkpoint as --model" if model.is_demo else ""
            raise CheckpointError(f"{path}: {error}{way_out}") from None
        console.remark(f"{path}: decoded although another network made it, because of --force")


def _shape_to_keep(model: Model, path: Path, file: LatentFile) -> tuple[int, ...]:
    """The sample shape that the file names, if its latents are of that size: edited ones are not cut without a word."""
    decoded = model.vae.decoded_shape(file.latents.shape)
    if model.vae.valid_sample_shape(file.sample_shape)[2:] == decoded[2:]:
        return file.sample_shape
    if model.options.force:
        return decoded
    raise ShapeError(
        f"{path} decodes to {sizes(decoded[2:])} and was made from {sizes(file.sample_shape[2:])};"
        " --force writes all that comes out"
    )
