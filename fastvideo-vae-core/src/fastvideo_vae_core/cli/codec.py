"""`fastvideo-vae encode` and `fastvideo-vae decode`: media to latent files and back."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fastvideo_vae_core import registry
from fastvideo_vae_core.cli.console import Console, Item, sizes
from fastvideo_vae_core.cli.model import Model, compression, open_model, plan_entry
from fastvideo_vae_core.cli.outputs import place
from fastvideo_vae_core.cli.running import Decoding, Encoding, Stopwatch, through
from fastvideo_vae_core.cli.samples import Facts, Writing, common_media, medium_of
from fastvideo_vae_core.errors import CheckpointError, MediaError, ShapeError
from fastvideo_vae_core.latents import LatentInfo, LatentReader, LatentWriter

_LATENTS = (".safetensors",)
# Latents that are read at a time.
_PIECE = {"audio": 512, "image": 1 << 20, "video": 8}


def encode(options: argparse.Namespace) -> int:
    """Write the latents of every input."""
    console = Console.of(options)
    media = common_media(options.inputs)
    outputs = place(options.inputs, options.output, _LATENTS[0], _LATENTS, writes=not console.mute)
    model = open_model(options, console, media, decoder=False)
    pairs = list(zip(options.inputs, outputs, strict=True))
    files = [_encode_file(model, path, output, console) for path, output in _in_turn(model, pairs, "encode")]
    console.finish({"model": model.describe(), "files": files})
    return 0


def decode(options: argparse.Namespace) -> int:
    """Write the media of every latent file."""
    console = Console.of(options)
    latents = [LatentReader(path) for path in options.inputs]
    for file in latents:
        if file.shape[0] != 1:
            raise MediaError(f"{file.path} holds a batch of {file.shape[0]}; this command takes one item to a file")
    made_by = latents[0].info.provenance
    family = registry.resolve(options.family or made_by.family)
    medium = medium_of(family.component(options.component or made_by.component).media)
    outputs = place(options.inputs, options.output, medium.suffix, medium.writable, writes=not console.mute)
    model = open_model(options, console, medium.media, made_by=made_by, encoder=False)
    for file in latents:
        _check_maker(model, file, console)
    pairs = list(zip(latents, outputs, strict=True))
    files = [_decode_file(model, file, output, console) for file, output in _in_turn(model, pairs, "decode")]
    console.finish({"model": model.describe(), "files": files})
    return 0


def _in_turn(model: Model, pairs: Sequence[Item], what: str) -> Iterator[Item]:
    """One bar for all files, unless each has its own."""
    return model.console.progress(pairs, what) if model.medium.unit is None else iter(pairs)


def _encode_file(model: Model, path: Path, output: Path, console: Console) -> dict[str, Any]:
    medium, watch, normalized = model.medium, Stopwatch(), model.options.normalized
    if not model.writes:
        with medium.open(path, model.reading) as source:
            through(Encoding(model, source, path, watch))
        return {}
    with medium.open(path, model.reading) as source, LatentWriter(output) as writer:
        encoding = Encoding(model, source, path, watch)
        total = source.expected and medium.count(source.expected, source.facts)
        with console.bar(total, path.name, medium.unit) as done:
            for z in encoding:
                with watch.stage("encode"):
                    piece = (model.vae.normalize_latents(z) if normalized else z).cpu()
                writer.write(piece)
                done(medium.count(source.shape[2], source.facts))
        info = LatentInfo(
            provenance=model.vae.provenance,
            space="normalized" if normalized else "raw",
            sample_shape=tuple(source.shape),
            **source.facts.entries(),
        )
        writer.finish(info)
    factor, seconds = compression(info.sample_shape, writer.shape), watch.seconds["encode"]
    console.say(
        f"{path} -> {output}: {source.facts.describe(info.sample_shape)} to {info.space} latents"
        f" {sizes(writer.shape[1:])}, {factor:.3g} times fewer numbers, {seconds:.2f} s",
        *(f"  {note}" for note in source.notes),
    )
    return {
        "input": str(path),
        "output": str(output),
        "sample_shape": info.sample_shape,
        "padded_shape": encoding.padded_shape,
        "latent_shape": writer.shape,
        "space": info.space,
        **source.facts.entries(),
        "notes": source.notes,
        "compression": factor,
        "seconds": seconds,
        "plan": plan_entry(encoding.plan) if model.options.plan else None,
    }


def _decode_file(model: Model, file: LatentReader, output: Path, console: Console) -> dict[str, Any]:
    medium, watch, options = model.medium, Stopwatch(), model.options
    if not model.writes:
        through(Decoding(model, _latents(model, file), file.shape, watch, pixels=True))
        return {}
    shape, facts = _shape_to_keep(model, file), _facts(model, file)
    writing = Writing.of(options, options.sound)
    with medium.create(output, facts, shape, writing) as sink:
        decoding = Decoding(model, _latents(model, file), file.shape, watch, pixels=True)
        written = 0
        with console.bar(medium.count(shape[2], facts), output.name, medium.unit) as done:
            for y in cropped(decoding, shape):
                sink.write(y)
                written += y.shape[2]
                done(medium.count(written, facts))
    seconds = watch.seconds["decode"]
    console.say(
        f"{file.path} -> {output}: {file.info.space} latents {sizes(file.shape[1:])} to {facts.describe(shape)},"
        f" {seconds:.2f} s",
        *(f"  {note}" for note in sink.notes),
    )
    return {
        "input": str(file.path),
        "output": str(output),
        "latent_shape": file.shape,
        "space": file.info.space,
        "decoded_shape": model.vae.decoded_shape(file.shape),
        "sample_shape": shape,
        **facts.entries(),
        "notes": sink.notes,
        "seconds": seconds,
        "plan": plan_entry(decoding.plan) if options.plan else None,
    }


def cropped(pieces: Iterable[Tensor], shape: Sequence[int]) -> Iterator[Tensor]:
    """Pieces of samples cut to the sizes of `shape`: every piece behind axis 2, and all of them together along it."""
    left = shape[2]
    for y in pieces:
        part = y[(slice(None), slice(None), slice(left), *(slice(size) for size in shape[3:]))]
        left -= part.shape[2]
        if part.shape[2]:
            yield part


def _latents(model: Model, file: LatentReader) -> Iterator[Tensor]:
    """The raw latents of a file, some at a time."""
    step = _PIECE[model.medium.media]
    for start in range(0, file.shape[2], step):
        z = file.read(start, start + step)
        yield model.vae.denormalize_latents(z) if file.info.space == "normalized" else z


def _facts(model: Model, file: LatentReader) -> Facts:
    """What the latents say of their media, with the options and the model for what they leave open."""
    facts, own = Facts.of(file.info), getattr(model.vae, "sampling_rate", None)
    sampling_rate = own if _rates(model) else facts.sampling_rate or own
    return replace(facts, frame_rate=model.options.frame_rate or facts.frame_rate, sampling_rate=sampling_rate)


def _rates(model: Model) -> tuple[int, int] | None:
    """Of the sound that latents were made of, and of what they are decoded to, where these differ."""
    encoded = getattr(model.vae, "encoded_sampling_rate", None)
    return None if encoded is None else (encoded, model.vae.sampling_rate)  # type: ignore[return-value]


def _check_maker(model: Model, file: LatentReader, console: Console) -> None:
    """Refuse latents that another network made, unless they are forced upon this one."""
    try:
        file.info.check(model.vae.provenance)
    except CheckpointError as error:
        if not model.options.force:
            way_out = "; pass their checkpoint as --model" if model.is_demo else ""
            raise CheckpointError(f"{file.path}: {error}{way_out}") from None
        console.remark(f"{file.path}: decoded although another network made it, because of --force")


def _shape_to_keep(model: Model, file: LatentReader) -> tuple[int, ...]:
    """The sample shape that the file names, if its latents are of that size: edited ones are not cut without a word."""
    made_from, decoded = file.info.sample_shape, model.vae.decoded_shape(file.shape)
    if rates := _rates(model):
        made_from = (*made_from[:2], -(-made_from[2] * rates[1] // rates[0]))
    if model.vae.valid_sample_shape(made_from)[2:] == decoded[2:]:
        return made_from
    if model.options.force:
        return decoded
    raise ShapeError(
        f"{file.path} decodes to {sizes(decoded[2:])} and was made from {sizes(made_from[2:])};"
        " --force writes all that comes out"
    )
