"""Typed containers of modules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Generic, TypeVar

from torch import nn

Part = TypeVar("Part", bound=nn.Module)


class Modules(nn.ModuleList, Generic[Part]):
    """`nn.ModuleList` that knows the type of what it holds, so that type checkers follow calls into its parts."""

    if TYPE_CHECKING:

        def __iter__(self) -> Iterator[Part]: ...

        def __getitem__(self, index: int) -> Part: ...  # type: ignore[override]
