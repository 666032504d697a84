"""The video autoencoder, the audio autoencoder and the vocoders of LTX-2.

Names are resolved on first use, so that describing the family imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastvideo_vae_ltx2.audio import AutoencoderKLLTX2Audio
    from fastvideo_vae_ltx2.blending import DIFFUSERS, DIFFUSERS_FRAMEWISE, OFFICIAL, WeightedBlend
    from fastvideo_vae_ltx2.config import (
        LTX2_AUDIO,
        LTX20_VIDEO,
        LTX20_VIDEO_TIMED,
        LTX20_VOCODER,
        LTX23_VIDEO,
        LTX23_VOCODER,
        LTX2AudioArchConfig,
        LTX2VideoArchConfig,
        LTX2VocoderArchConfig,
    )
    from fastvideo_vae_ltx2.mel import log_mel
    from fastvideo_vae_ltx2.model import AutoencoderKLLTX2Video
    from fastvideo_vae_ltx2.sound import WaveformDecoder, WaveformEncoder
    from fastvideo_vae_ltx2.vocoder import LTX2Vocoder

_HOME = {
    "DIFFUSERS": "blending",
    "DIFFUSERS_FRAMEWISE": "blending",
    "OFFICIAL": "blending",
    "WeightedBlend": "blending",
    "LTX20_VIDEO": "config",
    "LTX20_VIDEO_TIMED": "config",
    "LTX20_VOCODER": "config",
    "LTX23_VIDEO": "config",
    "LTX23_VOCODER": "config",
    "LTX2_AUDIO": "config",
    "AutoencoderKLLTX2Audio": "audio",
    "AutoencoderKLLTX2Video": "model",
    "LTX2AudioArchConfig": "config",
    "LTX2VideoArchConfig": "config",
    "LTX2Vocoder": "vocoder",
    "LTX2VocoderArchConfig": "config",
    "WaveformDecoder": "sound",
    "WaveformEncoder": "sound",
    "log_mel": "mel",
}

__all__ = [
    "DIFFUSERS",
    "DIFFUSERS_FRAMEWISE",
    "LTX2_AUDIO",
    "LTX20_VIDEO",
    "LTX20_VIDEO_TIMED",
    "LTX20_VOCODER",
    "LTX23_VIDEO",
    "LTX23_VOCODER",
    "OFFICIAL",
    "AutoencoderKLLTX2Audio",
    "AutoencoderKLLTX2Video",
    "LTX2AudioArchConfig",
    "LTX2VideoArchConfig",
    "LTX2Vocoder",
    "LTX2VocoderArchConfig",
    "WaveformDecoder",
    "WaveformEncoder",
    "WeightedBlend",
    "log_mel",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
