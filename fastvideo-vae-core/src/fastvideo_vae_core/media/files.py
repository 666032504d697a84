"""What every kind of media file needs: its kind, an output that is whole or absent, and errors in one line."""

from __future__ import annotations

import importlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from fastvideo_vae_core.errors import MediaError

MediaKind = Literal["image", "video", "audio"]

SUFFIXES: dict[MediaKind, tuple[str, ...]] = {
    "image": (".avif", ".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"),
    "video": (".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm"),
    "audio": (".aac", ".aif", ".aiff", ".flac", ".m4a", ".mp3", ".oga", ".ogg", ".opus", ".wav"),
}
_PACKAGE_OF = {"PIL": "Pillow", "av": "PyAV"}


def media_kind(path: str | os.PathLike[str]) -> MediaKind:
    """Tell what a file holds by its suffix, without opening it; `media_kind("a/clip.MP4")` is "video".

    Raises:
        MediaError: the suffix is not one of SUFFIXES.
    """
    suffix = Path(path).suffix.lower()
    for kind, suffixes in SUFFIXES.items():
        if suffix in suffixes:
            return kind
    known = "; ".join(f"{kind}: {' '.join(suffixes)}" for kind, suffixes in SUFFIXES.items())
    raise MediaError(f"{path}: {f'the suffix {suffix!r}' if suffix else 'no suffix'} names no known media ({known})")


@contextmanager
def atomic_output(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary file beside `path`, with its suffix; it becomes `path` when the block ends well.

    When the block raises, KeyboardInterrupt included, the temporary file is removed and `path` stays what it was.
    Everything that can be refused is refused before the block runs, so enter it before the long computation. A symbolic
    link is followed, never replaced.

    Raises:
        MediaError: the folder is missing or not writable, or `path` is a folder, a device or read-only.
    """
    target = Path(path).resolve()
    temporary = target.with_name(f".{target.stem[:64]}.{secrets.token_hex(4)}{target.suffix}")
    if target.is_dir():
        raise MediaError(f"{path} is a folder; name a file inside it")
    if target.exists() and not target.is_file():
        raise MediaError(f"{path} is not a regular file; write to a file instead")
    if target.exists() and not os.access(target, os.W_OK):
        raise MediaError(f"{path} is read-only; choose another name or make it writable")
    try:
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except FileNotFoundError as error:
        raise MediaError(f"cannot write {path}: the folder {target.parent} does not exist; create it first") from error
    except OSError as error:
        raise MediaError(f"cannot write {path}: {error.strerror}; choose another folder") from error
    try:
        yield temporary
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def readable(path: str | os.PathLike[str]) -> Path:
    """Check that a path names a file that can be opened, so that no library has to say it in its own words."""
    source = Path(path)
    if source.is_dir():
        raise MediaError(f"{path} is a folder; name a file inside it")
    try:
        with source.open("rb") as file:
            if not file.read(1):
                raise MediaError(f"{path} is empty")
    except OSError as error:
        raise MediaError(f"cannot read {path}: {error.strerror}") from error
    return source


def require(module: str, extra: str) -> Any:
    """Import an optional library, or say which extra of this package brings it."""
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        root = module.partition(".")[0]
        missing = isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == root
        reason = "is not installed" if missing else f"cannot be imported ({str(error).splitlines()[0]})"
        command = f'pip install "fastvideo-vae-core[{extra}]"'
        raise MediaError(f"{_PACKAGE_OF.get(root, root)} {reason}; run: {command}") from error


@contextmanager
def ffmpeg_errors(path: str | os.PathLike[str], action: str) -> Iterator[None]:
    """Turn what PyAV raises inside the block into one line: `clip.mp4 cannot be read: Invalid data ...`."""
    av = require("av", "media")
    try:
        yield
    except av.FFmpegError as error:
        raise MediaError(f"{path} cannot be {action}: {error.strerror or error}") from error
    except av.codec.codec.UnknownCodecError as error:
        raise MediaError(f"{path} cannot be {action}: PyAV has no {error} here; install its own wheel") from error
