"""The diagonal Gaussian posterior of the KL autoencoders."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastvideo_vae_core.errors import ShapeError


class DiagonalGaussianDistribution:
    """A Gaussian over latents with a diagonal covariance.

    Built from the 2C channels that an encoder gives, (B, 2C, ...): the first C are the mean, the others the log
    variance, clamped to [-30, 20]. With `deterministic` the variance is zero and every sample is the mean.

    Source: CompVis/latent-diffusion `ldm/modules/distributions/distributions.py`, with sums over every axis but the
    batch, so that video and audio give right values too.
    """

    def __init__(self, parameters: Tensor, deterministic: bool = False) -> None:
        if parameters.ndim < 3 or parameters.shape[1] % 2:
            raise ShapeError(
                f"a posterior needs (B, 2C, ...) with an even number of channels, got {tuple(parameters.shape)}"
            )
        self.parameters = parameters
        self.deterministic = deterministic
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)
        if deterministic:
            self.std = self.var = torch.zeros_like(self.mean)
        else:
            self.std = torch.exp(0.5 * self.logvar)
            self.var = torch.exp(self.logvar)

    def mode(self) -> Tensor:
        """The most probable latents (B, C, ...): the mean."""
        return self.mean

    def sample(self, generator: torch.Generator | list[torch.Generator] | None = None) -> Tensor:
        """Latents (B, C, ...) drawn from the posterior.

        The noise is drawn on the generator's device (so a CPU generator gives the same noise for every accelerator)
        and in the dtype of the parameters; a list holds one generator for each item of the batch.
        """
        return self.mean + self.std * randn_like(self.mean, generator)

    def kl(self, other: DiagonalGaussianDistribution | None = None) -> Tensor:
        """Kullback-Leibler divergence (B,) in nats to `other`, or to the standard normal."""
        if self.deterministic:
            return torch.zeros(len(self.mean), device=self.mean.device, dtype=self.mean.dtype)
        if other is None:
            return 0.5 * _sum(self.mean.square() + self.var - 1.0 - self.logvar)
        gap = (self.mean - other.mean).square() / other.var
        return 0.5 * _sum(gap + self.var / other.var - 1.0 - self.logvar + other.logvar)

    def nll(self, sample: Tensor) -> Tensor:
        """Negative log-likelihood (B,) in nats of latents (B, C, ...)."""
        if self.deterministic:
            return torch.zeros(len(self.mean), device=self.mean.device, dtype=self.mean.dtype)
        return 0.5 * _sum(math.log(2.0 * math.pi) + self.logvar + (sample - self.mean).square() / self.var)


def randn_like(x: Tensor, generator: torch.Generator | list[torch.Generator] | None = None) -> Tensor:
    """Standard normal noise of x's shape, dtype and device, drawn on the device of the generator or generators."""
    if isinstance(generator, list):
        if len(generator) != len(x):
            raise ShapeError(f"{len(x)} items need {len(x)} generators, got {len(generator)}; or pass a single one")
        return torch.cat([randn_like(item, each) for item, each in zip(x.split(1), generator, strict=True)])
    device = x.device if generator is None else generator.device
    noise = torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype)
    return noise.to(x.device)


def _sum(x: Tensor) -> Tensor:
    return x.flatten(1).sum(1)
