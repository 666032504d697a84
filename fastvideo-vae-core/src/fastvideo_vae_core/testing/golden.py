"""Golden files: outputs of the official implementations, whose weights and inputs are rebuilt here from rules.

A golden file is a safetensors file. It stores outputs; the weights and inputs that made them are functions of a name
and a shape, obtained from PCG64 streams by exactly rounded operations, so they are the same on every machine. Whatever
is rebuilt is checked against the fingerprints in the file.

    golden = load_golden(golden_path("wan21.safetensors"))
    model.load_state_dict(rename(golden.state_dict()))
    for case in golden.cases:
        assert golden.error(case, model.decode(golden.inputs(case)["latent"])) <= 1e-5
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from fastvideo_vae_core.testing.parity import relative_error

Kind = Literal["weight", "normal", "positive", "norm", "bias", "snake", "std", "constant", "stft"]
InputKind = Literal["image", "video", "audio", "gated", "latent", "mel"]

ENVIRONMENT = "FASTVIDEO_VAE_GOLDENS"


def golden_path(name: str) -> Path:
    """Path of a golden file: in $FASTVIDEO_VAE_GOLDENS, else in the nearest `shared/goldens` above here.

    Where there is neither, the test that asks is skipped.
    """
    given = os.environ.get(ENVIRONMENT)
    folders = [Path(given)] if given else [folder / "shared" / "goldens" for folder in _upward(Path.cwd())]
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    where = given or f"any shared/goldens above {Path.cwd()}"
    pytest.skip(f"this machine has no {name} in {where}; set {ENVIRONMENT} to the folder of the golden files")


@dataclass(frozen=True)
class Golden:
    """An open golden file.

    Attributes:
        meta: what was run, with which configuration, and the cases; README.md beside the files describes it.
        tensors: the stored outputs and, rarely, buffers.
    """

    meta: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @property
    def cases(self) -> list[Mapping[str, Any]]:
        """Every case: its name, operation, inputs and outputs."""
        return list(self.meta["cases"])

    def case(self, name: str) -> Mapping[str, Any]:
        """The case of that name."""
        return next(case for case in self.cases if case["name"] == name)

    def inputs(self, case: Mapping[str, Any]) -> dict[str, Tensor]:
        """The inputs of a case by argument name, float32."""
        made = {}
        for argument, spec in case["inputs"].items():
            made[argument] = make_input(spec["name"], spec["shape"], spec["kind"], self.meta["salt"])
            if digest(made[argument]) != spec["sha256"]:
                raise RuntimeError(f"the input {spec['name']} comes out differently on this machine")
        return made

    def state_dict(self) -> dict[str, Tensor]:
        """The reference's checkpoint, under its own names and in its own types."""
        made, fingerprint = {}, hashlib.sha256()
        for key, shape, dtype in self.meta["tensors"]:
            rule = self._rule(key)
            if "stored" in rule:
                value = self.tensors[rule["stored"]].reshape(shape).clone()
            else:
                kind = rule.get("kind", kind_of(key, shape))
                value = make_tensor(key, shape, kind, self.meta["salt"], rule.get("gain", 1.0))
                # The basis follows a formula with cosines, which libraries round differently.
                if kind != "stft":
                    fingerprint.update(value.flatten()[:16].numpy().tobytes())
            made[key] = value.to(getattr(torch, dtype))
        if fingerprint.hexdigest() != self.meta["weights_sha256"]:
            raise RuntimeError("the weights come out differently on this machine")
        return made

    def error(
        self, case: Mapping[str, Any], made: Tensor, output: str | None = None, *, float64: bool = False
    ) -> float:
        """Relative error of a whole output against what is stored of it, in float32 or as the reference's float64.

        output: which one, where a case has several; the first by default.
        """
        spec = case["outputs"][output] if output else next(iter(case["outputs"].values()))
        if list(made.shape) != spec["shape"]:
            raise AssertionError(f"{case['name']}: the reference has shape {spec['shape']}, got {list(made.shape)}")
        stored = self.tensors[spec["float64" if float64 else "tensor"]]
        return relative_error(made.detach().reshape(-1)[:: spec["stride"]], stored)

    def _rule(self, key: str) -> Mapping[str, Any]:
        """What deviates from the rule of names for this key: the first pattern that matches."""
        return next((rule for pattern, rule in self.meta["overrides"] if fnmatch.fnmatchcase(key, pattern)), {})


def load_golden(path: Path) -> Golden:
    """Open a golden file."""
    with safe_open(str(path), framework="pt") as handle:
        tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
        return Golden(json.loads(handle.metadata()["golden"]), tensors)


def fill(model: nn.Module, salt: str = "", gains: Mapping[str, float] | None = None) -> nn.Module:
    """Give every tensor of a model the value that its name and shape determine, and return the model.

    The rule keeps activations near unit size at any depth, which the initial weights of layers do not.

    gains: pattern of names -> factor; the first that matches counts.
    """
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            gain = next((each for key, each in (gains or {}).items() if fnmatch.fnmatchcase(name, key)), 1.0)
            tensor.copy_(make_tensor(name, tensor.shape, salt=salt, gain=gain))
    return model


def kind_of(key: str, shape: Sequence[int]) -> Kind:
    """The rule for a checkpoint entry, from its key and shape alone.

    >>> kind_of("decoder.conv_in.weight", (8, 4, 3, 3)), kind_of("decoder.norm.weight", (8,))
    ('weight', 'norm')
    """
    leaf = key.rsplit(".", 1)[-1]
    return _KIND_OF_LEAF.get(leaf, "norm" if len(shape) < 2 else "weight")


def make_tensor(key: str, shape: Sequence[int], kind: Kind | None = None, salt: str = "", gain: float = 1.0) -> Tensor:
    """A checkpoint entry in float32, from standard normals n:

    weight: n * gain / sqrt(fan in), convolutions and linear layers; normal: n * gain, for weight_v; positive:
    (1 + 0.1 |n|) * gain, for weight_g; norm: (1 + 0.1 n) * gain; bias: 0.05 n * gain; snake: 0.1 n * gain, also for
    tables and means; std: 1 + 0.1 |n|, for deviations; constant: gain; stft: a windowed Fourier basis.
    """
    kind = kind or kind_of(key, shape)
    if kind == "constant":
        return torch.full(tuple(shape), float(gain))
    if kind == "stft":
        return _fourier_basis(shape)
    n, unit, tenth = _normals(salt + key, shape), np.float32(1), np.float32(0.1)
    match kind:
        case "weight":
            n *= np.float32(gain / math.sqrt(math.prod(shape[1:])))
        case "normal":
            n *= np.float32(gain)
        case "positive" | "std":
            n = (unit + tenth * np.abs(n)) * np.float32(gain)
        case "norm":
            n = (unit + tenth * n) * np.float32(gain)
        case "bias" | "snake":
            n = n * np.float32((0.05 if kind == "bias" else 0.1) * gain)
        case _:
            raise ValueError(f"the kind must be one of {', '.join(get_args(Kind))}, got {kind!r} for {key}")
    return _tensor(n.reshape(tuple(shape)))


def make_input(name: str, shape: Sequence[int], kind: InputKind, salt: str = "") -> Tensor:
    """An input in float32, from standard normals n:

    image, video: (B, C, [T,] H, W) in (-1, 1), blocks of 8 x 8 held for two frames and fine noise; audio: (B, C, S),
    0.3 n clipped to [-1, 1]; gated: the same with every second block of 2048 samples silent; latent: n; mel: 2 n - 4,
    the range of a log-mel spectrogram.
    """
    n = _normals(f"{salt}input:{name}", shape)
    match kind:
        case "latent":
            pass
        case "audio" | "gated":
            n = np.clip(np.float32(0.3) * n, np.float32(-1), np.float32(1))
            if kind == "gated":
                n[..., np.arange(shape[-1]) // 2048 % 2 == 1] = 0
        case "mel":
            n = np.float32(2) * n - np.float32(4)
        case "image" | "video":
            n = _blocks(f"{salt}coarse:{name}", shape, (8, 8) if kind == "image" else (2, 8, 8)) + np.float32(0.35) * n
            n = n / (np.float32(1) + np.abs(n))
        case _:
            raise ValueError(f"the kind must be one of {', '.join(get_args(InputKind))}, got {kind!r}")
    return _tensor(n)


def digest(x: Tensor) -> str:
    """SHA-256 of the float32 bytes of a tensor."""
    return hashlib.sha256(x.detach().float().contiguous().numpy().tobytes()).hexdigest()


def _normals(text: str, shape: Sequence[int]) -> Any:
    """Standard normals in float32 from PCG64, seeded with the first eight bytes of a hash."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
    return np.random.Generator(np.random.PCG64(seed)).standard_normal(tuple(shape), dtype=np.float32)


def _blocks(text: str, shape: Sequence[int], steps: Sequence[int]) -> Any:
    """Normals that are constant over blocks of `steps` along the last axes."""
    lead = len(shape) - len(steps)
    counts = [-(-size // step) for size, step in zip(shape[lead:], steps, strict=True)]
    coarse = _normals(text, (*shape[:lead], *counts))
    for axis, step in enumerate(steps, start=lead):
        coarse = np.repeat(coarse, step, axis=axis).take(np.arange(shape[axis]), axis=axis)
    return coarse


def _fourier_basis(shape: Sequence[int]) -> Tensor:
    """(2F, 1, N): F rows of cosines and F of negative sines under a periodic Hann window."""
    rows, _, size = shape
    angle = 2 * np.pi * np.arange(size) / size
    phase = np.arange(rows // 2)[:, None] * angle[None, :]
    basis = np.concatenate([np.cos(phase), -np.sin(phase)]) * (0.5 - 0.5 * np.cos(angle))
    return _tensor(basis[:, None, :])


def _tensor(values: Any) -> Tensor:
    # numpy makes a row of a single number.
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).view(np.shape(values))


def _upward(folder: Path) -> Iterator[Path]:
    yield folder
    yield from folder.parents


# Names, behind the last dot, that have a rule of their own.
_KIND_OF_LEAF: dict[str, Kind] = {
    "weight_g": "positive",
    "weight_v": "normal",
    "gamma": "norm",
    "bias": "bias",
    "alpha": "snake",
    "beta": "snake",
    "mean-of-means": "snake",
    "std-of-means": "std",
    "scale_shift_table": "snake",
    "last_scale_shift_table": "snake",
    "forward_basis": "stft",
}
