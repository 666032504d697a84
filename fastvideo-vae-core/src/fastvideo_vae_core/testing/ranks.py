"""Ranks for tests: threads of this process that talk over Gloo, as processes of one machine do."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore

Result = TypeVar("Result")


def on_ranks(world: int, call: Callable[[Any], Result], timeout: float = 60.0) -> list[Result]:
    """What a call gives on each rank of a new group, which it is given. The first failure is raised.

    Threads share a model, which calls do not change, and take milliseconds to start. Each has a group of its own.
    """
    store = HashStore()

    def run(rank: int) -> Result:
        with torch.no_grad():
            group = gloo_group(store, rank, world, timeout)
            try:
                return call(group)
            finally:
                dist.distributed_c10d._world.pg_group_ranks.pop(group, None)

    with ThreadPoolExecutor(world) as threads:
        return [each.result() for each in [threads.submit(run, rank) for rank in range(world)]]


def gloo_group(store: Any, rank: int, world: int, timeout: float) -> Any:
    """A process group of its own, which needs no default group and so may exist many times in a process."""
    group = dist.ProcessGroup(store, rank, world)
    device = torch.device("cpu")
    backend = dist.ProcessGroupGloo(PrefixStore("gloo", store), rank, world, timedelta(seconds=timeout))
    group._register_backend(device, dist.ProcessGroup.BackendType.GLOO, backend)
    # Where `torch.distributed` looks up which ranks of the world a group has.
    dist.distributed_c10d._world.pg_group_ranks[group] = {each: each for each in range(world)}
    return group
