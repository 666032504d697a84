"""Memory that runs out in the middle of a call, where a test wants it to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastvideo_vae_core.memory import Rehearsal


class Exhaustion(TorchFunctionMode):
    """Inside it memory runs out in the first layer that begins behind the given number of units of a call.

    Pass its `progress` to the call, so that it knows where the call is. Predictions, which compute on shapes alone,
    are left alone.

        with Exhaustion(3) as exhaustion, pytest.warns(UserWarning, match="ran out of memory"):
            made = vae.decode(z, plan=plan, progress=exhaustion.progress).sample

    Attributes:
        told: what the call said of its progress.
        live: bytes of tensors that were alive at the beginning of each attempt, of those made inside.

    known: tensors from before, such as weights, whose views are not new.
    """

    def __init__(self, behind: int, times: int = 1, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.told: list[tuple[int, int]] = []
        self.live: list[int] = []
        self._behind, self._times = behind, times
        self._alive = _Alive(torch.device("cpu"), known)

    def __enter__(self) -> Exhaustion:
        super().__enter__()  # type: ignore[no-untyped-call]
        self._alive.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *reason: Any) -> None:
        self._alive.__exit__(*reason)  # type: ignore[no-untyped-call]
        super().__exit__(*reason)  # type: ignore[no-untyped-call]

    def progress(self, done: int, total: int) -> None:
        """What the call is given."""
        if done == 0:
            self.live.append(self._alive.live)
        self.told.append((done, total))

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        layer = name.startswith(("conv", "linear")) and isinstance(args[0], Tensor) and not args[0].is_meta
        if layer and self._times and (self.told[-1][0] if self.told else 0) >= self._behind:
            self._times -= 1
            raise torch.OutOfMemoryError("out of memory on purpose")
        return func(*args, **(kwargs or {}))


class _Alive(Rehearsal):
    """Counts tensors with numbers only: predictions keep what they have seen of a step."""

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage.device.type != "meta":
            super()._add(storage)
