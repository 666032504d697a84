"""The posterior against PyTorch's own distributions, for images, video and audio."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from fastvideo_vae_core.distribution import DiagonalGaussianDistribution, randn_like
from fastvideo_vae_core.errors import ShapeError
from fastvideo_vae_core.testing.parity import relative_error

SHAPES = [(2, 6, 5), (2, 6, 4, 5), (2, 6, 3, 4, 5)]
# float64, sums of at most 180 terms.
BOUND = 1e-13


def parameters(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES, ids=["audio", "image", "video"])
class TestAgainstTorch:
    def test_moments(self, shape: tuple[int, ...]) -> None:
        both = parameters(shape)
        posterior = DiagonalGaussianDistribution(both)
        assert torch.equal(posterior.mean, both[:, :3])
        assert torch.equal(posterior.mode(), both[:, :3])
        assert torch.equal(posterior.logvar, both[:, 3:])
        assert relative_error(posterior.std.square(), posterior.var) <= BOUND

    def test_divergence_and_likelihood_sum_over_every_axis_but_the_batch(self, shape: tuple[int, ...]) -> None:
        one, other = (DiagonalGaussianDistribution(parameters(shape, seed)) for seed in (0, 1))
        normal, standard = Normal(one.mean, one.std), Normal(torch.zeros_like(one.mean), torch.ones_like(one.mean))
        for made, expected in (
            (one.kl(), kl_divergence(normal, standard)),
            (one.kl(other), kl_divergence(normal, Normal(other.mean, other.std))),
            (one.nll(other.mean), -normal.log_prob(other.mean)),
        ):
            assert made.shape == (2,)
            assert relative_error(made, expected.flatten(1).sum(1)) <= BOUND

    def test_the_divergence_from_itself_is_zero(self, shape: tuple[int, ...]) -> None:
        posterior = DiagonalGaussianDistribution(parameters(shape))
        assert posterior.kl(posterior).abs().max() <= BOUND

    def test_a_deterministic_one_has_no_spread(self, shape: tuple[int, ...]) -> None:
        posterior = DiagonalGaussianDistribution(parameters(shape), deterministic=True)
        assert torch.equal(posterior.sample(), posterior.mean)
        assert not posterior.std.any()
        assert torch.equal(posterior.kl(), torch.zeros(2, dtype=torch.float64))
        assert torch.equal(posterior.nll(posterior.mean), torch.zeros(2, dtype=torch.float64))


def test_the_log_variance_is_clamped() -> None:
    posterior = DiagonalGaussianDistribution(torch.tensor([0.0, 0.0, -1000.0, 1000.0]).view(1, 4, 1))
    assert posterior.logvar.flatten().tolist() == [-30.0, 20.0]
    assert posterior.std.isfinite().all()
    assert posterior.kl().isfinite().all()


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (4, 4), (4,)])
def test_parameters_without_two_halves_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="even number of channels"):
        DiagonalGaussianDistribution(torch.zeros(shape))


class TestSampling:
    def test_samples_have_the_moments_that_they_should(self) -> None:
        posterior = DiagonalGaussianDistribution(torch.tensor([3.0, math.log(4.0)]).view(1, 2, 1).expand(1, 2, 20000))
        sample = posterior.sample(torch.Generator().manual_seed(0))
        # Within four standard errors of 20,000 draws.
        assert abs(float(sample.mean()) - 3) <= 4 * 2 / math.sqrt(20000)
        assert abs(float(sample.std()) - 2) <= 4 * 2 / math.sqrt(2 * 20000)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
    def test_noise_has_the_type_of_the_parameters(self, dtype: torch.dtype) -> None:
        posterior = DiagonalGaussianDistribution(torch.zeros(1, 4, 3, dtype=dtype))
        expected = torch.randn(1, 2, 3, generator=torch.Generator().manual_seed(5), dtype=dtype)
        assert torch.equal(posterior.sample(torch.Generator().manual_seed(5)), expected)

    def test_without_a_generator_the_global_one_draws(self) -> None:
        x = torch.zeros(2, 3)
        torch.manual_seed(3)
        expected = torch.randn(2, 3)
        torch.manual_seed(3)
        assert torch.equal(randn_like(x), expected)

    def test_a_list_has_one_generator_for_each_item(self) -> None:
        x = torch.zeros(2, 3, 4)
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        expected = [torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
        assert torch.equal(randn_like(x, generators), torch.cat(expected))
        with pytest.raises(ShapeError, match="2 items need 2 generators, got 1"):
            randn_like(x, generators[:1])
