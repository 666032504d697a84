"""Between the YUV that video files hold and RGB, through FFmpeg's scale filter.

FFmpeg's fast paths, which PyAV's `to_ndarray` takes, are one level dark on average, up to three off, and place chroma
half a pixel to the left. Here every conversion is rounded to the nearest level, and chroma sits where H.264, VP9 and
AV1 put it: level with the left pixel of each pair, between the two lines.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastvideo_vae_core.errors import MediaError
from fastvideo_vae_core.media.files import require

Array = np.ndarray[Any, Any]

# FFmpeg's numbers (ITU-T H.273) and names; 2 is "unspecified" everywhere, and so is 0 for a range.
MATRICES = {
    0: "rgb",
    1: "bt709",
    4: "fcc",
    5: "bt470bg",
    6: "smpte170m",
    7: "smpte240m",
    8: "ycgco",
    9: "bt2020nc",
    10: "bt2020c",
    14: "ictcp",
}
RANGES = {1: "tv", 2: "pc"}
PRIMARIES = {
    1: "bt709",
    4: "bt470m",
    5: "bt470bg",
    6: "smpte170m",
    7: "smpte240m",
    8: "film",
    9: "bt2020",
    10: "smpte428",
    11: "smpte431",
    12: "smpte432",
    22: "ebu3213",
}
TRANSFERS = {
    1: "bt709",
    4: "gamma22",
    5: "gamma28",
    6: "smpte170m",
    7: "smpte240m",
    8: "linear",
    9: "log100",
    10: "log316",
    11: "iec61966-2-4",
    12: "bt1361e",
    13: "iec61966-2-1",
    14: "bt2020-10",
    15: "bt2020-12",
    16: "smpte2084",
    17: "smpte428",
    18: "arib-std-b67",
}
# Matrix -> what the scale filter calls it, for those that it can undo.
_SCALE_MATRICES = {
    "bt709": "bt709",
    "fcc": "fcc",
    "bt470bg": "bt601",
    "smpte170m": "bt601",
    "smpte240m": "smpte240m",
    "bt2020nc": "bt2020",
}
_EXACT = "flags=bicubic+accurate_rnd+full_chroma_int+full_chroma_inp"
_LINES_OF_HD = 720
# FFmpeg takes these as full range whatever their tag.
_FULL_RANGE_FORMATS = ("yuvj", "gray", "ya", "mono")
_CENTRED_CHROMA_CODECS = ("mjpeg", "mpeg1video")


@dataclass(frozen=True, kw_only=True)
class ColorTags:
    """How a file says that its numbers mean colours, under FFmpeg's names; None where it says nothing."""

    matrix: str | None = "bt709"
    range: str | None = "tv"
    primaries: str | None = "bt709"
    transfer: str | None = "bt709"

    def for_writing(self) -> ColorTags:
        """Tags for a YUV file: what is open, or what YUV cannot say, becomes BT.709 limited. MediaError: unknown."""
        written = ColorTags(
            matrix="bt709" if self.matrix in (None, "rgb") else self.matrix,
            range=self.range or "tv",
            primaries=self.primaries or "bt709",
            transfer=self.transfer or "bt709",
        )
        known = (_SCALE_MATRICES, RANGES.values(), PRIMARIES.values(), TRANSFERS.values())
        tags = (written.matrix, written.range, written.primaries, written.transfer)
        for tag, names in zip(tags, known, strict=True):
            if tag not in names:
                raise MediaError(f"video cannot be written with the colour tag {tag!r}; use one of {' '.join(names)}")
        return written

    def apply_to(self, codec_context: Any) -> None:
        """Have an encoder write these tags."""
        codec_context.colorspace = _number(MATRICES, self.matrix)
        codec_context.color_range = _number(RANGES, self.range)
        codec_context.color_primaries = _number(PRIMARIES, self.primaries)
        codec_context.color_trc = _number(TRANSFERS, self.transfer)


class ToRGB:
    """Decoded frame -> (3, H, W) whole levels from 0 to `white`, in the file's own orientation.

    The matrix is as tagged; for untagged video BT.601 below 720 lines and BT.709 from there on, as players do. The
    range is as tagged, else limited. 8-bit video gives uint8; deeper video gives int16 of 10 or 12 bits, a type that
    every device has.

    Raises:
        MediaError: a matrix without a plain inverse, or a later frame of another size or format.
    """

    def __init__(self, path: str | os.PathLike[str], first: Any, tags: ColorTags, codec: str) -> None:
        self._path, self._shape = path, _shape(first)
        bits = max(component.bits for component in first.format.components)
        depth = 8 if bits <= 8 else 10 if bits <= 10 else 12
        is_rgb = first.format.is_rgb or bool(first.format.has_palette)
        full = is_rgb or first.format.name.startswith(_FULL_RANGE_FORMATS) or tags.range == "pc"
        guess = "bt709" if first.height >= _LINES_OF_HD else "smpte170m"
        matrix = "bt709" if is_rgb or tags.matrix == "rgb" else tags.matrix or guess
        if matrix not in _SCALE_MATRICES:
            raise MediaError(f"{path} has the colour matrix {matrix}, which has no plain inverse; convert it to bt709")
        # The scale filter widens a limited range to 255 shifted left, a full one to all ones.
        self.white = (1 << depth) - 1 if full else 255 << (depth - 8)
        self._dtype = np.dtype(np.uint8 if depth == 8 else np.int16)
        self.dtype = torch.uint8 if depth == 8 else torch.int16
        source = f"in_color_matrix={_SCALE_MATRICES[matrix]}:in_range={'pc' if full else 'tv'}"
        chroma = f"in_h_chr_pos={128 if codec in _CENTRED_CHROMA_CODECS else 0}:in_v_chr_pos=128"
        out = "gbrp" if depth == 8 else f"gbrp{depth}le"
        self._graph = _graph(self._shape, f"{source}:{chroma}:out_range=pc:{_EXACT}", out)

    def __call__(self, frame: Any) -> Array:
        if _shape(frame) != self._shape:
            raise MediaError(f"{self._path} changes from {self._shape} to {_shape(frame)} on the way; split it there")
        self._graph.push(frame)
        green, blue, red = self._graph.pull().planes
        rows = [np.frombuffer(plane, self._dtype).reshape(plane.height, -1) for plane in (red, green, blue)]
        levels_CHW: Array = np.stack([row[:, : frame.width] for row in rows])
        return levels_CHW


class FromRGB:
    """(H, W, 3) 8-bit levels -> a frame in the file's pixel format, with the matrix and range of its tags."""

    def __init__(self, width: int, height: int, pixel_format: str, tags: ColorTags) -> None:
        self._av: Any = require("av", "media")
        target = f"out_color_matrix={_SCALE_MATRICES[tags.matrix or 'bt709']}:out_range={tags.range}"
        chroma = "out_h_chr_pos=0:out_v_chr_pos=128"
        self._graph = _graph((width, height, "rgb24"), f"in_range=pc:{target}:{chroma}:{_EXACT}", pixel_format)

    def __call__(self, levels_HWC: Array) -> Any:
        self._graph.push(self._av.VideoFrame.from_ndarray(levels_HWC, format="rgb24"))
        return self._graph.pull()


def _graph(shape: tuple[int, int, str], scale: str, out_format: str) -> Any:
    """A filter graph, because PyAV's own reformatting cannot place chroma, nor in older versions round."""
    av: Any = require("av", "media")
    width, height, pixel_format = shape
    buffer = f"video_size={width}x{height}:pix_fmt={pixel_format}:time_base=1/1000:pixel_aspect=1/1"
    nodes = (("buffer", buffer), ("scale", scale), ("format", out_format), ("buffersink", None))
    graph = av.filter.Graph()
    graph.link_nodes(*(graph.add(name, arguments) for name, arguments in nodes)).configure()
    return graph


def _shape(frame: Any) -> tuple[int, int, str]:
    return frame.width, frame.height, frame.format.name


def _number(names: dict[int, str], name: str | None) -> int:
    return next(number for number, known in names.items() if known == name)
