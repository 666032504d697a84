"""The video autoencoders of Wan 2.1 and Wan 2.2, and every other diffusers `AutoencoderKLWan`.

Names are resolved on first use, so that describing the family imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastvideo_vae_wan.blending import DIFFUSERS
    from fastvideo_vae_wan.config import WAN21, WAN22, WanArchConfig
    from fastvideo_vae_wan.model import AutoencoderKLWan

_HOME = {
    "DIFFUSERS": "blending",
    "AutoencoderKLWan": "model",
    "WAN21": "config",
    "WAN22": "config",
    "WanArchConfig": "config",
}

__all__ = ["DIFFUSERS", "WAN21", "WAN22", "AutoencoderKLWan", "WanArchConfig"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
