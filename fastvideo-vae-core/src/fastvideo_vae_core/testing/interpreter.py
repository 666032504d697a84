"""Triton kernels without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys


def interpreted(script: str) -> dict[str, float]:
    """Run a script in which Triton interprets its kernels; it prints one JSON object, name of a check -> error.

    A process of its own, because Triton decides when it is imported whether it interprets.
    """
    ran = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    errors: dict[str, float] = json.loads(ran.stdout)
    return errors
