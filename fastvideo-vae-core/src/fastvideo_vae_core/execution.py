"""How a call gets its plan and is computed, and what becomes of it where float16 overflows or memory runs out.

Without a plan, on a device that can say how much memory is free, a call takes the fastest plan that is predicted to
fit. A prediction can be wrong, and others can take memory meanwhile: then the call begins anew, once, in a smaller
plan.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastvideo_vae_core.errors import MemoryBudgetError, ShapeError
from fastvideo_vae_core.finite import is_finite
from fastvideo_vae_core.memory import format_bytes
from fastvideo_vae_core.plan import Plan
from fastvideo_vae_core.ranks import Ranks
from fastvideo_vae_core.units import Progress, Units

# A call takes at most so many times the bytes of its samples, and as much again as its weights; a prediction, which
# takes up to seconds, is for what comes near that. Of the published networks the greediest takes 910 times.
_MOST_TIMES = 1024

if TYPE_CHECKING:
    from fastvideo_vae_core.planning import Planned
    from fastvideo_vae_core.vae import ParallelTiledVAE


def free_bytes(device: torch.device) -> int | None:
    """What a device can still give: free memory, and what PyTorch holds of it without using it. None: it cannot say."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return None
    free, _ = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_stats(device)
    return free + held.get("reserved_bytes.all.current", 0) - held.get("allocated_bytes.all.current", 0)


def fitting(vae: Planned, plan: Plan) -> Plan:
    """The plan, if it is predicted to fit what is free, or else the first of ever smaller ones that does.

    Raises:
        MemoryBudgetError: nothing is predicted to fit.
    """
    free = vae._free_bytes()
    if free is None:
        return plan
    samples = plan.input_shape if plan.direction == "encode" else plan.output_shape
    if _MOST_TIMES * math.prod(samples) * plan.dtype.itemsize <= free // 2:
        return replace(plan, notes=(*plan.notes, f"{format_bytes(free)} free on {plan.device}, many times the need"))
    peak = plan.peak_bytes
    if peak <= free:
        return _noted(plan, free, peak)
    # The prediction has the weights and the input in it, which are there already.
    there = sum(each.numel() * each.element_size() for each in vae._half_parameters(plan.direction))
    there += math.prod(plan.input_shape) * vae._half_dtype(plan.direction).itemsize
    if peak <= free + there:
        return _noted(plan, free, peak)
    try:
        smaller = vae._plan(plan.direction, plan.input_shape, free + there)
    except MemoryBudgetError as error:
        raise MemoryBudgetError(
            f"{error}; that is what is free on {plan.device}, with the weights and the input that are there; a plan of"
            f" your own, as plan_{plan.direction} makes, runs nevertheless"
        ) from None
    return replace(smaller, notes=(*smaller.notes, f"{plan.mode} would need {format_bytes(peak)}"))


def run(vae: ParallelTiledVAE[Any], plan: Plan, x: Tensor, progress: Progress | None) -> Tensor:
    """The call as the plan says: the result, or on one of several devices its part of it."""
    if plan.sharding is None:
        return _computed(vae, plan, x, None, progress)
    ranks = Ranks(plan.sharding)
    ranks.agree(_shared_facts(plan), x.device)
    with plan.sharding.line.watched():
        made = _computed(vae, plan, x, ranks, progress)
        return ranks.assemble(vae._sent(plan.direction, made, plan.sharding), plan.output_shape[ranks.axis])


def _computed(
    vae: ParallelTiledVAE[Any], plan: Plan, x: Tensor, ranks: Ranks | None, progress: Progress | None
) -> Tensor:
    """What this device makes of the input: the result, or its slab of it."""
    x = x.to(vae._half_dtype(plan.direction))
    result, plan = compute(vae, plan, x, progress)
    overflow = plan.retry and not is_finite(result)
    if plan.retry and ranks is not None:
        overflow = ranks.agree_on_any(overflow, x.device)
    if overflow:
        if not is_finite(x):
            raise ShapeError(f"the input of {plan.direction} holds NaN or infinity; nothing can be computed from it")
        warnings.warn(
            f"{plan.direction} of {plan.input_shape} overflowed in float16 and was computed again in float32;"
            " bfloat16 does not overflow, VAEConfig(fp16='upcast') skips the first attempt, 'off' this check",
            stacklevel=5,
        )
        # The first result goes before the second comes.
        del result
        result, _ = compute(vae, replace(plan, dtype=torch.float32, retry=False), x, progress)
    return vae._finish(plan.direction, result)


def compute(vae: ParallelTiledVAE[Any], plan: Plan, x: Tensor, progress: Progress | None) -> tuple[Tensor, Plan]:
    """What the network makes of x as the plan says, or as a smaller one does where memory runs out; and that plan.

    Raises:
        MemoryBudgetError: memory ran out, and there is no smaller plan, or it ran out in that too.
    """
    try:
        return _attempt(vae, plan, x, progress), plan
    except torch.OutOfMemoryError as error:
        # On several devices the others wait for this one, in the plan that all have agreed on.
        if vae.config.out_of_memory == "raise" or plan.sharding is not None:
            raise
        failed = _released(error)
    smaller = _smaller(vae, plan)
    said = f"{plan.direction} of {plan.input_shape} ran out of memory on {plan.device} ({_described(plan)})"
    if smaller is None:
        raise MemoryBudgetError(f"{said}, and there is no smaller plan; {_WAY_OUT}") from failed
    warnings.warn(
        f"{said} and is computed again with less ({_described(smaller)}); memory_budget= begins with such a plan,"
        " VAEConfig(out_of_memory='raise') gives the error instead",
        stacklevel=6,
    )
    try:
        return _attempt(vae, smaller, x, progress), smaller
    except torch.OutOfMemoryError as error:
        failed = _released(error)
    raise MemoryBudgetError(f"{said}, and again with less ({_described(smaller)}); {_WAY_OUT}") from failed


def _noted(plan: Plan, free: int, peak: int) -> Plan:
    why = f"{format_bytes(free)} free on {plan.device}, {format_bytes(peak)} needed, weights and input among them"
    return replace(plan, notes=(*plan.notes, why))


def _attempt(vae: ParallelTiledVAE[Any], plan: Plan, x: Tensor, progress: Progress | None) -> Tensor:
    return vae._compute(plan, x, Units(-(-len(x) // plan.items), progress))


def _released(error: BaseException) -> BaseException:
    """The error without the frames that it went through, which hold the tensors of the failed attempt."""
    each: BaseException | None = error
    while each is not None:
        each.__traceback__ = None
        each = each.__cause__ or each.__context__
    return error


def _smaller(vae: ParallelTiledVAE[Any], plan: Plan) -> Plan | None:
    """A plan with the same numbers that is predicted to take half, or anything less, where nothing takes half."""
    peak = plan.peak_bytes
    if plan.blend is not None:
        # Other tiles would give other numbers.
        one = replace(plan, items=1)
        return one if plan.items > 1 and one.peak_bytes < peak else None
    for budget in (peak // 2, peak - 1):
        try:
            return vae._within(plan, budget)
        except MemoryBudgetError:
            continue
    return None


def _shared_facts(plan: Plan) -> tuple[object, ...]:
    """What must be the same on every rank for their exchanges to fit together."""
    assert plan.sharding is not None
    call = (plan.direction, plan.input_shape, plan.items, plan.tile, plan.chunk, plan.blend, plan.dtype, plan.retry)
    return (*call, plan.sharding.world, plan.sharding.axis, plan.sharding.destination, plan.sharding.pixels)


def _described(plan: Plan) -> str:
    how = ", ".join(plan.mode_parts())
    return f"{how}, {plan.items} of {plan.input_shape[0]} at a time, {format_bytes(plan.peak_bytes)} predicted"


_WAY_OUT = "pass memory_budget= to its plan, take a smaller input or a 16-bit dtype, or free memory on the device"
