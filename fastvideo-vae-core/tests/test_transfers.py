"""Copies between the host and a GPU: their numbers, and how few of them there are."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from torch import Tensor

from fastvideo_vae_core import transfers
from fastvideo_vae_core.transfers import transfer

SIZES = (2, 7, 12, 5, 8)
# Rows of every frame; frames; everything; rows and columns, which lie in blocks within blocks; and two frames.
PARTS = {
    "rows": (slice(None), slice(None), slice(3, 8)),
    "frames": (slice(None), slice(2, 5)),
    "all": (),
    "rows and columns": (slice(None), slice(None), slice(3, 8), slice(1, 3)),
    "rows of two frames": (slice(None), slice(4, 6), slice(3, 8)),
}


class Driver:
    """cuMemcpy2DAsync in the host's memory."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, copy: Any, stream: ctypes.c_void_p) -> int:
        self.calls += 1
        wanted = copy._obj
        for block in range(wanted.height):
            into, source = wanted.target + block * wanted.target_pitch, wanted.source + block * wanted.source_pitch
            ctypes.memmove(into, source, wanted.width)
        return 0


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("driver", ["there", "missing", "refuses"])
def test_the_numbers(monkeypatch: pytest.MonkeyPatch, part: tuple[slice, ...], driver: str) -> None:
    launch = {"there": Driver(), "missing": None, "refuses": lambda *_: 1}[driver]
    monkeypatch.setattr(transfers, "_driver", lambda: launch)
    monkeypatch.setattr(transfers, "_on_both_sides", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: type("Stream", (), {"cuda_stream": 0}))
    check(torch.randn(SIZES), part)
    check(torch.randn(SIZES).bfloat16(), part)


def test_rows_of_all_frames_are_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    monkeypatch.setattr(transfers, "_driver", lambda: driver)
    monkeypatch.setattr(transfers, "_on_both_sides", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: type("Stream", (), {"cuda_stream": 0}))
    check(torch.randn(1, *SIZES[1:]), PARTS["rows"])
    # There and back, beside what PyTorch copies.
    assert driver.calls == 2


def test_within_one_memory_pytorch_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfers, "_copy_blocks", lambda *_: pytest.fail("not for the driver"))
    check(torch.randn(SIZES), PARTS["rows"])


@pytest.mark.gpu
@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_on_a_gpu(part: tuple[slice, ...], dtype: torch.dtype) -> None:
    if transfers._driver() is None:
        pytest.skip("no CUDA driver by the name of libcuda.so.1")
    host = torch.randn(2, 9, 300, 40, 64).to(dtype).pin_memory()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        check(host, part, "cuda")


@pytest.mark.gpu
def test_on_a_gpu_the_driver_takes_it() -> None:
    host, near = torch.randn(9, 300, 64).pin_memory(), torch.zeros(9, 50, 64, device="cuda")
    assert transfers._copy_blocks(near, host[:, 100:150])
    torch.cuda.synchronize()
    assert torch.equal(near.cpu(), host[:, 100:150])


def check(far: Tensor, part: tuple[slice, ...], device: str = "cpu") -> None:
    """A part of one memory into the other, and back into a part of a larger tensor; nothing else is touched."""
    near = torch.zeros(far[part].shape, dtype=far.dtype, device=device)
    transfer(near, far[part])
    back = torch.zeros_like(far, pin_memory=far.is_pinned()) if device != "cpu" else torch.zeros_like(far)
    transfer(back[part], near)
    if device != "cpu":
        torch.cuda.current_stream().synchronize()
    expected = torch.zeros_like(far)
    expected[part] = far[part]
    assert torch.equal(near.cpu(), far[part])
    assert torch.equal(back, expected)
