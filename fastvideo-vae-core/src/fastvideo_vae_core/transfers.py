"""Copies between pinned memory of the host and a GPU, beside what the GPU computes."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor

# The most bytes between blocks that CUDA takes (CU_DEVICE_ATTRIBUTE_MAX_PITCH).
_MAX_PITCH = 2**31 - 1
_UNIFIED = 4  # CU_MEMORYTYPE_UNIFIED: the address itself says whose it is


def transfer(into: Tensor, source: Tensor) -> None:
    """Copy without waiting, on the current stream, and without the temporary copy that PyTorch makes of what has gaps
    in memory. Both tensors have one shape and one type, and their axes lie in memory in the order in which they come.

    Blocks at even distances, such as a few rows of every frame, are one copy: asking for each of them would take a CPU
    longer than the copies themselves.
    """
    if into.is_contiguous() and source.is_contiguous():
        into.copy_(source, non_blocking=True)
    elif into[0].is_contiguous() and source[0].is_contiguous() and len(into) > 2 and _on_both_sides(into, source):
        # The last one by PyTorch, which then knows how long the host's memory is in use; it comes behind the others.
        if not _copy_blocks(into[:-1], source[:-1]):
            _one_by_one(into[:-1], source[:-1])
        into[-1].copy_(source[-1], non_blocking=True)
    else:
        _one_by_one(into, source)


def _one_by_one(into: Tensor, source: Tensor) -> None:
    for one, other in zip(into.unbind(0), source.unbind(0), strict=True):
        transfer(one, other)


def _on_both_sides(into: Tensor, source: Tensor) -> bool:
    return into.is_cuda != source.is_cuda


def _copy_blocks(into: Tensor, source: Tensor) -> bool:
    """Copy blocks (n, ...), each without gaps; False if there is no way to."""
    width = source[0].nbytes
    pitches = [max(each.stride(0) * each.element_size(), width) for each in (into, source)]
    launch = _driver()
    if launch is None or max(pitches) > _MAX_PITCH:
        return False
    device = into.device if into.is_cuda else source.device
    stream = torch.cuda.current_stream(device).cuda_stream
    copy = _Copy2D(
        source_type=_UNIFIED,
        source=source.data_ptr(),
        source_pitch=pitches[1],
        target_type=_UNIFIED,
        target=into.data_ptr(),
        target_pitch=pitches[0],
        width=width,
        height=len(into),
    )
    return launch(ctypes.byref(copy), ctypes.c_void_p(stream)) == 0


class _Copy2D(ctypes.Structure):
    """CUDA_MEMCPY2D of the driver's API; the names are ours."""

    _fields_ = [
        ("source_x", ctypes.c_size_t),
        ("source_y", ctypes.c_size_t),
        ("source_type", ctypes.c_int),
        ("source_host", ctypes.c_void_p),
        ("source", ctypes.c_uint64),
        ("source_array", ctypes.c_void_p),
        ("source_pitch", ctypes.c_size_t),
        ("target_x", ctypes.c_size_t),
        ("target_y", ctypes.c_size_t),
        ("target_type", ctypes.c_int),
        ("target_host", ctypes.c_void_p),
        ("target", ctypes.c_uint64),
        ("target_array", ctypes.c_void_p),
        ("target_pitch", ctypes.c_size_t),
        ("width", ctypes.c_size_t),
        ("height", ctypes.c_size_t),
    ]


@functools.cache
def _driver() -> Callable[..., int] | None:
    """cuMemcpy2DAsync, which PyTorch does not offer; None where there is no such driver."""
    try:
        found: Callable[..., int] = ctypes.CDLL("libcuda.so.1").cuMemcpy2DAsync_v2
    except (OSError, AttributeError):
        return None
    return found
