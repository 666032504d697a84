"""The posterior of Oobleck: a diagonal Gaussian whose deviation is a softplus."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvideo_vae_core.distribution import randn_like
from fastvideo_vae_core.errors import ShapeError


class OobleckDiagonalGaussianDistribution:
    """A Gaussian over latents with a diagonal covariance.

    Built from the 2C channels that the encoder gives, (B, 2C, s): the first C are the mean, the others the scale, and
    the standard deviation is softplus(scale) + 1e-4.

    Source: Stability-AI/stable-audio-tools `stable_audio_tools/models/bottleneck.py`.
    """

    def __init__(self, parameters: Tensor, deterministic: bool = False) -> None:
        if parameters.ndim != 3 or parameters.shape[1] % 2:
            raise ShapeError(
                f"a posterior needs (B, 2C, s) with an even number of channels, got {tuple(parameters.shape)}"
            )
        self.parameters = parameters
        self.deterministic = deterministic
        self.mean, self.scale = parameters.chunk(2, dim=1)
        self.std = F.softplus(self.scale) + 1e-4
        self.var = self.std * self.std
        self.logvar = torch.log(self.var)

    def mode(self) -> Tensor:
        """The most probable latents (B, C, s): the mean."""
        return self.mean

    def sample(self, generator: torch.Generator | list[torch.Generator] | None = None) -> Tensor:
        """Latents (B, C, s) drawn from the posterior.

        The noise is drawn on the generator's device (so a CPU generator gives the same noise for every accelerator)
        and in the dtype of the parameters; a list holds one generator for each item of the batch.
        """
        return self.mean + self.std * randn_like(self.mean, generator)

    def kl(self, other: OobleckDiagonalGaussianDistribution | None = None) -> Tensor:
        """Divergence to `other`, or to the standard normal: the official training loss, a scalar.

        Twice the nats of each latent, summed over channels and averaged over the batch and the latents. diffusers has
        the logarithms of `other` with the wrong sign; without `other` it agrees.
        """
        if self.deterministic:
            return torch.zeros(1, device=self.mean.device, dtype=self.mean.dtype)
        if other is None:
            return (self.mean * self.mean + self.var - self.logvar - 1.0).sum(1).mean()
        gap = (self.mean - other.mean).square() / other.var
        return (gap + self.var / other.var + other.logvar - self.logvar - 1.0).sum(1).mean()

    def nll(self, sample: Tensor) -> Tensor:
        """Negative log-likelihood (B,) in nats of latents (B, C, s)."""
        gap = (sample - self.mean).square() / self.var
        return 0.5 * (math.log(2.0 * math.pi) + self.logvar + gap).flatten(1).sum(1)
