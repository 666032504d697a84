"""Recordings as files that training reads and writes with the standard library alone."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def write_wave(path: Path, x_CS: Tensor, rate: int) -> None:
    """Sound in [-1, 1] as 16 bits."""
    levels = (x_CS.clamp(-1, 1) * 32767).round().to(torch.int16)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(len(x_CS))
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(levels.T.contiguous().numpy().tobytes())


def read_wave(path: Path) -> Tensor:
    """(C, S) in [-1, 1]."""
    with wave.open(str(path), "rb") as file:
        levels = np.frombuffer(file.readframes(file.getnframes()), np.int16).reshape(-1, file.getnchannels())
    return torch.from_numpy(levels.T.astype(np.float32) / 32768)
