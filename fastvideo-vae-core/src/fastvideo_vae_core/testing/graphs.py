"""CUDA graphs without a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fastvideo_vae_core import graphs
from fastvideo_vae_core.graphs import Captured
from fastvideo_vae_core.plan import Plan
from fastvideo_vae_core.vae import ParallelTiledVAE


def captured_on_cpu(vae: ParallelTiledVAE[Any], plan: Plan) -> Captured[Any]:
    """The plan of a model on the CPU as a graph of its own, which a replay computes anew from the graph's input into
    the graph's output. Calls need `without_a_gpu`, too."""
    with without_a_gpu():
        captured = Captured(vae, replace(plan, device=torch.device("cuda")))

    def replay() -> None:
        captured._output.copy_(vae._compute(plan, captured._input))

    captured._graph.replay = replay  # type: ignore[method-assign]
    return captured


@contextlib.contextmanager
def without_a_gpu() -> Iterator[None]:
    """Within it, streams, events and graphs do nothing, and the inputs of graphs are on the CPU."""

    def on_cpu(plan: Plan, dtype: torch.dtype) -> Tensor:
        return torch.zeros(plan.input_shape, dtype=dtype)

    with contextlib.ExitStack() as stack:
        for name in ("Stream", "current_stream", "CUDAGraph", "Event"):
            stack.enter_context(mock.patch.object(torch.cuda, name, mock.Mock()))
        for name in ("device", "stream", "graph"):
            stack.enter_context(mock.patch.object(torch.cuda, name, return_value=contextlib.nullcontext()))
        stack.enter_context(mock.patch.object(graphs, "_input_of", on_cpu))
        yield
