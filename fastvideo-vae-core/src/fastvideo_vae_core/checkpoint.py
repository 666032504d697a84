"""Reading checkpoint files: what tensors they hold, in which layout, under which names the model has them."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastvideo_vae_core.errors import CheckpointError
from fastvideo_vae_core.family import Component, Family, Layout, load_object
from fastvideo_vae_core.weight_norm import NormedWeight, folded

SAFETENSORS_SUFFIXES = (".safetensors", ".sft")
PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
SUFFIXES = SAFETENSORS_SUFFIXES + PICKLE_SUFFIXES

# Values of each tensor that a fingerprint takes.
HEAD = 1024


class TensorInfo(NamedTuple):
    """Shape and torch dtype of a stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint: tensors are listed from the headers and read one by one, when asked for.

    Attributes:
        paths: the file, or the shards.
        infos: name in the file -> shape and dtype. A weight that is stored as direction and norm is one tensor here.
        metadata: strings from the safetensors header.
    """

    paths: tuple[Path, ...]
    infos: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    _sources: Mapping[str, Any]

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The stored tensor on the CPU, mapped from the file: only the pages that are touched are read.

        dtype: what it is going to be used in; a weight that has to be computed first is computed in that.
        """
        source = self._sources[name]
        if isinstance(source, NormedWeight):
            return source.read(dtype or self.infos[name].dtype)
        tensor = source if isinstance(source, Tensor) else source.get_tensor(name)
        assert isinstance(tensor, Tensor)
        return tensor

    def head(self, name: str) -> Tensor:
        """The stored tensor, or of one that has to be computed a beginning of at least HEAD values."""
        source, dtype = self._sources[name], self.infos[name].dtype
        return source.read(dtype, HEAD).to(dtype) if isinstance(source, NormedWeight) else self.read(name)


def open_checkpoint(paths: Iterable[Path]) -> Checkpoint:
    """Open safetensors or pickled checkpoints; several files are shards of one.

    Pickled files open with `weights_only=True` and nothing else: they may hold tensors, not code.

    Raises:
        CheckpointError: a file is missing, empty, truncated, no checkpoint, or holds more than tensors.
    """
    paths = tuple(paths)
    infos: dict[str, TensorInfo] = {}
    sources: dict[str, Any] = {}
    metadata: dict[str, str] = {}
    for path in paths:
        if not path.is_file():
            raise CheckpointError(f"{path} does not exist or is no file")
        if path.stat().st_size == 0:
            raise CheckpointError(f"{path} is empty; download it again")
        opened = _open_safetensors(path) if _is_safetensors(path) else _open_pickle(path)
        if twice := sorted(set(infos) & set(opened.infos)):
            raise CheckpointError(f"{path} and another shard both hold {listing(twice)}")
        infos.update(opened.infos)
        sources.update(opened._sources)
        metadata.update(opened.metadata)
    if not infos:
        raise CheckpointError(f"{', '.join(map(str, paths))} holds no tensors")
    return folded(Checkpoint(paths, infos, metadata, sources))


def shards(index: Path) -> tuple[Path, ...]:
    """The files that a `*.safetensors.index.json` names, each checked to lie beside it."""
    try:
        files = set(json.loads(index.read_text())["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is no shard index: {error!r}") from None
    if outside := sorted(str(name) for name in files if Path(str(name)).name != name or name in ("", "..")):
        raise CheckpointError(f"{index} names files outside its folder: {listing(outside)}")
    return tuple(index.parent / name for name in sorted(files))


class Rule(NamedTuple):
    """Names that match `pattern` from end to end become `target`, a replacement as in `re.sub`.

    A target of None drops the tensor on purpose. With `reshape` the stored shape may differ from the model's in axes of
    length one.
    """

    pattern: str
    target: str | None
    reshape: bool = False


class RenameTable:
    """An ordered list of rules, each name taking the first that matches it, once."""

    def __init__(self, rules: Iterable[Rule]) -> None:
        self._rules = [(re.compile(rule.pattern), rule) for rule in rules]

    def __call__(self, name: str) -> Rule | None:
        """The rule that applies, its target filled in; None where there is none."""
        for pattern, rule in self._rules:
            if match := pattern.fullmatch(name):
                return rule if rule.target is None else rule._replace(target=match.expand(rule.target))
        return None


IDENTITY = RenameTable([Rule(r"(.+)", r"\1")])


@dataclass(frozen=True)
class Recognised:
    """A component whose tensors are in a checkpoint.

    Attributes:
        layout: how they are named there.
        prefix: what stands before the names.
        renames: the model's name -> (name in the file, whether it may be reshaped).
        unexpected: names in the file that no rule knows.
    """

    family: Family
    component: Component
    layout: Layout
    prefix: str
    renames: Mapping[str, tuple[str, bool]]
    unexpected: tuple[str, ...]


def recognise(checkpoint: Checkpoint, families: Iterable[Family]) -> list[Recognised]:
    """Every component of every family that has tensors in the checkpoint, found by their names and shapes alone."""
    found = []
    for family in families:
        for component in family.components:
            for layout in component.layouts:
                prefix = _prefix_of(checkpoint, layout)
                if prefix is not None:
                    found.append(_map(checkpoint, family, component, layout, prefix))
                    break
    return found


def canonical_infos(checkpoint: Checkpoint, recognised: Recognised) -> dict[str, TensorInfo]:
    """The tensors of a recognised component under the model's names, as they are stored."""
    return {name: checkpoint.infos[stored] for name, (stored, _) in recognised.renames.items()}


def fits(stored: Sequence[int], wanted: Sequence[int], reshape: bool) -> bool:
    """Whether a stored shape is the model's, or with `reshape` differs from it only in axes of length one."""
    if not reshape:
        return tuple(stored) == tuple(wanted)
    return [length for length in stored if length != 1] == [length for length in wanted if length != 1]


def fingerprint(tensors: Iterable[tuple[str, Tensor]], shapes: Mapping[str, Sequence[int]] | None = None) -> str:
    """A digest of the model's tensors, the same for every file layout: names, sizes and the first values of each.

    shapes: those of the whole tensors, where `tensors` gives only the beginnings.

    Values are compared as float32, axes of length one do not count. It tells checkpoints apart and is no proof against
    somebody who wants two to look alike.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        shape = tensor.shape if shapes is None else shapes[name]
        digest.update(f"{name} {[length for length in shape if length != 1]}".encode())
        digest.update(tensor.detach().reshape(-1)[:HEAD].float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


def _is_safetensors(path: Path) -> bool:
    return path.suffix in SAFETENSORS_SUFFIXES


def _open_safetensors(path: Path) -> Checkpoint:
    try:
        handle = safe_open(str(path), framework="pt", device="cpu")
        infos = {name: _slice_info(handle.get_slice(name)) for name in handle.keys()}  # noqa: SIM118
        metadata = dict(handle.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no whole safetensors file ({error}); download it again") from None
    return Checkpoint((path,), infos, metadata, dict.fromkeys(infos, handle))


def _slice_info(view: Any) -> TensorInfo:
    dtype = _SAFETENSORS_DTYPES.get(view.get_dtype())
    if dtype is None:
        raise ValueError(f"tensors of type {view.get_dtype()} are not supported")
    return TensorInfo(tuple(view.get_shape()), dtype)


_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def _open_pickle(path: Path) -> Checkpoint:
    try:
        # Files from before torch 1.6 are no zip archives and cannot be mapped.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:
        # Its message advises to run the code.
        raise CheckpointError(
            f"{path} is damaged, no checkpoint, or holds more than tensors and was not run; use a safetensors file"
        ) from None
    # The unpickler lets a damaged file end in almost any exception.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is no whole checkpoint ({reason}); download it again") from None
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a dictionary of tensors, got {type(content).__name__}")
    tensors = {name: each for name, each in content.items() if isinstance(name, str) and isinstance(each, Tensor)}
    infos = {name: TensorInfo(tuple(each.shape), each.dtype) for name, each in tensors.items()}
    return Checkpoint((path,), infos, {}, tensors)


def _prefix_of(checkpoint: Checkpoint, layout: Layout) -> str | None:
    for prefix in layout.prefixes:
        if any(prefix + name in checkpoint.infos for name in layout.unlike):
            continue
        for name, axes in layout.markers:
            info = checkpoint.infos.get(prefix + name)
            if info is not None and len(info.shape) == axes:
                return prefix
    return None


def _map(checkpoint: Checkpoint, family: Family, component: Component, layout: Layout, prefix: str) -> Recognised:
    bare = [name.removeprefix(prefix) for name in checkpoint.infos if name.startswith(prefix)]
    table = load_object(layout.rules)(bare) if layout.rules else IDENTITY
    renames: dict[str, tuple[str, bool]] = {}
    unexpected = []
    for name in bare:
        rule = table(name)
        if rule is None:
            unexpected.append(prefix + name)
        elif rule.target is not None:
            if rule.target in renames:
                twice = f"{renames[rule.target][0]} and {prefix + name}"
                raise CheckpointError(f"{twice} both stand for {rule.target} of the {family.name} family")
            renames[rule.target] = (prefix + name, rule.reshape)
    return Recognised(family, component, layout, prefix, renames, tuple(unexpected))


def listing(names: Iterable[str], most: int = 5) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
