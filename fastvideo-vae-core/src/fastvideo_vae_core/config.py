"""Configuration: the facts of a checkpoint (`VAEArchConfig`) and how to load and run it (`VAEConfig`)."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self

from fastvideo_vae_core.errors import ConfigError

Dtype = Literal["float16", "bfloat16", "float32", "float64"]
Fp16Policy = Literal["auto", "upcast", "retry", "off"]


def bounded(default: Any, low: float, high: float) -> Any:
    """A dataclass field whose numbers, also those inside a tuple, must lie in [low, high]."""
    return field(default=default, metadata={"low": low, "high": high})


@dataclass(frozen=True, kw_only=True)
class _Checked:
    """A frozen dataclass that checks its fields against their annotations and bounds once, when it is made.

    Lists become tuples and whole numbers become floats where the annotation asks for it, because JSON knows neither.
    """

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for item in fields(self):
            where = f"{type(self).__name__}.{item.name}"
            value = _coerce(getattr(self, item.name), hints[item.name], where)
            _check_bounds(value, item.metadata, where)
            object.__setattr__(self, item.name, value)


@dataclass(frozen=True, kw_only=True)
class VAEArchConfig(_Checked):
    """Architecture of one checkpoint, under the names of diffusers' `config.json`. Families derive from it.

    Every field is checked on construction, so that a hostile configuration is refused before anything is allocated.

    Raises:
        ConfigError: a field is unknown, of the wrong type or out of bounds.
    """

    scaling_factor: float = bounded(1.0, 1e-6, 1e6)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Read a diffusers configuration: keys that begin with `_` are dropped, other unknown keys are refused."""
        known = {item.name for item in fields(cls)}
        given = {key: value for key, value in config.items() if not key.startswith("_")}
        if unknown := sorted(set(given) - known):
            raise ConfigError(f"{cls.__name__} has no field {', '.join(unknown)}; it knows {', '.join(sorted(known))}")
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values; `from_dict` reads them back."""
        return {
            item.name: list(value) if isinstance(value := getattr(self, item.name), tuple) else value
            for item in fields(self)
        }


@dataclass(frozen=True, kw_only=True)
class VAEConfig(_Checked):
    """How to load and run a model. The fields of `arch_config` read through: `vae.config.scaling_factor` works.

    Attributes:
        arch_config: facts of the checkpoint; left out, `load` finds them.
        load_encoder, load_decoder: build and read only the halves that are wanted.
        encode_dtype, decode_dtype: type of the weights and the arithmetic of each half; None: that of the call to
            `load`, else that of the checkpoint.
        fp16: what a float16 half does about overflow. `upcast` computes in float32 with the float16 weights; `retry`
            computes in float16, and again in float32 when the result is not finite, with a warning; `off` returns what
            float16 gives. `auto` is `upcast` on a CPU and where the checkpoint says `force_upcast`, else `retry`.
        out_of_memory: `retry`: where a call runs out of a device's memory it begins anew, once, in a plan with the same
            numbers that takes less, with a warning; `raise` leaves the error to the caller.
        illegal_sizes: `refuse` sizes that the architecture does not map to whole latents, with a ShapeError that names
            the nearest ones; or do what the `official` implementation does, which drops or cuts without a word.
        use_slicing: one item of the batch at a time.
        use_tiling: tiles with exact halos and global statistics, the same numbers as the whole.
        tile_sample_min_height, tile_sample_min_width: extent of a tile, in elements of the grid being computed.
        pretrained_path: where the weights came from.
    """

    arch_config: VAEArchConfig = field(default_factory=VAEArchConfig)
    load_encoder: bool = True
    load_decoder: bool = True
    encode_dtype: Dtype | None = None
    decode_dtype: Dtype | None = None
    fp16: Fp16Policy = "auto"
    out_of_memory: Literal["retry", "raise"] = "retry"
    illegal_sizes: Literal["refuse", "official"] = "refuse"
    use_slicing: bool = False
    use_tiling: bool = False
    tile_sample_min_height: int = bounded(512, 8, 1 << 20)
    tile_sample_min_width: int = bounded(512, 8, 1 << 20)
    pretrained_path: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.load_encoder or self.load_decoder):
            raise ConfigError("load_encoder and load_decoder are both off; nothing would be loaded")

    def __getattr__(self, name: str) -> Any:
        # Reached only when the dataclass has no such field. Private names never fall through, so that copy and
        # pickle, which probe for them on a half-made object, end here.
        if name.startswith("_") or name == "arch_config":
            raise AttributeError(name)
        try:
            return getattr(self.arch_config, name)
        except AttributeError:
            raise AttributeError(f"neither VAEConfig nor {type(self.arch_config).__name__} has {name!r}") from None


def read_config(path: Path) -> dict[str, Any]:
    """The JSON object in a configuration file.

    Raises:
        ConfigError: the file is no JSON object.
    """
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no readable JSON: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path} must hold a JSON object, got {type(config).__name__}")
    return config


def _coerce(value: Any, hint: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _coerce(value, next(each for each in arguments if each is not type(None)), where)
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"{where} must be one of {', '.join(map(repr, arguments))}, got {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where} must be a list, got {value!r}")
        return tuple(_coerce(each, arguments[0], where) for each in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ConfigError(f"{where} must fit a float, which ends near 1.8e308") from None
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{where} must be {hint.__name__}, got {value!r}")
    return value


def _check_bounds(value: Any, metadata: Mapping[str, Any], where: str) -> None:
    if "low" not in metadata or value is None:
        return
    values = value if isinstance(value, tuple) else (value,)
    if isinstance(value, tuple) and not 1 <= len(value) <= _MAX_LIST:
        raise ConfigError(f"{where} must have 1 to {_MAX_LIST} entries, got {len(value)}")
    for each in values:
        # Written so that a NaN fails it.
        if not metadata["low"] <= each <= metadata["high"]:
            raise ConfigError(f"{where} must lie in [{metadata['low']}, {metadata['high']}], got {each}")


_MAX_LIST = 1024
