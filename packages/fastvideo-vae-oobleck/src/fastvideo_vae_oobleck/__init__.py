"""Oobleck, the 1-D audio autoencoder of Stable Audio and ACE-Step, and every other diffusers `AutoencoderOobleck`.

Names are resolved on first use, so that describing the family imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastvideo_vae_oobleck.checkpoint import weight_norm_state_dict
    from fastvideo_vae_oobleck.config import ACE_STEP, STABLE_AUDIO_OPEN, OobleckArchConfig
    from fastvideo_vae_oobleck.distribution import OobleckDiagonalGaussianDistribution
    from fastvideo_vae_oobleck.model import AutoencoderOobleck

_HOME = {
    "ACE_STEP": "config",
    "AutoencoderOobleck": "model",
    "OobleckArchConfig": "config",
    "OobleckDiagonalGaussianDistribution": "distribution",
    "STABLE_AUDIO_OPEN": "config",
    "weight_norm_state_dict": "checkpoint",
}

__all__ = [
    "ACE_STEP",
    "STABLE_AUDIO_OPEN",
    "AutoencoderOobleck",
    "OobleckArchConfig",
    "OobleckDiagonalGaussianDistribution",
    "weight_norm_state_dict",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
