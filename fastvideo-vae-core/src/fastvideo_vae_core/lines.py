"""How a rank is connected with the others of its group: whether they are there, and what they said before they left.

Who fails says why in the group's store and hangs up. Over Gloo the connections close then, and whoever waits fails at
once. With NCCL nobody waits: exchanges are put in the stream of the GPU, where what comes next waits for them while the
host goes on. A thread looks how far they have come and what is said in the store; if they come no further in time, or
another rank has failed, it aborts the communicator, so that the stream goes on and the host finds out at its next word.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from fastvideo_vae_core.errors import ShardError


class Line:
    """The connection of one rank with its group."""

    def __init__(self, group: Any, timeout: float) -> None:
        self.group, self.timeout = group, timeout
        self._lock = threading.Lock()
        # Exchanges in the stream, in order, and when the last one was seen to be done.
        self._pending: deque[torch.cuda.Event] = deque()
        self._moved = 0.0
        self._watcher: threading.Thread | None = None
        self._broken: str | None = None
        self._met = False

    def exchange(self, operations: list[dist.P2POp]) -> None:
        """Send and receive; what is received is there for what comes next on the device.

        Raises:
            ShardError: another rank did not answer in time, or is gone.
        """
        peers = sorted({operation.group_peer for operation in operations})
        began, device = time.monotonic(), operations[0].tensor.device
        try:
            if self.queues(device):
                self._enqueue(operations, device)
                return
            for work in dist.batch_isend_irecv(operations):
                left = max(began + self.timeout - time.monotonic(), 1e-3)
                if not work.wait(timedelta(seconds=left)):
                    raise RuntimeError("aborted")
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            # What backends raise, for a timeout and a closed connection alike.
            raise self._failure(peers, time.monotonic() - began) from error

    def follow(self, event: torch.cuda.Event) -> None:
        """Watch over an exchange in a stream, which is done when the event is."""
        with self._lock:
            if not self._pending:
                self._moved = time.monotonic()
            self._pending.append(event)
            if self._watcher is None:
                self._watcher = threading.Thread(target=self._watch, daemon=True)
                self._watcher.start()

    def settle(self) -> None:
        """Wait until every exchange is done.

        Raises:
            ShardError: one will not be.
        """
        began = time.monotonic()
        while self._underway():
            if time.monotonic() - max(began, self._moved) > self.timeout + _GRACE:
                self._broken = "nothing moves"
            time.sleep(_GLANCE)
        if self._broken is not None:
            raise self._failure(self._others(), time.monotonic() - began)

    def queues(self, device: torch.device) -> bool:
        """Whether exchanges of what lies there go to the stream, as NCCL's do."""
        if device.type != "cuda":
            return False
        try:
            return bool(self.group._get_backend(device).supports_coalescing)
        except RuntimeError:
            return False

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """If this rank fails, tell the others why and hang up, so that they need not wait until their time is over."""
        try:
            yield
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
            _shortly(lambda: self._store().set(_FAILED.format(self.group.rank()), said))
            self.hang_up()
            raise

    def hang_up(self) -> None:
        """End all connections, so that nobody waits for this rank."""

        def run() -> None:
            if self.queues(torch.device("cuda")):
                self.group.abort()
                return
            # Gloo closes connections of a rank that has waited for a message in vain. Nobody sends this one.
            for peer in self._others():
                with contextlib.suppress(RuntimeError):
                    self.group.recv([torch.empty(1)], peer, _NEVER_SENT).wait(timedelta(milliseconds=1))

        _shortly(run)

    def told(self) -> dict[int, str]:
        """What other ranks that failed have said."""
        keys = {rank: _FAILED.format(rank) for rank in self._others()}
        return {rank: self._store().get(key).decode() for rank, key in keys.items() if self._store().check([key])}

    def _enqueue(self, operations: list[dist.P2POp], device: torch.device) -> None:
        if self._broken is not None:
            raise RuntimeError(self._broken)
        self._meet()
        with torch.cuda.device(device):
            for work in dist.batch_isend_irecv(operations):
                # With a timeout the host would wait; without one the stream does.
                work.wait()
            event = torch.cuda.Event()
            event.record()
        self.follow(event)

    def _meet(self) -> None:
        """See that all ranks have come before the first exchange, for which NCCL waits without a deadline."""
        if self._met:
            return
        self._store().set(_HERE.format(self.group.rank()), "")
        everyone = [_HERE.format(rank) for rank in range(self.group.size())]
        self._store().wait(everyone, timedelta(seconds=self.timeout))
        self._met = True

    def _underway(self) -> bool:
        """Whether exchanges are not done yet, with those forgotten that are; False once the line is broken."""
        with self._lock:
            while self._pending and self._pending[0].query():
                self._pending.popleft()
                self._moved = time.monotonic()
            return bool(self._pending) and self._broken is None

    def _watch(self) -> None:
        asked = time.monotonic()
        while self._underway():
            now = time.monotonic()
            if now - asked > _ASK:
                asked = now
                with contextlib.suppress(RuntimeError):
                    if self.told():
                        self._broken = "another rank has failed"
            if now - self._moved > self.timeout:
                self._broken = "nothing moves"
            time.sleep(_LOOK)
        with self._lock:
            self._watcher = None
        if self._broken is not None:
            self.group.abort()

    def _failure(self, peers: Sequence[int], waited: float) -> ShardError:
        told: dict[int, str] = {}
        _shortly(lambda: told.update(self.told()))
        first = {rank: said for rank, said in told.items() if not said.startswith(ShardError.__name__)}
        causes = [f"rank {rank} failed with {said}" for rank, said in (first or told).items()]
        why = "; ".join(causes) or "it is lost, stopped or slow, or made another call"
        whom = " and ".join(map(str, peers))
        return ShardError(
            f"rank {self.group.rank()} of {self.group.size()} gave up after {waited:.1f} s of at most"
            f" {self.timeout:g} s for an exchange with rank {whom}: {why}; start the ranks again with a new group"
        )

    def _others(self) -> list[int]:
        return [rank for rank in range(self.group.size()) if rank != self.group.rank()]

    def _store(self) -> Any:
        return self.group.get_group_store()


def _shortly(talk: Callable[[], object]) -> None:
    """Talk to the store or the group, but never wait for one that is lost with the process that kept it."""

    def run() -> None:
        with contextlib.suppress(Exception):
            talk()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(1.0)


_FAILED = "fastvideo_vae/failed/{}"
_HERE = "fastvideo_vae/here/{}"
# The tag of a message that is never sent.
_NEVER_SENT = 0x7A11
# Seconds between two looks of the thread at the exchanges, between two at the store, and between two of a host that has
# nothing else to do; and those that the thread has to be quicker than that host with what is late.
_LOOK, _ASK, _GLANCE, _GRACE = 0.02, 0.2, 2e-4, 1.0
