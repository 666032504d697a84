"""The model that the options ask for, on its device, and running it within the options."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvideo_vae_core import registry
from fastvideo_vae_core.cli.console import Console, in_shell_words, sizes
from fastvideo_vae_core.cli.samples import Medium, medium_of
from fastvideo_vae_core.errors import CheckpointError, ConfigError, FamilyError, MemoryBudgetError
from fastvideo_vae_core.family import Family, Media
from fastvideo_vae_core.latents import Provenance
from fastvideo_vae_core.loading import inspect, load
from fastvideo_vae_core.plan import Direction, Plan
from fastvideo_vae_core.vae import ParallelTiledVAE


@dataclass(frozen=True, kw_only=True)
class Model:
    """A loaded model and how the options want it run.

    Attributes:
        source: where the weights came from.
        is_demo: they are the miniature that ships with the family.
        medium: how its media are read, written and compared.
    """

    vae: ParallelTiledVAE[Any]
    source: str
    is_demo: bool
    medium: Medium
    console: Console
    options: argparse.Namespace

    @property
    def name(self) -> str:
        """For people: the family, and which of its checkpoints."""
        made_by = self.vae.provenance
        which = "its shipped miniature" if self.is_demo else made_by.variant or Path(self.source).name
        return f"{made_by.family} ({which})"

    def encode(self, x: Tensor) -> Encoded:
        """Samples (1, C, ...) on the CPU to raw latents on the CPU, padded to a legal size unless --no-pad."""
        options, vae = self.options, self.vae
        padded = x if options.no_pad else vae.pad_to_valid(x)
        if padded.shape != x.shape:
            self.console.remark(
                f"{sizes(x.shape[2:])} is padded to {sizes(padded.shape[2:])}; decoding takes the padding off again"
            )
        plan = self._plan("encode", padded.shape)
        start = time.perf_counter()
        with _out_of_memory(plan):
            posterior = vae.encode(padded.to(vae.device), plan=plan).latent_dist
            # A generator on the CPU gives the same noise for every device.
            z = posterior.sample(torch.Generator().manual_seed(options.seed)) if options.sample else posterior.mode()
            z = z.cpu()
        return Encoded(z, tuple(padded.shape), plan, time.perf_counter() - start)

    def decode(self, z: Tensor) -> Decoded:
        """Raw latents on the CPU to samples on the CPU."""
        plan = self._plan("decode", z.shape)
        start = time.perf_counter()
        with _out_of_memory(plan):
            x = self.vae.decode(z.to(self.vae.device), plan=plan).sample.cpu()
        return Decoded(x, plan, time.perf_counter() - start)

    def describe(self) -> dict[str, Any]:
        """For the JSON document."""
        made_by = self.vae.provenance
        return {
            "source": self.source,
            "demo": self.is_demo,
            "family": made_by.family,
            "component": made_by.component,
            "variant": made_by.variant,
            "checkpoint": made_by.checkpoint,
            "device": str(self.vae.device),
            "dtype": str(self.vae.dtype).removeprefix("torch."),
        }

    def _plan(self, direction: Direction, shape: Sequence[int]) -> Plan:
        make = self.vae.plan_encode if direction == "encode" else self.vae.plan_decode
        plan = make(shape, memory_budget=self.options.memory_budget, tile=self.options.tile)
        if self.options.plan:
            self.console.say(in_shell_words(str(plan)), "")
        return plan


class Encoded(NamedTuple):
    """Raw latents, the shape of the samples that were really encoded, how, and how long it took."""

    z: Tensor
    padded_shape: tuple[int, ...]
    plan: Plan
    seconds: float


class Decoded(NamedTuple):
    """Samples, how they were computed, and how long it took."""

    x: Tensor
    plan: Plan
    seconds: float


def compression(sample_shape: Sequence[int], latent_shape: Sequence[int]) -> float:
    """How many numbers of the samples one number of the latents stands for."""
    return math.prod(sample_shape) / math.prod(latent_shape)


def plan_entry(plan: Plan) -> dict[str, Any]:
    """A plan for the JSON document."""
    return {
        "mode": plan.mode,
        "tile": plan.tile,
        "dtype": str(plan.dtype).removeprefix("torch."),
        "device": str(plan.device),
        "peak_bytes": plan.peak_bytes,
        "notes": plan.notes,
    }


def open_model(
    options: argparse.Namespace,
    console: Console,
    media: Media,
    *,
    made_by: Provenance | None = None,
    encoder: bool = True,
    decoder: bool = True,
) -> Model:
    """Load what the options name, or the miniature of a family for that media.

    made_by: the network that made the latents to be decoded; it settles what the options leave open.

    Raises:
        VAEError: nothing fits; the message says what to pass or install.
    """
    # Before the weights, which may be large.
    device = open_device(options.device)
    family = options.family
    source, is_demo = options.model, options.model is None
    if source is None:
        described = _demo_family(family or (made_by.family if made_by else None), media, options.component)
        family, source = described.name, str(described.resource(str(described.demo)))
        console.remark(f"using the miniature that ships with {described.distribution}; --model takes a real checkpoint")
    vae = load(
        source,
        subfolder=options.subfolder,
        family=family,
        variant=options.variant or (_open_variant(options, source, made_by) if made_by else None),
        component=options.component,
        revision=options.revision,
        device=device,
        dtype=options.dtype,
        load_encoder=encoder,
        load_decoder=decoder,
        config=options.config,
    )
    vae.config = replace(vae.config, fp16=options.fp16, use_tiling=options.tiling)
    medium = medium_of(registry.resolve(vae.family).component(vae.component).media)
    if medium.media != media:
        raise CheckpointError(f"{source} is a model of {medium.media} ({vae.family}), the input is {media}")
    return Model(vae=vae, source=source, is_demo=is_demo, medium=medium, console=console, options=options)


def open_device(name: str) -> torch.device:
    """The device of that name, tried out; "auto" is CUDA where there is a device.

    Raises:
        ConfigError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    # Backends that are missing raise AssertionError, ImportError, NotImplementedError or RuntimeError, as they please.
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(f"device {name!r} cannot be used ({reason}); leave --device out, or pass cpu") from None
    return device


def demo_families(media: Media | None = None) -> list[Family]:
    """Installed families that ship a miniature, for that media."""
    found = [family for family in registry.installed().values() if family.demo and family.demo_media]
    return [family for family in found if media in (None, family.components[0].media)]


def _demo_family(name: str | None, media: Media, component: str | None) -> Family:
    if name is None:
        families = demo_families(media)
        if not families:
            raise FamilyError(f"no installed family ships a miniature for {media}; pass --model, or install a family")
        return families[0]
    family = registry.resolve(name)
    if family.demo is None:
        raise FamilyError(f"{family.distribution} ships no miniature; pass --model")
    family.component(component)
    return family


def _open_variant(options: argparse.Namespace, source: str, made_by: Provenance) -> str | None:
    """The variant that latents name, where the tensors of the source leave open which one it is."""
    if options.config is not None or made_by.variant is None:
        return None
    about = inspect(source, subfolder=options.subfolder, revision=options.revision)
    fitting = [each["variants"] for each in about["components"] if each["family"] == made_by.family]
    return made_by.variant if any(len(each) > 1 and made_by.variant in each for each in fitting) else None


@contextmanager
def _out_of_memory(plan: Plan) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise MemoryBudgetError(
            f"{plan.direction} of {sizes(plan.input_shape)} ran out of memory;"
            " pass --memory-budget, or --tile with a smaller tile"
        ) from None
