"""Pretending that families are installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint
from unittest import mock

from fastvideo_vae_core import registry


@contextmanager
def installed(*points: EntryPoint) -> Iterator[None]:
    """While the block runs, the registry sees these entry points and no others.

    For example `with installed(*toys.POINTS): load(folder)`.
    """
    with mock.patch.object(registry, "entry_points", lambda group: points if group == registry.GROUP else ()):
        _forget()
        try:
            yield
        finally:
            _forget()


def _forget() -> None:
    registry._points.cache_clear()
    registry._import.cache_clear()
