"""What plans of a network will take: each is rehearsed, once, by the network itself without its weights."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable
from dataclasses import fields
from typing import TYPE_CHECKING

import torch

from fastvideo_vae_core.memory import Forecast, Recalled, forecast, matrix_workspace
from fastvideo_vae_core.plan import Direction, Plan
from fastvideo_vae_core.rehearsal import rehearsing

if TYPE_CHECKING:
    from fastvideo_vae_core.planning import Planned

# Predictions that a model remembers.
_MOST_FORECASTS = 256


class Rehearsals:
    """Of one network, one behind the other, as a search for a plan has them.

    What they have in common is done once: the modules are made, and each step is run on crops of one size. That is for
    a search to let go of; predictions stay with the model.
    """

    def __init__(self, vae: Planned) -> None:
        self._vae = vae
        self._shadows: dict[tuple[Direction, torch.dtype, torch.device], Planned] = {}
        self._recalled = defaultdict[Hashable, Recalled](Recalled)

    def forecast(self, plan: Plan) -> Forecast:
        """What the call will take, by everything in the plan that it depends on."""
        if plan.sharding is not None:
            return self._rehearsed(plan)
        known = self._vae._forecasts
        facts = (getattr(plan, each.name) for each in fields(plan) if each.compare and each.name != "notes")
        key = (*facts, self._vae._half_dtype(plan.direction))
        if key not in known:
            # Not to grow for ever, where shapes are new again and again.
            if len(known) >= _MOST_FORECASTS:
                known.clear()
            known[key] = self._rehearsed(plan)
        return known[key]

    def _rehearsed(self, plan: Plan) -> Forecast:
        vae, shadow = self._vae, self._shadow(plan)
        stored = vae._half_dtype(plan.direction)
        weights = sum(each.numel() * each.element_size() for each in vae._half_parameters(plan.direction))
        if plan.dtype != stored:
            weights += sum(each.numel() * each.element_size() for each in shadow.parameters())
        if plan.sharding is not None and plan.sharding.destination is not None:
            weights += math.prod(plan.output_shape) * stored.itemsize
        recalled = self._recalled[plan.direction, plan.dtype, plan.device, vae._steps_know(plan)]
        made = forecast(
            lambda x: shadow._compute(plan, x), plan.input_shape, plan.dtype, plan.device, shadow.parameters(), recalled
        )
        return made + weights + matrix_workspace(plan.device)

    def _shadow(self, plan: Plan) -> Planned:
        """The half of the network without its weights, laid out for the device of the plan."""
        key = plan.direction, plan.dtype, plan.device
        if key not in self._shadows:
            with rehearsing(plan.device):
                self._shadows[key] = self._vae._shadow(plan.direction).to(plan.dtype)
        return self._shadows[key]
