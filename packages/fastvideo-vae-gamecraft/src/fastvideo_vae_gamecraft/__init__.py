"""The causal video autoencoder of Hunyuan-GameCraft and HunyuanVideo, and every other `AutoencoderKLHunyuanVideo`.

Names are resolved on first use, so that describing the family imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastvideo_vae_gamecraft.blending import DIFFUSERS, DIFFUSERS_FRAMEWISE, OFFICIAL, Blend
    from fastvideo_vae_gamecraft.config import GAMECRAFT, HUNYUANVIDEO, HunyuanVideoArchConfig
    from fastvideo_vae_gamecraft.model import AutoencoderKLHunyuanVideo

_HOME = {
    "AutoencoderKLHunyuanVideo": "model",
    "Blend": "blending",
    "DIFFUSERS": "blending",
    "DIFFUSERS_FRAMEWISE": "blending",
    "GAMECRAFT": "config",
    "HUNYUANVIDEO": "config",
    "HunyuanVideoArchConfig": "config",
    "OFFICIAL": "blending",
}

__all__ = [
    "DIFFUSERS",
    "DIFFUSERS_FRAMEWISE",
    "GAMECRAFT",
    "HUNYUANVIDEO",
    "OFFICIAL",
    "AutoencoderKLHunyuanVideo",
    "Blend",
    "HunyuanVideoArchConfig",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
