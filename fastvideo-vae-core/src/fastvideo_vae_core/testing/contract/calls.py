"""What a call promises, however it is computed."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastvideo_vae_core.plan import Direction
from fastvideo_vae_core.testing.contract.hooks import VAE, Hooks, both_directions, distance, moments
from fastvideo_vae_core.testing.parity import relative_error


class CallContract(Hooks):
    """Types, determinism, containers, re-entrancy, gradients."""

    @both_directions
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
    def test_the_result_has_the_type_of_the_weights(self, vae: VAE, direction: Direction, dtype: torch.dtype) -> None:
        x = self.example(vae, direction)
        reference = self.run(vae, direction, x)
        made = self.run(vae.to(dtype), direction, x)
        assert made.dtype == dtype
        assert relative_error(made, reference) <= (self.bf16_bound if dtype == torch.bfloat16 else self.fp32_bound)

    @both_directions
    def test_float16_that_overflows_follows_the_policy(
        self, vae: VAE, direction: Direction, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        overflow_in_float16(type(vae), direction, monkeypatch)
        x = self.example(vae, direction)
        reference = self.run(vae, direction, x)
        vae.half().config = replace(vae.config, fp16="retry")
        with pytest.warns(UserWarning, match="overflowed in float16"):
            made = self.run(vae, direction, x)
        assert made.dtype == torch.float16
        assert relative_error(made, reference) <= self.bf16_bound
        vae.config = replace(vae.config, fp16="upcast")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(self.run(vae, direction, x), made)
        vae.config = replace(vae.config, fp16="off")
        assert not self.run(vae, direction, x).isfinite().all()

    @both_directions
    def test_the_same_call_gives_the_same_result_and_draws_no_noise(self, vae: VAE, direction: Direction) -> None:
        x = self.example(vae, direction)
        before = torch.get_rng_state()
        assert torch.equal(self.run(vae, direction, x), self.run(vae, direction, x))
        assert torch.equal(torch.get_rng_state(), before)

    @both_directions
    def test_the_input_is_left_alone(self, vae: VAE, direction: Direction) -> None:
        x = self.example(vae, direction)
        kept = x.clone()
        self.run(vae, direction, x)
        self.run(vae, direction, x, self.plan(vae, direction, tuple(x.shape), tile=(2,) * len(vae.sample_axes)))
        assert torch.equal(x, kept)

    @both_directions
    def test_strides_of_the_input_do_not_count(self, vae64: VAE, direction: Direction) -> None:
        x = self.example(vae64, direction)
        swapped = x.transpose(1, -1).contiguous().transpose(1, -1)
        assert distance(self.run(vae64, direction, swapped), self.run(vae64, direction, x)) <= self.fp64_bound

    @both_directions
    def test_an_item_alone_is_the_item_in_a_batch(self, vae64: VAE, direction: Direction) -> None:
        x = self.example(vae64, direction, batch=3)
        whole = self.run(vae64, direction, x)
        for item in range(3):
            alone = self.run(vae64, direction, x[item : item + 1])
            assert distance(alone, whole[item : item + 1]) <= self.fp64_bound

    def test_without_return_dict_tuples_come_back(self, vae: VAE) -> None:
        z = self.example(vae, "decode")
        (sample,) = vae.decode(z, return_dict=False)
        assert torch.equal(sample, vae.decode(z).sample)
        assert torch.equal(sample, vae.decode(z)[0])
        (posterior,) = vae.encode(sample, return_dict=False)
        assert torch.equal(posterior.mean, vae.encode(sample).latent_dist.mean)

    @both_directions
    def test_calls_at_the_same_time_do_not_see_each_other(self, vae64: VAE, direction: Direction) -> None:
        inputs = [self.example(vae64, direction, batch=1, grid=grid) for grid in self.latent_grids[-2:]]
        alone = [self.run(vae64, direction, x) for x in inputs]
        together: list[list[Tensor]] = [[], []]

        def work(index: int) -> None:
            for _ in range(3):
                together[index].append(self.run(vae64, direction, inputs[index]))

        threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for expected, results in zip(alone, together, strict=True):
            assert len(results) == 3
            assert max(distance(result, expected) for result in results) <= self.fp64_bound

    def test_streams_at_the_same_time_do_not_see_each_other(self, vae64: VAE) -> None:
        one, other = self.example(vae64, "decode"), -self.example(vae64, "decode")
        pairs = list(zip(vae64.decode_stream(one), vae64.decode_stream(other), strict=True))
        for z, pieces in ((one, [pair[0] for pair in pairs]), (other, [pair[1] for pair in pairs])):
            assert distance(torch.cat(pieces, self.stream_axis), vae64.decode(z).sample) <= self.fp64_bound

    @both_directions
    @pytest.mark.parametrize("tiled", [False, True], ids=["whole", "tiled"])
    def test_an_exception_leaves_nothing_behind(self, vae: VAE, direction: Direction, tiled: bool) -> None:
        x = self.example(vae, direction)
        tile = (2,) * len(vae.sample_axes) if tiled else None
        plan = self.plan(vae, direction, tuple(x.shape), tile=tile)
        expected = self.run(vae, direction, x, plan)
        before = state_of(vae)
        last = called_last(vae, lambda: self.run(vae, direction, x, plan))
        made: list[weakref.ref[Tensor]] = []
        handles = [each.register_forward_hook(partial(remember, made)) for each in vae.modules() if each is not vae]
        handles.append(last.register_forward_hook(fail))
        with pytest.raises(Interrupted):
            self.run(vae, direction, x, plan)
        for handle in handles:
            handle.remove()
        assert state_of(vae) == before
        assert made
        assert not [tensor.shape for each in made if (tensor := each()) is not None]
        assert torch.equal(self.run(vae, direction, x, plan), expected)

    def test_a_stream_that_is_dropped_leaves_nothing_behind(self, vae: VAE) -> None:
        z = self.example(vae, "decode")
        before = state_of(vae)
        next(vae.decode_stream(z))
        assert state_of(vae) == before

    def test_gradients_reach_every_parameter_and_the_input(self) -> None:
        vae = self.tiny().train()
        x = self.example(vae, "encode").requires_grad_()
        vae(x).square().mean().backward()
        assert x.grad is not None
        assert bool(x.grad.abs().sum() > 0)
        without = [name for name, each in vae.named_parameters() if each.grad is None or not bool(each.grad.any())]
        assert not without

    def test_forward_is_decode_of_the_mode(self, vae64: VAE) -> None:
        x = self.example(vae64, "encode")
        expected = vae64.decode(vae64.encode(x).latent_dist.mode()).sample
        assert distance(vae64(x), expected) <= self.fp64_bound

    def test_nothing_warns(self, vae: VAE) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            x = self.example(vae, "encode")
            z = vae.encode(x).latent_dist.sample(torch.Generator().manual_seed(0))
            vae.decode(vae.denormalize_latents(vae.normalize_latents(z)))
            list(vae.decode_stream(z))
            [moments(each) for each in vae.encode_stream(x)]
            assert str(vae.plan_decode(tuple(z.shape)))
            vae.decode(z, plan=vae.plan_decode(tuple(z.shape), tile=(3,) * len(vae.sample_axes)))


class Interrupted(Exception):
    """Raised on purpose in the middle of a call."""


def fail(*_: object) -> None:
    raise Interrupted


def remember(made: list[weakref.ref[Tensor]], module: nn.Module, inputs: object, output: object) -> None:
    """A hook that notes what a layer makes, without keeping it."""
    made.extend(weakref.ref(each) for each in tree_leaves(output) if isinstance(each, Tensor))


def overflow_in_float16(model: type[VAE], direction: Direction, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make float16 arithmetic of a half overflow, as real weights do, and leave the other types alone.

    What comes out is NaN: norms divide infinity by infinity, and a clamp behind the network lets NaN through.
    """
    original = getattr(model, f"_{direction}")

    def overflowing(self: VAE, x: Tensor, *options: Any) -> Tensor:
        result: Tensor = original(self, x, *options)
        return result * torch.nan if x.dtype == torch.float16 else result

    monkeypatch.setattr(model, f"_{direction}", overflowing)


def called_last(vae: VAE, run: Callable[[], object]) -> nn.Module:
    """The last layer that a call runs, so that as much as can be is behind it."""
    called: list[nn.Module] = []
    handles = [
        module.register_forward_hook(lambda module, *_: called.append(module))
        for module in vae.modules()
        if module is not vae
    ]
    run()
    for handle in handles:
        handle.remove()
    return called[-1]


def state_of(vae: VAE) -> list[object]:
    """Everything that hangs on the model and its layers, by name and identity."""
    return [
        (
            name,
            attribute,
            sorted((str(key), id(each)) for key, each in value.items()) if type(value) is dict else id(value),
        )
        for name, module in vae.named_modules()
        for attribute, value in sorted(vars(module).items())
    ]
