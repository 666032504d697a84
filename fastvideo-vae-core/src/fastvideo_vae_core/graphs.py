"""A call recorded as a CUDA graph: for inputs of one shape again and again, without the cost of launching kernels."""

from __future__ import annotations

import threading
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from fastvideo_vae_core.errors import ConfigError
from fastvideo_vae_core.outputs import DecoderOutput, EncoderOutput
from fastvideo_vae_core.plan import Plan
from fastvideo_vae_core.vae import ParallelTiledVAE

Posterior = TypeVar("Posterior")


class Captured(Generic[Posterior]):
    """`encode` or `decode` for inputs of one shape, as the plan says, recorded once and replayed.

    It pays where a call is many small kernels: short audio, single images. It holds the memory of one call for as long
    as it lives, and the addresses of the weights: make a new one after the model was moved or loaded anew. Calls from
    several threads take turns; what they return is theirs.

        captured = Captured(vae, vae.plan_decode((1, 64, 215)))
        sample = captured(z).sample

    Raises:
        ConfigError: the model is not on a CUDA device, or the plan needs more than that device.
    """

    def __init__(self, vae: ParallelTiledVAE[Posterior], plan: Plan) -> None:
        if plan.device.type != "cuda":
            raise ConfigError(f"CUDA graphs need a CUDA device, the model is on {plan.device}; call it directly")
        if plan.sharding is not None or any(plan.host_shares):
            raise ConfigError(
                "a CUDA graph records one device alone; make a plan without a mesh, and with memory enough"
            )
        self.plan = plan
        self._vae = vae
        self._lock = threading.Lock()
        self._input = _input_of(plan, vae._half_dtype(plan.direction))
        with torch.no_grad(), torch.cuda.device(plan.device):
            # Libraries choose their kernels in the first calls, which must not be recorded.
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    vae._compute(plan, self._input)
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._output = vae._compute(plan, self._input)
            self._done = torch.cuda.Event()

    def __call__(self, x: Tensor) -> Any:
        """What the model's `encode` or `decode` gives for x, which they would take.

        Raises:
            ConfigError: the graph is for inputs of another shape.
        """
        x = self._vae._as_planned(x)
        if tuple(x.shape) != self.plan.input_shape:
            raise ConfigError(f"the graph is for {self.plan.input_shape}, got {tuple(x.shape)}; make a new one")
        with self._lock, torch.cuda.device(self.plan.device):
            self._done.wait()
            self._input.copy_(x)
            self._graph.replay()
            result = self._output.clone()
            self._done.record()
        if self.plan.retry and not bool(result.isfinite().all()):
            result = self._vae._run(self.plan.direction, x, self.plan)
        else:
            result = self._vae._finish(self.plan.direction, result)
        if self.plan.direction == "decode":
            return DecoderOutput(result)
        return EncoderOutput(self._vae.posterior(result))


def _input_of(plan: Plan, dtype: torch.dtype) -> Tensor:
    """What a graph reads from."""
    return torch.zeros(plan.input_shape, dtype=dtype, device=plan.device)
