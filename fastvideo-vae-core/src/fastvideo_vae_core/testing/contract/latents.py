"""The posterior, and what the diffusion model sees."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from fastvideo_vae_core.testing.contract.hooks import VAE, Hooks
from fastvideo_vae_core.testing.parity import relative_error

# float64, and sums over a few hundred terms.
BOUND = 1e-12


class LatentContract(Hooks):
    """The posterior is the distribution that it says, and normalisation has an inverse."""

    @pytest.fixture
    def posterior(self, vae64: VAE) -> Any:
        return vae64.encode(self.example(vae64, "encode", batch=3)).latent_dist

    @pytest.fixture
    def normal(self, posterior: Any) -> Normal:
        """The same distribution as PyTorch has it; a family whose posterior has no deviation overrides its tests."""
        return Normal(posterior.mean, posterior.std)

    def reduced(self, nats: Tensor) -> Tensor:
        """How the family sums a divergence over the axes of an item."""
        return nats.flatten(1).sum(1)

    def test_mode_is_the_mean(self, posterior: Any) -> None:
        assert torch.equal(posterior.mode(), posterior.mean)

    def test_deviation_and_log_variance_agree(self, posterior: Any) -> None:
        assert relative_error(posterior.std, torch.exp(0.5 * posterior.logvar)) <= BOUND

    def test_a_generator_makes_samples_reproducible(self, posterior: Any) -> None:
        noise = torch.randn(posterior.mean.shape, generator=seeded(7), dtype=torch.float64)
        assert relative_error(posterior.sample(seeded(7)), posterior.mean + posterior.std * noise) <= BOUND
        assert torch.equal(posterior.sample(seeded(7)), posterior.sample(seeded(7)))
        assert not torch.equal(posterior.sample(seeded(7)), posterior.sample(seeded(8)))

    def test_a_list_of_generators_gives_every_item_its_own(self, posterior: Any) -> None:
        made = posterior.sample([seeded(7), seeded(8), seeded(7)])
        noise = [torch.randn(posterior.mean[:1].shape, generator=seeded(seed), dtype=torch.float64) for seed in (7, 8)]
        expected = posterior.mean + posterior.std * torch.cat([*noise, noise[0]])
        assert relative_error(made, expected) <= BOUND

    def test_divergence_from_the_standard_normal(self, posterior: Any, normal: Normal) -> None:
        standard = Normal(torch.zeros_like(posterior.mean), torch.ones_like(posterior.mean))
        assert posterior.kl().shape == (3,)
        assert relative_error(posterior.kl(), self.reduced(kl_divergence(normal, standard))) <= BOUND

    def test_divergence_from_another_posterior(self, posterior: Any, normal: Normal, vae64: VAE) -> None:
        other = vae64.encode(-self.example(vae64, "encode", batch=3)).latent_dist
        expected = self.reduced(kl_divergence(normal, Normal(other.mean, other.std)))
        assert relative_error(posterior.kl(other), expected) <= BOUND

    def test_likelihood(self, posterior: Any, normal: Normal) -> None:
        sample = posterior.sample(seeded(7))
        assert posterior.nll(sample).shape == (3,)
        assert relative_error(posterior.nll(sample), self.reduced(-normal.log_prob(sample))) <= BOUND

    def test_normalisation_has_an_inverse(self, vae64: VAE) -> None:
        z = self.example(vae64, "decode")
        normalized = vae64.normalize_latents(z)
        assert normalized.shape == z.shape
        assert relative_error(vae64.denormalize_latents(normalized), z) <= BOUND
        assert relative_error(vae64.normalize_latents(vae64.denormalize_latents(z)), z) <= BOUND

    def test_normalisation_keeps_the_type(self, vae: VAE) -> None:
        z = self.example(vae, "decode")
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            assert vae.denormalize_latents(vae.normalize_latents(z.to(dtype))).dtype == dtype


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
