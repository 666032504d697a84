"""Comparing two networks: how far apart their results are, and which layer is the first to differ."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """||ours - reference|| / ||reference|| over all elements, in float64.

    For example 1e-7 times a reference more than the reference is an error of 1e-7. Where the reference is zero
    everywhere, the error is 0 or infinite; it is NaN where either holds one.
    """
    if ours.shape != reference.shape:
        raise AssertionError(f"the reference has shape {tuple(reference.shape)}, got {tuple(ours.shape)}")
    ours, reference = (each.detach().to("cpu", torch.float64) for each in (ours, reference))
    gap, size = float((ours - reference).norm()), float(reference.norm())
    return gap / size if size else (0.0 if gap == 0 else math.inf)


def assert_close(ours: Tensor, reference: Tensor, bound: float, reason: str) -> float:
    """Assert that the relative error is at most `bound`, and return it.

    reason: why the bound is what it is; it stands in the message.
    """
    error = relative_error(ours, reference)
    # Written so that a NaN fails it.
    assert error <= bound, f"relative error {error:.2e}, more than {bound:.0e} ({reason})"
    return error


@dataclass(frozen=True)
class Divergence:
    """The first layer whose output differs.

    Attributes:
        layer: its name in our network.
        call: which of its calls, counted from 0.
        error: relative error of its output; infinite where the shapes differ.
        bound: what was allowed.
        compared: how many outputs of layers were compared before it, and agreed.
    """

    layer: str
    call: int
    error: float
    bound: float
    compared: int

    def __str__(self) -> str:
        again = f" (call {self.call})" if self.call else ""
        agreed = f"; {self.compared} outputs before it agree to {self.bound:.0e}"
        return f"first divergence at {self.layer}{again}: {self.error:.1e}{agreed}"


def first_divergence(
    ours: nn.Module,
    reference: nn.Module,
    run: Callable[[Any], object],
    bound: float = 1e-5,
    names: Mapping[str, str] | Callable[[str], str] | None = None,
) -> Divergence | None:
    """Run both networks and find the first layer, in the order of our calls, whose output differs; None if none does.

    Layers of equal names are compared, call by call. Only layers that both networks call as modules can be.

    run: calls one network on the same input as the other: `lambda model: model.decode(z)`.
    names: from the reference's names to ours, where they differ.

    For example `print(first_divergence(mine, official, lambda model: model.decode(z)))` prints
    "first divergence at decoder.up_blocks.1.resnets.0.conv1: 3.1e-02; 41 outputs before it agree to 1e-05".

    Raises:
        ValueError: no layer has a name in common.
    """
    rename = names if callable(names) else (lambda name: (names or {}).get(name, name))
    wanted = {rename(name) for name, _ in reference.named_modules() if name}
    with _recorded(ours, lambda name: name) as our_outputs, torch.no_grad():
        run(ours)
    with _recorded(reference, rename) as their_outputs, torch.no_grad():
        run(reference)
    compared = 0
    for (layer, call), output in our_outputs.items():
        if layer not in wanted or (layer, call) not in their_outputs:
            continue
        error = _error(output, their_outputs[layer, call])
        if not error <= bound:
            return Divergence(layer, call, error, bound, compared)
        compared += 1
    if not compared:
        raise ValueError("the networks call no layers of equal names; pass names= to map one's to the other's")
    return None


@contextmanager
def _recorded(model: nn.Module, rename: Callable[[str], str]) -> Iterator[dict[tuple[str, int], Tensor]]:
    """Outputs of every layer while the block runs: (name, which call) -> a copy, because layers overwrite in place."""
    outputs: dict[tuple[str, int], Tensor] = {}

    def record(name: str) -> Callable[[nn.Module, Any, Any], None]:
        calls = iter(range(1 << 62))

        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            tensors = [each for each in tree_leaves(output) if isinstance(each, Tensor)]
            if tensors:
                outputs[name, next(calls)] = tensors[0].detach().to("cpu", copy=True)

        return hook

    handles = [module.register_forward_hook(record(rename(name))) for name, module in model.named_modules() if name]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _error(ours: Tensor, reference: Tensor) -> float:
    return relative_error(ours, reference) if ours.shape == reference.shape else math.inf
