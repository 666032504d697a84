"""The model that the options ask for, on its device."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastvideo_vae_core import registry
from fastvideo_vae_core.cli.console import Console
from fastvideo_vae_core.cli.samples import Medium, Reading, medium_of
from fastvideo_vae_core.errors import CheckpointError, ConfigError, FamilyError
from fastvideo_vae_core.family import Family, Media, Waveforms, load_object
from fastvideo_vae_core.latents import Provenance
from fastvideo_vae_core.loading import holds, inspect, load
from fastvideo_vae_core.plan import Plan
from fastvideo_vae_core.sharding import Sharding
from fastvideo_vae_core.vae import ParallelTiledVAE


@dataclass(frozen=True, kw_only=True)
class Model:
    """A loaded model and how the options want it run.

    Attributes:
        source: where the weights came from.
        is_demo: they are the miniature that ships with the family.
        medium: how its media are read, written and compared.
        back: the network that decodes, where it is another one than `vae`, which encodes then.
    """

    vae: ParallelTiledVAE[Any]
    source: str
    is_demo: bool
    medium: Medium
    console: Console
    options: argparse.Namespace
    back: ParallelTiledVAE[Any] | None = None

    @property
    def sharding(self) -> Sharding | None:
        """The ranks that compute together, if torchrun has started several."""
        found: Sharding | None = getattr(self.options, "sharding", None)
        return found

    @property
    def writes(self) -> bool:
        """Whether what is computed comes here, to be written."""
        return self.sharding is None or self.sharding.rank == 0

    @property
    def decoding(self) -> Model:
        """The model with the network that decodes."""
        return self if self.back is None else replace(self, vae=self.back, back=None)

    @property
    def name(self) -> str:
        """For people: the family, and which of its checkpoints."""
        made_by = self.vae.provenance
        which = "its miniature" if self.is_demo else made_by.variant or Path(self.source).name
        return f"{made_by.family} ({which})"

    @property
    def reading(self) -> Reading:
        """How its samples are read."""
        return Reading(
            device=self.vae.device,
            channels=self.vae.channels[0],
            sampling_rate=getattr(self.vae, "sampling_rate", None),
            downmix=getattr(self.options, "downmix", False),
        )

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


def compression(sample_shape: Sequence[int], latent_shape: Sequence[int]) -> float:
    """How many numbers of the samples one number of the latents stands for."""
    return math.prod(sample_shape) / math.prod(latent_shape)


def plan_entry(plan: Plan | None) -> dict[str, Any] | None:
    """A plan for the JSON document."""
    if plan is None:
        return None
    return {
        "mode": plan.mode,
        "tile": plan.tile,
        "chunk": plan.chunk,
        "dtype": str(plan.dtype).removeprefix("torch."),
        "device": str(plan.device),
        "ranks": 1 if plan.sharding is None else plan.sharding.world,
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

    media: of the input.
    made_by: the network that made the latents to be decoded; it settles what the options leave open.

    Raises:
        VAEError: nothing fits; the message says what to pass or install.
    """
    # Before the weights, which may be large.
    device = open_device(options.device)
    if media != "video":
        _check_options(options, media)
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
        component=options.component or (_open_component(made_by) if made_by else None),
        revision=options.revision,
        device=device,
        dtype=options.dtype,
        load_encoder=encoder,
        load_decoder=decoder,
        config=options.config,
    )
    vae.config = replace(vae.config, fp16=options.fp16, use_tiling=options.tiling)
    component = registry.resolve(vae.family).component(vae.component)
    medium = medium_of(component.media)
    # Of a video file, a model of sound takes the sound.
    if medium.media != media and (media, medium.media) != ("video", "audio"):
        others = [each.name for each in registry.resolve(vae.family).components if each.waveforms or each.sound]
        takes = [name for name in others if registry.resolve(vae.family).component(name).media == media]
        way_out = f"; pass --component {takes[0]}" if takes else ""
        raise CheckpointError(f"{source} is a model of {medium.media} ({vae.family}), the input is {media}{way_out}")
    _check_options(options, medium.media, also_sound=component.sound is not None)
    model = Model(vae=vae, source=source, is_demo=is_demo, medium=medium, console=console, options=options)
    return model if component.waveforms is None else _over_waveforms(model, component.waveforms, encoder, decoder)


def open_sound(model: Model) -> Model | None:
    """The model of the sound of clips, if the checkpoint of their pictures holds its networks."""
    family = registry.resolve(model.vae.family)
    name = family.component(model.vae.component).sound
    if name is None:
        return None
    component, options = family.component(name), model.options
    needed = [name] if component.waveforms is None else [name, component.waveforms.vocoder]
    if not all(holds(model.source, family.name, each, revision=options.revision) for each in needed):
        return None
    # What the options say of the network of the pictures alone.
    own = {"component": name, "variant": None, "subfolder": None, "config": None, "tile": None, "tiling": False}
    # What is for video alone, and was taken note of.
    own |= {"crf": None, "no_sound": False, "keep_sound": False, "model": str(model.source), "family": family.name}
    # It is little work, for the one who writes it.
    own |= {"sharding": None}
    return open_model(argparse.Namespace(**{**vars(options), **own}), model.console, "audio")


def _over_waveforms(model: Model, waveforms: Waveforms, encoder: bool, decoder: bool) -> Model:
    """A model of spectrograms as one of waveforms, in the directions that are wanted."""
    if not decoder:
        return replace(model, vae=load_object(waveforms.encoder)(model.vae))
    if not holds(model.source, model.vae.family, waveforms.vocoder, revision=model.options.revision):
        raise CheckpointError(
            f"{model.source} holds no {waveforms.vocoder}, which makes waveforms of spectrograms; pass a checkpoint of"
            f" {model.vae.component} and {waveforms.vocoder}"
        )
    vocoder = load(
        model.source,
        family=model.vae.family,
        component=waveforms.vocoder,
        revision=model.options.revision,
        device=model.vae.device,
        dtype=model.options.dtype,
    )
    vocoder.config = replace(vocoder.config, fp16=model.options.fp16)
    speaks = load_object(waveforms.decoder)(model.vae, vocoder)
    if not encoder:
        return replace(model, vae=speaks)
    return replace(model, vae=load_object(waveforms.encoder)(model.vae), back=speaks)


def _check_options(options: argparse.Namespace, media: Media, also_sound: bool = False) -> None:
    """Refuse options that would do nothing for that media, or for the sound that comes with it."""
    for option, kinds in _OPTIONS_OF.items():
        value = getattr(options, option, None)
        useless = media not in kinds and not (also_sound and "audio" in kinds)
        if value is not None and value is not False and useless:
            name = option.replace("_", "-")
            raise ConfigError(f"--{name} is for {' and '.join(kinds)}, this is {media}; leave it out")


_OPTIONS_OF: dict[str, tuple[Media, ...]] = {
    "tile": ("image", "video"),
    "tiling": ("image", "video"),
    "crf": ("video",),
    "frame_rate": ("video",),
    "sound": ("video",),
    "no_sound": ("video",),
    "keep_sound": ("video",),
    "downmix": ("audio",),
}


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


def _open_component(made_by: Provenance) -> str | None:
    """The component that latents name, where their family has several."""
    return made_by.component if len(registry.resolve(made_by.family).components) > 1 else None


def _open_variant(options: argparse.Namespace, source: str, made_by: Provenance) -> str | None:
    """The variant that latents name, where the tensors of the source leave open which one it is."""
    if options.config is not None or made_by.variant is None:
        return None
    about = inspect(source, subfolder=options.subfolder, revision=options.revision)
    fitting = [each["variants"] for each in about["components"] if each["family"] == made_by.family]
    return made_by.variant if any(len(each) > 1 and made_by.variant in each for each in fitting) else None
