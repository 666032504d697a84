"""Loading, execution and tools shared by the fastvideo-vae families.

Every public name is resolved on first use, so that importing this package or listing the families imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastvideo_vae_core.blending import Blend
    from fastvideo_vae_core.config import VAEArchConfig, VAEConfig
    from fastvideo_vae_core.distribution import DiagonalGaussianDistribution
    from fastvideo_vae_core.errors import (
        CheckpointError,
        ConfigError,
        FamilyError,
        MediaError,
        MemoryBudgetError,
        ShapeError,
        VAEError,
    )
    from fastvideo_vae_core.family import Component, Evidence, Family, Inferred, Layout
    from fastvideo_vae_core.graphs import Captured
    from fastvideo_vae_core.latents import LatentFile, read_latents, write_latents
    from fastvideo_vae_core.loading import inspect, load, load_demo
    from fastvideo_vae_core.outputs import DecoderOutput, EncoderOutput
    from fastvideo_vae_core.plan import Plan
    from fastvideo_vae_core.registry import families, resolve
    from fastvideo_vae_core.vae import ParallelTiledVAE

_HOME = {
    "blending": ("Blend",),
    "config": ("VAEArchConfig", "VAEConfig"),
    "distribution": ("DiagonalGaussianDistribution",),
    "errors": (
        "CheckpointError",
        "ConfigError",
        "FamilyError",
        "MediaError",
        "MemoryBudgetError",
        "ShapeError",
        "VAEError",
    ),
    "family": ("Component", "Evidence", "Family", "Inferred", "Layout"),
    "graphs": ("Captured",),
    "latents": ("LatentFile", "read_latents", "write_latents"),
    "loading": ("inspect", "load", "load_demo"),
    "outputs": ("DecoderOutput", "EncoderOutput"),
    "registry": ("families", "resolve"),
    "plan": ("Plan",),
    "vae": ("ParallelTiledVAE",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "Blend",
    "Captured",
    "CheckpointError",
    "Component",
    "ConfigError",
    "DecoderOutput",
    "DiagonalGaussianDistribution",
    "EncoderOutput",
    "Evidence",
    "Family",
    "FamilyError",
    "Inferred",
    "LatentFile",
    "Layout",
    "MediaError",
    "MemoryBudgetError",
    "ParallelTiledVAE",
    "Plan",
    "ShapeError",
    "VAEArchConfig",
    "VAEConfig",
    "VAEError",
    "families",
    "inspect",
    "load",
    "load_demo",
    "read_latents",
    "resolve",
    "write_latents",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
