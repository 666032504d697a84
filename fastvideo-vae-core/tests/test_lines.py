"""How a rank finds out that exchanges in the stream of a GPU come to nothing; without a GPU, so with other events."""

from __future__ import annotations

import time
from typing import Any

import pytest
from torch._C._distributed_c10d import HashStore

from fastvideo_vae_core.errors import ShardError
from fastvideo_vae_core.lines import Line


class Group:
    """The first of three ranks."""

    def __init__(self) -> None:
        self.store, self.aborted = HashStore(), False

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 3

    def get_group_store(self) -> HashStore:
        return self.store

    def abort(self) -> None:
        self.aborted = True


class Exchange:
    """Done after so many seconds."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def query(self) -> bool:
        return time.monotonic() >= self._end


def followed(*seconds: float, timeout: float) -> tuple[Group, Line]:
    group = Group()
    line = Line(group, timeout)
    for each in seconds:
        event: Any = Exchange(each)
        line.follow(event)
    return group, line


def test_what_is_done_in_time_is_no_news() -> None:
    """The deadline is for each exchange, not for all together."""
    group, line = followed(0.0, 0.3, 0.6, 0.9, timeout=0.5)
    line.settle()
    line.settle()
    assert not group.aborted


def test_what_comes_no_further_is_given_up() -> None:
    group, line = followed(0.1, 60.0, timeout=0.3)
    began = time.monotonic()
    with pytest.raises(ShardError, match=r"rank 0 of 3 gave up .* with rank 1 and 2: it is lost, stopped or slow"):
        line.settle()
    assert 0.3 <= time.monotonic() - began < 2
    time.sleep(0.1)
    assert group.aborted


def test_another_rank_that_has_failed_is_noticed_at_once() -> None:
    group, line = followed(60.0, timeout=30.0)
    group.store.set("fastvideo_vae/failed/2", "ArithmeticError: out of luck")
    began = time.monotonic()
    with pytest.raises(ShardError, match="rank 2 failed with ArithmeticError: out of luck"):
        line.settle()
    assert time.monotonic() - began < 2
    time.sleep(0.1)
    assert group.aborted


def test_the_first_to_fail_is_named_and_not_those_that_failed_of_it() -> None:
    group, line = followed(60.0, timeout=0.1)
    group.store.set("fastvideo_vae/failed/1", "ShardError: rank 1 of 3 gave up")
    group.store.set("fastvideo_vae/failed/2", "ArithmeticError: out of luck")
    with pytest.raises(ShardError, match="with rank 1 and 2: rank 2 failed with ArithmeticError: out of luck; start"):
        line.settle()
