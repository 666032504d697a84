"""The KL image autoencoders of Stable Diffusion 1.x, SDXL, SD3 and FLUX.1, and every other diffusers `AutoencoderKL`.

Names are resolved on first use, so that describing the family imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastvideo_vae_autoencoder_kl.blending import DIFFUSERS, DIFFUSERS_1024
    from fastvideo_vae_autoencoder_kl.config import FLUX1, SD1, SD3, SDXL, AutoencoderKLArchConfig
    from fastvideo_vae_autoencoder_kl.model import AutoencoderKL

_HOME = {
    "DIFFUSERS": "blending",
    "DIFFUSERS_1024": "blending",
    "AutoencoderKL": "model",
    "AutoencoderKLArchConfig": "config",
    "FLUX1": "config",
    "SD1": "config",
    "SD3": "config",
    "SDXL": "config",
}

__all__ = ["DIFFUSERS", "DIFFUSERS_1024", "FLUX1", "SD1", "SD3", "SDXL", "AutoencoderKL", "AutoencoderKLArchConfig"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
