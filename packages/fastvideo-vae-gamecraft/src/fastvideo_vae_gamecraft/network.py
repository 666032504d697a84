"""The causal 3-D networks of Hunyuan-GameCraft and HunyuanVideo.

Shape legend: B batch, C channels, T frames, H, W. Every part takes a whole clip in pieces and gives a whole clip in
pieces, see `fastvideo_vae_core.ops.clip`. For exact tiles the same parts are listed as steps.
Source: Tencent-Hunyuan/Hunyuan-GameCraft-1.0 `hymm_sp/vae/vae.py` and `unet_causal_3d_blocks.py`. Names are diffusers'.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from fastvideo_vae_core.ops.attention import FrameCausalAttention, GridAttention
from fastvideo_vae_core.ops.causal import rows_of
from fastvideo_vae_core.ops.clip import CausalConv, Clip, Memory, Pointwise, Reading, Run, convolved, upsampled
from fastvideo_vae_core.ops.modules import Modules
from fastvideo_vae_core.ops.norm import Moments
from fastvideo_vae_core.ops.sums import Sum
from fastvideo_vae_core.tiling import POINTWISE, WHOLE, Axis, Step
from fastvideo_vae_gamecraft.config import HunyuanVideoArchConfig

Repeats = tuple[int, int, int]
# Whether rows, and columns, of a crop go on beyond what is wanted; see `Reading`.
Inner = tuple[bool, bool]
# That frames, rows and columns do not.
_BORDERED = (False, False, False)


class Encoder(nn.Module):
    """(B, 3, T, H, W) -> (B, 2z, t, h, w): mean and log variance before the quant convolution."""

    def __init__(self, arch: HunyuanVideoArchConfig) -> None:
        super().__init__()
        widths, groups = arch.block_out_channels, arch.norm_num_groups
        self.conv_in = CausalConv(arch.in_channels, widths[0])
        self.down_blocks = Modules[Level](
            Level((before, *[width] * arch.layers_per_block), groups, downsample=stride)
            for before, width, stride in zip((widths[0], *widths[:-1]), widths, arch.strides, strict=True)
        )
        self.mid_block = MidBlock(widths[-1], arch)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = CausalConv(widths[-1], 2 * arch.latent_channels)

    def forward(self, x: Clip, run: Run) -> Clip:
        x = Clip(list(convolved(x, self.conv_in, run)))
        for level in self.down_blocks:
            x = level(x, run)
        x = self.mid_block(x, run)
        return norm_conv(x, self.conv_norm_out, self.conv_out, run)

    def steps(self, run: Run) -> Iterator[Step]:
        yield _conv_step("conv_in", self.conv_in, run)
        for index, level in enumerate(self.down_blocks):
            yield from level.steps(f"down_blocks.{index}", run)
        yield from self.mid_block.steps("mid_block", run)
        yield _norm_conv_step("conv_out", self.conv_norm_out, self.conv_out, run)


class Decoder(nn.Module):
    """(B, z, t, h, w) -> (B, 3, T, H, W), from latents behind the post-quant convolution."""

    def __init__(self, arch: HunyuanVideoArchConfig) -> None:
        super().__init__()
        widths, groups = arch.block_out_channels[::-1], arch.norm_num_groups
        self.conv_in = CausalConv(arch.latent_channels, widths[0])
        self.mid_block = MidBlock(widths[0], arch)
        self.up_blocks = Modules[Level](
            Level((before, *[width] * (arch.layers_per_block + 1)), groups, upsample=repeats)
            for before, width, repeats in zip((widths[0], *widths[:-1]), widths, arch.strides, strict=True)
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = CausalConv(widths[-1], arch.out_channels)

    def forward(self, z: Clip, run: Run) -> Clip:
        x = Clip(list(convolved(z, self.conv_in, run)))
        x = self.mid_block(x, run)
        for level in self.up_blocks:
            x = level(x, run)
        return norm_conv(x, self.conv_norm_out, self.conv_out, run)

    def steps(self, run: Run) -> Iterator[Step]:
        yield _conv_step("conv_in", self.conv_in, run)
        yield from self.mid_block.steps("mid_block", run)
        for index, level in enumerate(self.up_blocks):
            yield from level.steps(f"up_blocks.{index}", run)
        yield _norm_conv_step("conv_out", self.conv_norm_out, self.conv_out, run)


class Level(nn.Module):
    """Residual blocks at one resolution, then the change of resolution."""

    def __init__(
        self, widths: Sequence[int], groups: int, *, downsample: Repeats = (1, 1, 1), upsample: Repeats = (1, 1, 1)
    ) -> None:
        super().__init__()
        width = widths[-1]
        self.resnets = Modules[ResnetBlock](
            ResnetBlock(before, after, groups) for before, after in itertools.pairwise(widths)
        )
        self.downsamplers = Modules[Downsample]([Downsample(width, downsample)] if max(downsample) > 1 else [])
        self.upsamplers = Modules[Upsample]([Upsample(width, upsample)] if max(upsample) > 1 else [])

    def forward(self, x: Clip, run: Run) -> Clip:
        for part in (*self.resnets, *self.downsamplers, *self.upsamplers):
            x = part(x, run)
        return x

    def steps(self, name: str, run: Run) -> Iterator[Step]:
        for index, resnet in enumerate(self.resnets):
            yield from resnet.steps(f"{name}.resnets.{index}", run)
        for sampler in (*self.downsamplers, *self.upsamplers):
            yield sampler.step(name, run)


class MidBlock(nn.Module):
    """Residual block, attention over the clip, residual block."""

    def __init__(self, width: int, arch: HunyuanVideoArchConfig) -> None:
        super().__init__()
        groups = arch.norm_num_groups
        attention = FrameCausalAttention if arch.mid_block_causal_attn else GridAttention
        self.resnets = Modules[ResnetBlock](ResnetBlock(width, width, groups) for _ in range(2))
        self.attentions = Modules[GridAttention | nn.Identity](
            [attention(width, groups)] if arch.mid_block_add_attention else [nn.Identity()]
        )

    def forward(self, x: Clip, run: Run) -> Clip:
        x = self.resnets[0](x, run)
        # At the size of latents, so that the pieces need not be kept apart.
        return self.resnets[1](Clip([self.attentions[0](x.joined())]), run)

    def steps(self, name: str, run: Run) -> Iterator[Step]:
        yield from self.resnets[0].steps(f"{name}.resnets.0", run)
        attention = self.attentions[0]
        if isinstance(attention, GridAttention):
            yield Step(
                name=f"{name}.attentions.0",
                run=lambda grids, _: attention(grids[0]),
                axes=(WHOLE,) * 3,
                excerpt=lambda grids, region: attention.excerpt(grids[0], region),
            )
        yield from self.resnets[1].steps(f"{name}.resnets.1", run)


class ResnetBlock(nn.Module):
    """Norm, SiLU, convolution, twice; added to the input, through a linear map where the width changes."""

    def __init__(self, before: int, after: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, before, eps=1e-6)
        self.conv1 = CausalConv(before, after)
        self.norm2 = nn.GroupNorm(groups, after, eps=1e-6)
        self.conv2 = CausalConv(after, after)
        self.conv_shortcut = nn.Identity() if before == after else Pointwise(before, after)

    def forward(self, x: Clip, run: Run) -> Clip:
        # Where the width changes, the input goes as soon as its shortcut is there.
        skip: list[Tensor] = []
        residual = self._first(x, run, x.moments(self.norm1, run), skip)
        return self._second(residual, skip, run, residual.moments(self.norm2, run))

    def steps(self, name: str, run: Run) -> Iterator[Step]:
        yield Step(
            name=f"{name}.conv1",
            run=partial(self._first_step, run),
            axes=_CONV,
            writes="residual",
            norm=self.norm1,
            pending=self._pending(run),
            trims=True,
            passes=True,
        )
        yield Step(
            name=f"{name}.conv2",
            run=partial(self._second_step, run),
            axes=_CONV,
            reads=("residual", "x"),
            norm=self.norm2,
            trims=True,
            passes=True,
        )

    def _first(
        self,
        x: Clip,
        run: Run,
        moments: Moments | None,
        skip: list[Tensor],
    ) -> Clip:
        fuses = _fuses(x, self.norm1, self.conv1, run)
        pieces = convolved(
            x,
            self.conv1,
            run,
            Reading(self.norm1, moments, x.bias),
            bias=not fuses,
            passed=lambda part: skip.append(self.conv_shortcut(part)),
        )
        return Clip(list(pieces), bias=self.conv1.conv.bias if fuses else None)

    def _second(
        self,
        residual: Clip,
        skip: list[Tensor],
        run: Run,
        moments: Moments | None,
        inner: Inner = (False, False),
        memory: Memory | None = None,
    ) -> Clip:
        fuses = _fuses(residual, self.norm2, self.conv2, run)
        bias = self.conv2.conv.bias if fuses else None
        made = []
        reading = Reading(self.norm2, moments, residual.bias, inner=inner)
        for piece in convolved(residual, self.conv2, run, reading, bias=not fuses, memory=memory):
            made.append(_plus(piece, bias, _next(skip, piece.shape[2])))
        return Clip(made)

    def _pending(self, run: Run) -> Tensor | None:
        """The bias between the two steps, if the second one adds it."""
        return self.conv1.conv.bias if run.defers(self.conv1.conv.weight) else None

    def _first_step(
        self,
        run: Run,
        grids: list[Tensor],
        moments: Moments | None,
        inner: Sequence[bool] = _BORDERED,
        memory: Memory | None = None,
    ) -> Tensor:
        clip, moments = _known(grids.pop(), self.norm1, run, moments)
        reading = Reading(self.norm1, moments, inner=_beyond(inner))
        bias = self._pending(run) is None
        return Clip(list(convolved(clip, self.conv1, run, reading, bias=bias, memory=memory))).joined()

    def _second_step(
        self,
        run: Run,
        grids: list[Tensor],
        moments: Moments | None,
        inner: Sequence[bool] = _BORDERED,
        memory: Memory | None = None,
    ) -> Tensor | Sum:
        rows, columns = (slice(1, -1) if each else slice(None) for each in _beyond(inner))
        # The input goes as soon as its shortcut is there.
        skip = self.conv_shortcut(grids.pop())[:, :, :, rows, columns]
        clip, moments = _known(grids.pop(), self.norm2, run, moments, self._pending(run))
        if memory is not None or not _fuses(clip, self.norm2, self.conv2, run):
            return self._second(clip, [skip], run, moments, _beyond(inner), memory).joined()
        reading = Reading(self.norm2, moments, clip.bias, inner=_beyond(inner))
        pieces = list(convolved(clip, self.conv2, run, reading, bias=False))
        return Sum(Clip(pieces).joined(), skip, self.conv2.conv.bias)


class Downsample(nn.Module):
    """A convolution with a stride."""

    def __init__(self, width: int, stride: Repeats) -> None:
        super().__init__()
        self.conv = CausalConv(width, width, stride=stride)

    def forward(self, x: Clip, run: Run, memory: Memory | None = None) -> Clip:
        pieces = list(convolved(x, self.conv, run, memory=memory))
        # What comes out of a piece is a fraction of it; the layers behind work best on whole pieces.
        if run.numbers is None or len(pieces) == 1:
            return Clip(pieces)
        most = max(run.numbers // pieces[0][0, :, 0].numel(), 1)
        grouped, frames = [[pieces[0]]], pieces[0].shape[2]
        for piece in pieces[1:]:
            frames += piece.shape[2]
            if frames > most:
                grouped.append([])
                frames = piece.shape[2]
            grouped[-1].append(piece)
        return Clip([torch.cat(group, 2) for group in grouped])

    def step(self, name: str, run: Run) -> Step:
        time, *space = self.conv.conv.stride
        axes = (
            Axis(down=2, lead=1, before=1) if time == 2 else _TIME,
            *(Axis(down=2, lead=1, after=1) if each == 2 else _SPACE for each in space),
        )
        return Step(
            name=f"{name}.downsample",
            run=lambda grids, _, memory=None: self(Clip([grids[0]]), run, memory).joined(),
            axes=axes,
            passes=True,
        )


class Upsample(nn.Module):
    """Nearest neighbour, then a convolution. The first frame stays one."""

    def __init__(self, width: int, repeats: Repeats) -> None:
        super().__init__()
        self.conv = CausalConv(width, width)
        self.repeats = repeats

    def forward(self, x: Clip, run: Run, inner: Inner = (False, False), memory: Memory | None = None) -> Clip:
        return Clip(list(upsampled(x, self.conv, run, self.repeats, inner, memory)))

    def step(self, name: str, run: Run) -> Step:
        time, *space = self.repeats
        axes = (
            Axis(up=2, lead=1, before=1) if time == 2 else _TIME,
            *(Axis(up=2, before=1, after=1) if each == 2 else _SPACE for each in space),
        )
        return Step(
            name=f"{name}.upsample",
            run=lambda grids, _, inner=_BORDERED, memory=None: self(
                Clip([grids.pop()]), run, _beyond(inner), memory
            ).joined(),
            axes=axes,
            trims=True,
            passes=True,
        )


def norm_conv(
    x: Clip,
    norm: nn.GroupNorm,
    conv: CausalConv,
    run: Run,
    moments: Moments | None = None,
    inner: Inner = (False, False),
    memory: Memory | None = None,
) -> Clip:
    """conv(silu(norm(x)))."""
    moments = x.moments(norm, run) if moments is None else moments
    reading = Reading(norm, moments, x.bias, inner=inner)
    return Clip(list(convolved(x, conv, run, reading, memory=memory)))


_TIME = Axis(before=2)
_SPACE = Axis(before=1, after=1)
_CONV = (_TIME, _SPACE, _SPACE)


def _conv_step(name: str, conv: CausalConv, run: Run) -> Step:
    return Step(
        name=name,
        run=lambda grids, _, memory=None: Clip(list(convolved(Clip([grids[0]]), conv, run, memory=memory))).joined(),
        axes=_CONV,
        passes=True,
    )


def _norm_conv_step(name: str, norm: nn.GroupNorm, conv: CausalConv, run: Run) -> Step:
    return Step(
        name=name,
        run=lambda grids, moments, inner=_BORDERED, memory=None: norm_conv(
            Clip([grids.pop()]), norm, conv, run, moments, _beyond(inner), memory
        ).joined(),
        axes=_CONV,
        norm=norm,
        trims=True,
        passes=True,
    )


def pointwise_step(name: str, layer: nn.Module) -> Step:
    """A layer that sees single positions."""
    return Step(name=name, run=lambda grids, _: layer(grids[0]), axes=(POINTWISE,) * 3)


def _beyond(inner: Sequence[bool]) -> Inner:
    """Of rows and columns."""
    _, rows, columns = inner
    return rows, columns


def _known(
    grid: Tensor, norm: nn.GroupNorm, run: Run, moments: Moments | None, bias: Tensor | None = None
) -> tuple[Clip, Moments | None]:
    """A crop as a clip, with the moments of the whole grid, or its own where none are given."""
    clip = Clip([grid], bias)
    return clip, clip.moments(norm, run) if moments is None else moments


def _fuses(x: Clip, norm: nn.GroupNorm, conv: CausalConv, run: Run) -> bool:
    """Whether a norm and a convolution run in kernels, which can leave a bias to the one that reads next."""
    return all(run.fuses(x.pieces[0], weight) for weight in (norm.weight, conv.conv.weight))


def _next(pieces: list[Tensor], frames: int) -> Tensor:
    """The next frames of pieces, which go as they are taken."""
    if pieces[0].shape[2] == frames:
        return pieces.pop(0)
    taken, pieces[0] = pieces[0][:, :, :frames], pieces[0][:, :, frames:]
    return taken


def _plus(made: Tensor, bias: Tensor | None, other: Tensor) -> Tensor:
    """made + bias + other, in the place of what a convolution made."""
    if bias is None:
        return made.add_(other)
    from fastvideo_vae_core.ops.kernels.rms_norm import add_

    add_(rows_of(made), bias, rows_of(other))
    return made
