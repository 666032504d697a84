"""From a path or hub id, in any layout that people have, to a model on its device: strictly, and reading only what is
needed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastvideo_vae_core import registry
from fastvideo_vae_core.checkpoint import (
    Checkpoint,
    Recognised,
    canonical_infos,
    fingerprint,
    fits,
    listing,
    recognise,
)
from fastvideo_vae_core.config import VAEArchConfig, VAEConfig
from fastvideo_vae_core.errors import CheckpointError, ConfigError, FamilyError
from fastvideo_vae_core.family import Evidence, Family, Inferred, load_object
from fastvideo_vae_core.latents import Provenance
from fastvideo_vae_core.sources import Found, find

if TYPE_CHECKING:
    from fastvideo_vae_core.vae import ParallelTiledVAE

_COMPUTE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def load(
    source: str | Path,
    *,
    subfolder: str | None = None,
    family: str | None = None,
    variant: str | None = None,
    component: str | None = None,
    revision: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    load_encoder: bool = True,
    load_decoder: bool = True,
    config: VAEConfig | Mapping[str, Any] | str | Path | None = None,
) -> ParallelTiledVAE[Any]:
    """Load a model.

    source: a directory, one file, or a hub id "owner/name"; diffusers' or an official layout, recognised from its
        configuration or from the tensors.
    subfolder: of the directory or hub repository; by default that of the component where a pipeline is recognised.
    family, variant, component: recognised when not given, checked when given. A variant is a published checkpoint,
        for example "sdxl"; it must be given where the tensors leave it open.
    revision: of the hub repository.
    device, dtype: where the weights go and in which type; by default the CPU and the type they are stored in.
    load_encoder, load_decoder: read only the halves that are wanted.
    config: a VAEConfig to run with, such as VAEConfig(fp16="retry"); or a diffusers configuration, as a mapping or a
        JSON file, for weights that have none beside them.

    For example `load("sd-vae-ft-mse").encode(x).latent_dist.mode()` with x (1, 3, 512, 512) gives (1, 4, 64, 64).

    Raises:
        CheckpointError: the weights are missing, damaged, not recognised, not finite, or do not fit: every tensor that
            is missing, unexpected or of another shape is named.
        ConfigError: the configuration is unknown or out of bounds; nothing was allocated.
        FamilyError: no installed family knows the class.
    """
    found = find(
        source, subfolder=subfolder, revision=revision, config=config, folder=_pipeline_folder(family, component)
    )
    chosen = choose(found, family=family, component=component, variant=variant)
    run = config if isinstance(config, VAEConfig) else VAEConfig(arch_config=chosen.arch)
    run = replace(
        run,
        arch_config=chosen.arch,
        load_encoder=load_encoder and run.load_encoder,
        load_decoder=load_decoder and run.load_decoder,
        pretrained_path=str(source),
    )
    with torch.device("meta"):
        model: ParallelTiledVAE[Any] = load_object(chosen.recognised.component.model)(run)
    _fill(model, found.checkpoint, chosen.recognised, torch.device(device), _as_dtype(dtype))
    model._provenance = Provenance(
        family=chosen.recognised.family.name,
        component=chosen.recognised.component.name,
        variant=chosen.variant,
        checkpoint=_fingerprint(found.checkpoint, chosen.recognised),
    )
    return model.to(device).eval().requires_grad_(False)


def load_demo(
    family: str, *, device: str | torch.device = "cpu", dtype: torch.dtype | str | None = None
) -> ParallelTiledVAE[Any]:
    """The trained miniature that ships with a family. Its quality is that of a miniature."""
    described = registry.resolve(family)
    if described.demo is None:
        raise FamilyError(f"{described.distribution} ships no demonstration weights")
    return load(described.resource(described.demo), family=described.name, device=device, dtype=dtype)


def holds(source: str | Path, family: str, component: str, *, revision: str | None = None) -> bool:
    """Whether a source holds that network, so that `load` with this component would find it; reads no tensor."""
    described = registry.resolve(family)
    try:
        found = find(source, revision=revision, folder=described.component(component).folder)
    except CheckpointError:
        return False
    return any(each.component.name == component for each in recognise(found.checkpoint, [described]))


@dataclass(frozen=True)
class Chosen:
    """What a source is going to be loaded as."""

    recognised: Recognised
    arch: VAEArchConfig
    variant: str | None


def inspect(source: str | Path, *, subfolder: str | None = None, revision: str | None = None) -> dict[str, Any]:
    """What a source holds and would be loaded as, as JSON-ready values; reads no tensor.

    Keys: paths, tensors, parameters, bytes, class_name, components (each with family, component, layout, prefix,
    variants, tensors, parameters, dtypes, arch, problem).
    """
    found = find(source, subfolder=subfolder, revision=revision)
    infos = found.checkpoint.infos
    described = [_describe(found, each) for each in recognise(found.checkpoint, registry.installed().values())]
    return {
        "paths": [str(path) for path in found.checkpoint.paths],
        "tensors": len(infos),
        "parameters": sum(math.prod(info.shape) for info in infos.values()),
        "bytes": sum(math.prod(info.shape) * info.dtype.itemsize for info in infos.values()),
        "class_name": (found.config or {}).get("_class_name"),
        "components": described,
    }


def choose(found: Found, *, family: str | None, component: str | None, variant: str | None) -> Chosen:
    """Decide which network of which family the source holds, and its architecture."""
    class_name = (found.config or {}).get("_class_name")
    if family is not None:
        families = [registry.resolve(family)]
    elif isinstance(class_name, str):
        families = [registry.resolve(class_name)]
    else:
        families = list(registry.installed().values())
    candidates = recognise(found.checkpoint, families)
    if component is not None:
        candidates = [each for each in candidates if each.component.name == component]
    elif isinstance(class_name, str):
        candidates = [each for each in candidates if class_name in each.component.class_names]
    if not candidates:
        raise CheckpointError(_unrecognised(found, families))
    if len({each.family.name for each in candidates}) > 1:
        names = " or ".join(f"family={each.family.name!r}" for each in candidates)
        raise CheckpointError(f"{_where(found)} could be read in more than one way; pass {names}")
    recognised = candidates[0]
    arch, name = _architecture(found, recognised, variant)
    return Chosen(recognised, arch, name)


def _pipeline_folder(family: str | None, component: str | None) -> str:
    """Where a pipeline keeps the component that is asked for."""
    families = registry.installed().values() if family is None else [registry.resolve(family)]
    found = (each for described in families for each in described.components if each.name == component)
    return next((each.folder for each in found), "vae")


def _architecture(found: Found, recognised: Recognised, variant: str | None) -> tuple[VAEArchConfig, str | None]:
    component = recognised.component
    constants: Mapping[str, VAEArchConfig] = component.constants
    if variant is not None and variant not in constants:
        raise ConfigError(f"{recognised.family.name} has no variant {variant!r}; it has {', '.join(constants)}")
    config = found.config_for(component)
    if config is not None:
        arch: VAEArchConfig = load_object(component.arch).from_dict(config)
        same = tuple(name for name, constant in constants.items() if _same_model(constant, arch))
    else:
        inferred: Inferred = load_object(component.infer)(_evidence(found, recognised))
        arch, same = inferred.arch, inferred.variants
    if variant is not None:
        if variant not in same:
            is_one = f"it is {' or '.join(same)}" if same else "it is none of the published ones"
            raise CheckpointError(f"{_where(found)} is no {recognised.family.name} {variant}: {is_one}")
        return (arch if config is not None else constants[variant]), variant
    if config is None and len(same) > 1:
        names = " or ".join(f"variant={name!r}" for name in same)
        raise CheckpointError(f"the tensors of {_where(found)} fit more than one checkpoint; pass {names}")
    return arch, same[0] if same else None


def _same_model(one: VAEArchConfig, other: VAEArchConfig) -> bool:
    """Whether two configurations are one network and one scaling; the training size does not count."""
    left, right = one.to_dict(), other.to_dict()
    return all(left[item.name] == right[item.name] for item in fields(one) if item.name != "sample_size")


def _fill(
    model: torch.nn.Module,
    checkpoint: Checkpoint,
    recognised: Recognised,
    device: torch.device,
    dtype: torch.dtype | None,
) -> None:
    """Give a model on the meta device its weights, one tensor at a time, straight to their device and type."""
    _check_fit(model, checkpoint, recognised)
    renames = recognised.renames
    tensors: dict[str, Tensor] = {}
    dtypes = {half: _half_dtype(model, half, checkpoint, renames, dtype) for half in (True, False)}
    for name, expected in model.state_dict().items():
        half = dtypes[_encodes(model, name)]
        tensor = checkpoint.read(renames[name][0], half).reshape(expected.shape)
        # A copy, so that the file may be replaced while the model lives.
        tensors[name] = tensor.to(device, half, copy=True)
    if bad := [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]:
        raise CheckpointError(f"{len(bad)} tensors hold NaN or infinity: {listing(bad)}; the file is damaged")
    model.load_state_dict(tensors, strict=True, assign=True)


def _check_fit(model: torch.nn.Module, checkpoint: Checkpoint, recognised: Recognised) -> None:
    """Name every tensor that is missing, unexpected or of another shape than the model's."""
    wanted, renames, left = model.state_dict(), recognised.renames, _unloaded(model)
    missing = [name for name in wanted if name not in renames]
    unexpected = [name for name in renames if name not in wanted and not name.startswith(left)]
    misshapen = []
    for name in (name for name in wanted if name in renames):
        stored, reshape = renames[name]
        shape = checkpoint.infos[stored].shape
        if not fits(shape, wanted[name].shape, reshape):
            misshapen.append(f"{stored} {shape} for {tuple(wanted[name].shape)}")
    problems = {"missing": missing, "unexpected": [*recognised.unexpected, *unexpected], "misshapen": misshapen}
    if any(problems.values()):
        where = ", ".join(map(str, checkpoint.paths))
        told = "; ".join(f"{len(names)} {what}: {listing(names)}" for what, names in problems.items() if names)
        raise CheckpointError(
            f"{where} does not fit {recognised.family.name} ({recognised.layout.name} layout): {told}"
        )


def _unloaded(model: Any) -> tuple[str, ...]:
    """Prefixes of the half that is not loaded; its tensors are left in the file."""
    names: tuple[str, ...] = ()
    if not model.config.load_encoder:
        names += model.encoder_modules
    if not model.config.load_decoder:
        names += model.decoder_modules
    return tuple(f"{name}." for name in names)


def _encodes(model: Any, name: str) -> bool:
    return name.partition(".")[0] in model.encoder_modules


def _half_dtype(
    model: Any,
    encoder: bool,
    checkpoint: Checkpoint,
    renames: Mapping[str, tuple[str, bool]],
    dtype: torch.dtype | None,
) -> torch.dtype:
    """The one type that a half gets: what was asked for, else what most of its numbers are stored in."""
    own = _as_dtype(model.config.encode_dtype if encoder else model.config.decode_dtype) or dtype
    if own is not None:
        return own
    stored = Counter[torch.dtype]()
    for name, (source, _) in renames.items():
        if _encodes(model, name) == encoder:
            stored[checkpoint.infos[source].dtype] += math.prod(checkpoint.infos[source].shape)
    most = stored.most_common(1)[0][0] if stored else torch.float32
    return most if most in _COMPUTE else torch.float32


def _fingerprint(checkpoint: Checkpoint, recognised: Recognised) -> str:
    names = {name: stored for name, (stored, _) in recognised.renames.items()}
    return fingerprint(
        ((name, checkpoint.head(stored)) for name, stored in names.items()),
        {name: checkpoint.infos[stored].shape for name, stored in names.items()},
    )


def _describe(found: Found, recognised: Recognised) -> dict[str, Any]:
    infos = canonical_infos(found.checkpoint, recognised)
    description: dict[str, Any] = {
        "family": recognised.family.name,
        "component": recognised.component.name,
        "layout": recognised.layout.name,
        "prefix": recognised.prefix,
        "tensors": len(infos),
        "parameters": sum(math.prod(info.shape) for info in infos.values()),
        "dtypes": sorted({str(info.dtype).removeprefix("torch.") for info in infos.values()}),
        "variants": [],
        "arch": None,
        "problem": None,
    }
    try:
        if found.config_for(recognised.component) is None:
            inferred: Inferred = load_object(recognised.component.infer)(_evidence(found, recognised))
            arch, variants = inferred.arch, list(inferred.variants)
        else:
            arch, variant = _architecture(found, recognised, None)
            variants = [variant] if variant else []
        description |= {"variants": variants, "arch": arch.to_dict()}
        _check_fit(_shell(recognised, arch), found.checkpoint, recognised)
    except (CheckpointError, ConfigError) as error:
        description["problem"] = str(error)
    return description


def _shell(recognised: Recognised, arch: VAEArchConfig) -> torch.nn.Module:
    """The model without weights, of the halves that the checkpoint holds."""
    cls = load_object(recognised.component.model)
    halves = {name.partition(".")[0] for name in recognised.renames}
    encoder, decoder = (not halves.isdisjoint(names) for names in (cls.encoder_modules, cls.decoder_modules))
    with torch.device("meta"):
        shell: torch.nn.Module = cls(VAEConfig(arch_config=arch, load_encoder=encoder, load_decoder=decoder))
    return shell


def _evidence(found: Found, recognised: Recognised) -> Evidence:
    shapes = {name: info.shape for name, info in canonical_infos(found.checkpoint, recognised).items()}
    checkpoint = found.checkpoint
    return Evidence(
        shapes=shapes,
        names=frozenset(checkpoint.infos),
        stem=checkpoint.paths[0].stem,
        prefix=recognised.prefix,
        layout=recognised.layout.name,
        metadata=checkpoint.metadata,
    )


def _unrecognised(found: Found, families: Sequence[Family]) -> str:
    names = ", ".join(each.name for each in families) or "none"
    first = listing(sorted(found.checkpoint.infos), 3)
    broken = "".join(f"; {reason}" for reason in registry.failures().values())
    return f"no network of {names} is recognised in {_where(found)} (tensors like {first}){broken}"


def _where(found: Found) -> str:
    return ", ".join(map(str, found.checkpoint.paths))


def _as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    known = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
    if dtype not in known:
        raise ConfigError(f"dtype must be one of {', '.join(known)}, got {dtype!r}")
    return known[dtype]
