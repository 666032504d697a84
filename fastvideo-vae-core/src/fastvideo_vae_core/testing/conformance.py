"""The contract of every family as a suite to inherit.

    class TestWan(ConformanceSuite):
        latent_grids = ((1, 2, 3), (3, 4, 5))
        stream_axis = 2

        def tiny(self) -> AutoencoderKLWan:
            return fill(AutoencoderKLWan(VAEConfig(arch_config=TINY)))

Sizes come from the model's own `sample_axes` and `channels`. Where a family's contract differs on purpose, it overrides
a hook, or the test with a test that says why.
"""

from __future__ import annotations

import pytest

from fastvideo_vae_core.testing.contract.calls import CallContract
from fastvideo_vae_core.testing.contract.execution import ExecutionContract
from fastvideo_vae_core.testing.contract.files import FileContract
from fastvideo_vae_core.testing.contract.interruption import InterruptionContract
from fastvideo_vae_core.testing.contract.latents import LatentContract
from fastvideo_vae_core.testing.contract.sizes import SizeContract


@pytest.mark.conformance
class ConformanceSuite(
    SizeContract, CallContract, ExecutionContract, InterruptionContract, LatentContract, FileContract
):
    """Sizes, calls, ways of execution and how they end, latents and files. Hooks: see `contract.hooks.Hooks`."""
