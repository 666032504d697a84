"""What an entry point names: a description of a family that can be read without importing torch."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from fastvideo_vae_core.errors import FamilyError

Media = Literal["image", "video", "audio"]


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family of autoencoders, as its distribution describes it.

    Attributes:
        name: the entry point's name, for example "wan".
        distribution: what to install, for example "fastvideo-vae-wan".
        title: a line for people.
        components: the networks of a checkpoint; the first is the one meant when none is named.
        demo: file of the trained miniature, relative to the package, or None.
        demo_media: a small real media file to run it on, likewise.
    """

    name: str
    distribution: str
    title: str
    components: tuple[Component, ...]
    demo: str | None = None
    demo_media: str | None = None

    @property
    def class_names(self) -> tuple[str, ...]:
        """Every `_class_name` that this family answers to."""
        return tuple(name for component in self.components for name in component.class_names)

    def component(self, name: str | None) -> Component:
        """The component of that name, or the first one."""
        if name is None:
            return self.components[0]
        for component in self.components:
            if component.name == name:
                return component
        names = ", ".join(component.name for component in self.components)
        raise FamilyError(f"{self.name} has no component {name!r}; it has {names}")

    def resource(self, name: str) -> Path:
        """Path of a file that ships inside the family's package."""
        package = importlib.import_module(self.components[0].model.partition(":")[0].partition(".")[0])
        assert package.__file__ is not None
        return Path(package.__file__).parent / name


@dataclass(frozen=True, kw_only=True)
class Component:
    """One network of a family. The dotted paths are "module:name" and are imported only when they are used.

    Attributes:
        name: "vae" where a family has one network only.
        media: what it encodes.
        model: class of the model, a ParallelTiledVAE.
        arch: class of its architecture configuration, a VAEArchConfig.
        class_names: every `_class_name` that names it: diffusers', FastVideo's and the official one.
        variants: the published checkpoints: name -> path of the constant.
        layouts: the ways in which people store its tensors.
        infer: function (Evidence) -> Inferred, for files that have no configuration beside them.
        official_config: name of the configuration that the official code puts beside its weights; `arch` reads it too.
        folder: name of its folder in a diffusers pipeline.
        sound: name of the component that takes the sound of what this one takes the pictures of.
        waveforms: how sound goes in and comes out, where the samples are not waveforms but spectrograms.
    """

    name: str = "vae"
    media: Media
    model: str
    arch: str
    class_names: tuple[str, ...]
    variants: Mapping[str, str]
    layouts: tuple[Layout, ...]
    infer: str
    official_config: str | None = None
    folder: str = "vae"
    sound: str | None = None
    waveforms: Waveforms | None = None

    @cached_property
    def constants(self) -> Mapping[str, Any]:
        """The published configurations: variant -> VAEArchConfig."""
        return {name: load_object(path) for name, path in self.variants.items()}


@dataclass(frozen=True, kw_only=True)
class Waveforms:
    """What makes an autoencoder of waveforms (B, C, S) of one of spectrograms.

    Attributes:
        vocoder: name of the component that makes waveforms of spectrograms.
        encoder: "module:class", called with the model: a ParallelTiledVAE that encodes waveforms, at its
            `sampling_rate`.
        decoder: the same, called with the model and the vocoder: decodes to waveforms, at its `sampling_rate`, latents
            of waveforms at its `encoded_sampling_rate`.
    """

    vocoder: str
    encoder: str
    decoder: str


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way in which the tensors of a component are named in files.

    Attributes:
        name: "diffusers", or that of the official code.
        markers: (tensor name, number of axes); one of them in a file, behind one of the prefixes, is proof. There is
            one for each half, because people cut files in two.
        prefixes: what may stand before the names, longest first. Behind a prefix that is not empty, other tensors of
            the file are another network's and are left alone.
        rules: "module:function", from the names to their RenameTable; empty where they are the model's own.
        unlike: tensor names of other networks that have the markers too; one of them is proof of the opposite.
    """

    name: str
    markers: tuple[tuple[str, int], ...]
    prefixes: tuple[str, ...] = ("",)
    rules: str = ""
    unlike: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What is known of a checkpoint without a configuration.

    Attributes:
        shapes: the model's own tensor names -> shape.
        names: every name in the file, also those of other networks.
        stem: the file's name without its suffix.
        prefix, layout: how the tensors were recognised.
        metadata: the file's metadata, where the format has any.
    """

    shapes: Mapping[str, tuple[int, ...]]
    names: frozenset[str]
    stem: str
    prefix: str
    layout: str
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Inferred:
    """What the evidence says.

    Attributes:
        arch: the architecture, a VAEArchConfig; its scaling is that of the first candidate.
        variants: the published checkpoints that it may be; more than one when only their scaling differs.
    """

    arch: Any
    variants: tuple[str, ...] = ()


def load_object(path: str) -> Any:
    """The object that "module:name" names."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
