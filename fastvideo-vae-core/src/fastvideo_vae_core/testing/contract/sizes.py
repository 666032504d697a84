"""Which sizes go in, and which come out."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from fastvideo_vae_core.errors import ShapeError
from fastvideo_vae_core.plan import Direction
from fastvideo_vae_core.testing.contract.hooks import VAE, Hooks, both_directions


class SizeContract(Hooks):
    """The law of sizes holds, and a size that breaks it is refused with a way out."""

    def test_shapes_are_those_that_were_promised(self, vae: VAE) -> None:
        for grid in self.latent_grids:
            z = self.example(vae, "decode", grid=grid)
            y = vae.decode(z).sample
            assert y.shape == vae.decoded_shape(z.shape)
            posterior = vae.encode(y).latent_dist
            assert posterior.mean.shape == posterior.mode().shape == posterior.std.shape == z.shape
            assert vae.encoded_shape(y.shape) == z.shape

    def test_the_law_of_sizes_has_an_inverse(self, vae: VAE) -> None:
        for length in range(1, 40):
            z_shape = (3, vae.channels[1], *[length] * len(vae.sample_axes))
            assert vae.encoded_shape(vae.decoded_shape(z_shape)) == z_shape
            assert vae.valid_sample_shape(vae.decoded_shape(z_shape)) == vae.decoded_shape(z_shape)

    def test_an_illegal_size_is_refused_and_the_sizes_that_are_named_work(self, vae: VAE) -> None:
        for shape in self.illegal_shapes(vae):
            with pytest.raises(ShapeError) as caught:
                vae.encode(torch.zeros(shape))
            named = re.search(r"pass (.+?), or use pad_to_valid", str(caught.value))
            assert named, caught.value
            for sizes in named[1].split(" or "):
                legal = (*shape[:2], *map(int, sizes.split(" x ")))
                assert vae.encode(torch.zeros(legal)).latent_dist.mean.shape == vae.encoded_shape(legal)

    def test_the_official_treatment_of_illegal_sizes_gives_the_promised_shape(self, vae: VAE) -> None:
        vae.config = replace(vae.config, illegal_sizes="official")
        for shape in self.illegal_shapes(vae):
            assert vae.encode(torch.zeros(shape)).latent_dist.mean.shape == vae.encoded_shape(shape)

    def test_padding_makes_a_size_legal_and_cropping_undoes_it(self, vae: VAE) -> None:
        for shape in self.illegal_shapes(vae):
            x = torch.rand(shape)
            padded = vae.pad_to_valid(x)
            assert padded.shape == vae.valid_sample_shape(shape)
            assert torch.equal(vae.crop_to(padded, shape), x)
            assert vae.crop_to(vae.decode(vae.encode(padded).latent_dist.mode()).sample, shape).shape == shape

    def test_padding_leaves_a_legal_size_alone(self, vae: VAE) -> None:
        x = self.example(vae, "encode")
        assert torch.equal(vae.pad_to_valid(x), x)

    def test_cropping_to_something_larger_is_refused(self, vae: VAE) -> None:
        x = self.example(vae, "encode")
        with pytest.raises(ShapeError, match="larger"):
            vae.crop_to(x, (*x.shape[:-1], x.shape[-1] + 1))

    @both_directions
    def test_wrong_axes_channels_and_empty_sizes_are_refused(self, vae: VAE, direction: Direction) -> None:
        x = self.example(vae, direction)
        for wrong in (x[0], x[None], torch.cat([x, x], 1), x[:0], x[..., :0]):
            with pytest.raises(ShapeError):
                self.run(vae, direction, wrong)
