"""Images (Pillow), video (PyAV) and audio (soundfile, PyAV) as tensors in [-1, 1], and back.

Names are resolved on first use, so that asking for the kind of a file imports neither torch nor a media library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastvideo_vae_core.media.audio import (
        AudioInfo,
        AudioReader,
        AudioWriter,
        Resampler,
        probe_audio,
        read_audio,
        resample,
        write_audio,
    )
    from fastvideo_vae_core.media.color import ColorTags
    from fastvideo_vae_core.media.files import atomic_output, media_kind
    from fastvideo_vae_core.media.images import from_uint8, read_image, to_uint8, write_image
    from fastvideo_vae_core.media.video import VideoInfo, VideoReader, VideoWriter, probe_video

_HOME = {
    "audio": (
        "AudioInfo",
        "AudioReader",
        "AudioWriter",
        "Resampler",
        "probe_audio",
        "read_audio",
        "resample",
        "write_audio",
    ),
    "color": ("ColorTags",),
    "files": ("atomic_output", "media_kind"),
    "images": ("from_uint8", "read_image", "to_uint8", "write_image"),
    "video": ("VideoInfo", "VideoReader", "VideoWriter", "probe_video"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "AudioInfo",
    "AudioReader",
    "AudioWriter",
    "ColorTags",
    "Resampler",
    "VideoInfo",
    "VideoReader",
    "VideoWriter",
    "atomic_output",
    "from_uint8",
    "media_kind",
    "probe_audio",
    "probe_video",
    "read_audio",
    "read_image",
    "resample",
    "to_uint8",
    "write_audio",
    "write_image",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
