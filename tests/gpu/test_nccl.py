"""Two GPUs that talk over NCCL: the numbers of one, and an end in time when one of them is lost.

The same jobs run over Gloo on every machine, as a rehearsal.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

WORLD = 2


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu), pytest.param("cpu", marks=pytest.mark.slow)])
def kind(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and torch.cuda.device_count() < WORLD:
        pytest.skip(f"this machine has {torch.cuda.device_count()} GPUs, and {WORLD} are needed")
    found: str = request.param
    return found


def answers(job: str, kind: str, folder: Path, seconds: float, lost: tuple[int, ...] = ()) -> dict[int, Any]:
    """What each rank answers that is not to be lost."""
    script = Path(__file__).with_name("rank_jobs.py")
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), job, str(WORLD), str(folder), str(rank), kind],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for rank in range(WORLD)
    ]
    end = time.monotonic() + seconds
    try:
        for rank, process in enumerate(processes):
            if rank not in lost:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(end - time.monotonic(), 0.0))
                assert process.poll() == 0, f"rank {rank} of {job} ended with {process.poll()}"
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return {rank: json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD) if rank not in lost}


def test_every_family_gives_the_numbers_of_one_device(kind: str, tmp_path: Path) -> None:
    found = answers("same", kind, tmp_path, 240)[0]
    assert len(found) == 12
    assert max(found.values()) <= 1e-10, found


def test_a_rank_that_raises_ends_the_other_at_once(kind: str, tmp_path: Path) -> None:
    found = answers("raises", kind, tmp_path, 120)
    assert found[1]["error"] == "ArithmeticError: out of luck"
    assert found[0]["error"].startswith("ShardError")
    assert "rank 1 failed with ArithmeticError: out of luck" in found[0]["error"]
    assert found[0]["seconds"] < 5


@pytest.mark.parametrize("fate", ["killed", "stopped"])
def test_a_rank_that_is_lost_ends_the_other_in_time(kind: str, tmp_path: Path, fate: str) -> None:
    found = answers(fate, kind, tmp_path, 120, lost=(1,))
    assert found[0]["error"].startswith("ShardError")
    assert found[0]["seconds"] < 12
