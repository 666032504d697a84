"""Convolutions over a video that comes in pieces, and what they remember from one piece to the next.

Most are causal. One that sees later frames gives its outputs late by as many, and the end of the video brings the rest.

Shape legend: B batch, C channels, T frames, H, W; K taps in time. Feature maps are (B, C, T, H, W) with the channels
innermost in memory (`torch.channels_last_3d`): a position is one row of C numbers, a frame one block of rows.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvideo_vae_core.ops import taps
from fastvideo_vae_core.ops.rms_norm import Modulation, PixelNorm, RMSNorm
from fastvideo_vae_core.ops.words import copy_rows

if TYPE_CHECKING:
    from fastvideo_vae_core.strips import Strip


class Cache:
    """What a network remembers of one video between its pieces: of each layer, the last frames that it has seen.

    It belongs to one call. The network itself keeps nothing, so any number of videos can be under way on one model.

    Where several devices share a call, the network sees a strip of every picture, and the cache also knows how to get
    what lies beyond it.

    Attributes:
        device: where the network runs; that of the tensors, but for a rehearsal on the meta device.
        strip: which part of the pictures this is; None: all of them.
        first: nothing of the video has been seen yet.
        last: nothing will follow, so there is nothing to remember.
    """

    def __init__(self, device: torch.device, strip: Strip | None = None) -> None:
        self.device, self.strip = device, strip
        self.first = True
        self.last = False
        self._frames: dict[nn.Module, Tensor] = {}
        self._begun: set[nn.Module] = set()

    def copy(self) -> Cache:
        """The same memory; what is done with either from here on, the other does not see."""
        other = Cache(self.device, self.strip)
        other.first, other.last = self.first, self.last
        other._frames, other._begun = dict(self._frames), set(self._begun)
        return other

    def handed_to(self, network: nn.Module, of: nn.Module, dtype: torch.dtype) -> Cache:
        """The memory of one network as that of its twin in another type."""
        other, twins = self.copy(), dict(network.named_modules())
        names = {layer: name for name, layer in of.named_modules()}
        other._frames = {twins[names[layer]]: frames.to(dtype) for layer, frames in self._frames.items()}
        other._begun = {twins[names[layer]] for layer in self._begun}
        return other

    def state(self) -> Hashable:
        """What there is to remember, without its numbers."""
        frames = frozenset((layer, each.shape) for layer, each in self._frames.items())
        return self.first, frames, frozenset(self._begun)

    def begins(self, layer: nn.Module) -> bool:
        """Whether the layer asks for the first time in this video; where frames come late, not all do in one piece."""
        if layer in self._begun:
            return False
        self._begun.add(layer)
        return True

    def take(self, layer: nn.Module) -> Tensor | None:
        """The frames (B, n, H, W, C) that the layer kept, which are forgotten here; None at the beginning."""
        return self._frames.pop(layer, None)

    def keep(self, layer: nn.Module, frames_BTHWC: Tensor) -> None:
        """Remember frames for the layer, as a copy, so that what they were cut from can go."""
        self._frames[layer] = frames_BTHWC.clone(memory_format=torch.contiguous_format)

    def widened(self, x: Tensor, before: int, after: int) -> Tensor:
        """The strip x (B, C, T, H, W) with so many rows, or columns, of the pictures more, as far as there are any."""
        return x if self.strip is None else self.strip.widened(x, before, after)

    def narrowed(self, y: Tensor, before: int, after: int) -> Tensor:
        """What was made of a widened strip, without what was made of the rows that it was widened by: so many."""
        return y if self.strip is None else self.strip.narrowed(y, before, after)

    def gathered(self, x: Tensor) -> Tensor:
        """The whole pictures (B, C, T, H, W) of which x is a strip."""
        return x if self.strip is None else self.strip.gathered(x)

    def own(self, x: Tensor) -> Tensor:
        """The strip of whole pictures (B, C, T, H, W)."""
        return x if self.strip is None else self.strip.cut(x)

    def agreed(self, flag: bool) -> bool:
        """Whether it is true here or on another device that has a strip of the pictures."""
        return flag if self.strip is None else self.strip.ranks.agree_on_any(flag, self.device)

    def fuses(self, x: Tensor, layer: nn.Conv3d) -> bool:
        """Whether the kernels of this device are to be used, rather than the definitions."""
        differentiates = torch.is_grad_enabled() and (x.requires_grad or layer.weight.requires_grad)
        return self.device.type == "cuda" and _HAS_TRITON and x.dtype != torch.float64 and not differentiates


class CausalConv3d(nn.Conv3d):
    """Convolution over a video, piece by piece; by default an output frame sees no later input frame.

    x (B, C, T, H, W) -> (B, O, T / stride, H, W): `stride` is in time only, and space keeps its size. A piece
    continues the one before through the cache; a strided layer begins each window with the last frame it kept.

    edge: what stands before the first frame of the video: zeros, or copies of that frame.
    ahead: how many later frames an output frame sees; copies of the last frame stand behind it. Outputs come so many
        frames late, and a first piece may give none; the piece that is the last gives all that are left, also one
        without frames.
    border: what stands around a picture: zeros, or its reflection, which needs 2 rows and columns.
    positions: how many neighbouring output channels stand for the positions that one becomes; see `by_position`.

    The formulation follows from the shape, once (see `stacks`): one 3-D convolution over remembered frames and piece,
    or one 2-D convolution over windows of K frames side by side in the channels. A single first frame behind zeros
    takes neither: only the last tap sees anything but zeros.
    """

    def __init__(
        self,
        before: int,
        after: int,
        kernel: tuple[int, int, int] = (3, 3, 3),
        stride: int = 1,
        *,
        edge: Literal["zeros", "copies"] = "zeros",
        ahead: int = 0,
        border: Literal["zeros", "reflect"] = "zeros",
        positions: int = 1,
    ) -> None:
        around = (kernel[1] // 2, kernel[2] // 2)
        super().__init__(before, after, kernel, (stride, 1, 1), (0, *((0, 0) if border == "reflect" else around)))
        self.memory = kernel[0] - stride
        self.stacked = stacks(before, kernel)
        self.copies, self.ahead, self.positions = edge == "copies", ahead, positions
        self.border, self.around = border, around
        # Whether output channels come as (position, channel), in which positions are easily moved; else, as the weights
        # are stored, as (channel, position).
        self.by_position = False

    def forward(self, x: Tensor, cache: Cache) -> Tensor:  # type: ignore[override]
        if x.shape[2] == 0 and not cache.last:
            return self._nothing(x, x.shape[3:])
        window = self.window(x, cache)
        window.write(rows_of(x))
        return self.convolve(window, cache, self.bias)

    def window(self, x: Tensor, cache: Cache) -> Window:
        """Room for the input that the piece x, or something of its shape, makes behind the remembered frames."""
        batch, channels, frames, height, width = x.shape
        taps, stride = self.kernel_size[0], self.stride[0]
        history, inset = cache.take(self), self.inset(cache)
        sizes = (height + 2 * inset[0], width + 2 * inset[1])
        if history is None and frames == 1 and not self.copies:
            return Window(x.new_empty(batch, 1, *sizes, channels), taps=1, shift=0, stride=1, inset=inset)
        shift = self.memory - (self.ahead if history is None else 0)
        behind = self.ahead if cache.last else 0
        if history is None and not self.copies:
            history = x.new_zeros(batch, shift, *sizes, channels)
        total = shift + frames + behind
        if self.stacked and total >= taps:
            data = x.new_empty(batch, (total - taps) // stride + 1, *sizes, taps * channels)
        else:
            data, taps, stride = x.new_empty(batch, total, *sizes, channels), 1, 1
        window = Window(data, taps=taps, shift=shift, stride=stride, copies=history is None, behind=behind, inset=inset)
        if history is not None:
            window.remember(history)
        return window

    def convolve(self, window: Window, cache: Cache, bias: Tensor | None) -> Tensor:
        """The convolution itself, once the window is full; the cache keeps the window's last frames."""
        window.close(self.border, cache.strip)
        if not cache.last:
            cache.keep(self, window.last(self.memory))
        data, (rows, columns) = window.data, window.inset
        padding = (self.around[0] - rows, self.around[1] - columns)
        weight, bias = self._in_order(self.weight), None if bias is None else self._in_order(bias)
        if window.shift == 0:
            return self._planes(data, weight[:, :, -1], bias, padding, cache)
        if window.taps == 1:
            if data.shape[1] < self.kernel_size[0]:
                return self._nothing(data, (data.shape[2] - 2 * rows, data.shape[3] - 2 * columns))
            if taps.takes(cache.device, data, self):
                down, across = padding
                made = taps.convolved(F.pad(data, (0, 0, across, across, down, down)).movedim(-1, 1), weight)
                return made if bias is None else made + bias.view(-1, 1, 1, 1)
            return F.conv3d(data.movedim(-1, 1), weight, bias, self.stride, (0, *padding))
        weight = weight.transpose(1, 2).flatten(1, 2)
        if self.kernel_size[1:] == (1, 1):
            return F.linear(data, weight.flatten(1), bias).movedim(-1, 1)
        return self._planes(data, weight, bias, padding, cache)

    def _planes(
        self, data: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int], cache: Cache
    ) -> Tensor:
        """The convolution of each frame of data (B, F, H, W, C)."""
        frames = stack(data)
        if taps.takes(cache.device, data, self, any_shape=True) and taps.worth(frames, weight):
            return unstack(taps.in_strips(frames, weight, bias, padding), data)
        return unstack(F.conv2d(frames, weight, bias, 1, padding), data)

    def inset(self, cache: Cache) -> tuple[int, int]:
        """Rows and columns around a picture that are written down, because they are not just zeros."""
        if self.border == "reflect":
            return self.around
        along = None if cache.strip is None else cache.strip.along
        return tuple(size if axis == along else 0 for axis, size in enumerate(self.around))  # type: ignore[return-value]

    def arrange(self) -> None:
        """Put the weights into the order in memory in which the formulation reads them; their shape (O, C, K, H, W)
        stays. Without it they are copied into that order at each call, which small layers do not notice."""
        self.by_position = self.positions > 1
        if self.stacked:
            self.weight.data = self.weight.data.permute(0, 3, 4, 2, 1).contiguous().permute(0, 4, 3, 1, 2)

    def _in_order(self, values: Tensor) -> Tensor:
        """Weights (O, C, ...) or biases (O) in the order in which their output channels come; weights stay
        channels-last."""
        if not self.by_position:
            return values
        rows = values.movedim(1, -1) if values.ndim > 1 else values
        rows = rows.unflatten(0, (-1, self.positions)).transpose(0, 1).flatten(0, 1)
        return rows.movedim(-1, 1) if values.ndim > 1 else rows

    def _nothing(self, like: Tensor, sizes: Sequence[int]) -> Tensor:
        """No frames, of pictures of these sizes."""
        return like.new_empty(len(like), self.out_channels, 0, *sizes)


@dataclass(frozen=True)
class Window:
    """The input of a convolution while it is being written: remembered frames, those of a piece, and copies behind it.

    Call all of them e. With one tap, `data` (B, F, H, W, C) holds e as it is. With K taps, frame t of
    `data` (B, F, H, W, K * C) holds e[t * stride] to e[t * stride + K - 1] side by side.

    Attributes:
        shift: how many frames there are in e before those of the piece.
        copies: they are not remembered but copies of the first frame of the piece.
        behind: copies of the last frame, at the end of e.
        inset: rows and columns around each picture that hold its border: what other devices have there, or a
            reflection, or zeros.
    """

    data: Tensor
    taps: int
    shift: int
    stride: int
    copies: bool = False
    behind: int = 0
    inset: tuple[int, int] = (0, 0)

    def write(self, frames_BTHWC: Tensor) -> None:
        """Fill in the piece."""
        self._place(self._inner(), frames_BTHWC, self.shift)

    def remember(self, frames_BTHWC: Tensor) -> None:
        """Fill in the remembered frames, with their borders."""
        self._place(self.data, frames_BTHWC, 0)

    def close(self, border: Literal["zeros", "reflect"] = "reflect", strip: Strip | None = None) -> None:
        """Fill in borders and copies, once the rest is there."""
        end = self._end() - self.behind
        met = (False, False)
        if strip is not None and self.inset[strip.along]:
            met = self._meet(strip, end)
        if self.data.is_meta:
            return
        if self.copies:
            first = self._frame(self.shift)
            self._place(self.data, first.expand(-1, self.shift, -1, -1, -1), 0)
        if self.behind:
            last = self._frame(end - 1)
            self._place(self.data, last.expand(-1, self.behind, -1, -1, -1), end)
        for axis, width in enumerate(self.inset):
            sides = [not side for side in met] if strip is not None and axis == strip.along else (True, True)
            # A view with the rows, or columns, in front.
            rows = self.data.movedim(2 + axis, 0)
            for row in range(width):
                for open_, at, mirrored in ((sides[0], row, 2 * width - row), (sides[1], ~row, ~(2 * width - row))):
                    if open_ and border == "reflect":
                        rows[at] = rows[mirrored]
                    elif open_:
                        rows[at].zero_()

    def last(self, count: int) -> Tensor:
        """The last frames of e, zeros where there are too few."""
        if self.shift == 0:
            zeros = [0, 0] * 3 + [count - 1, 0]
            return F.pad(self.data, zeros)
        if self.taps == 1:
            return self.data[:, -count:]
        return self.data[:, -1].unflatten(-1, (self.taps, -1))[..., -count:, :].movedim(-2, 1)

    def _inner(self) -> Tensor:
        """The data without borders."""
        rows, columns = self.inset
        return self.data[:, :, rows : self.data.shape[2] - rows, columns : self.data.shape[3] - columns]

    def _end(self) -> int:
        """How many frames e has."""
        return self.data.shape[1] * self.stride + self.taps - self.stride

    def _meet(self, strip: Strip, end: int) -> tuple[bool, bool]:
        """Fill in what the neighbours of a strip have next to it in the piece; whether there is one at either side."""
        axis, other, width = 2 + strip.along, 3 - strip.along, self.inset[strip.along]
        border = self.inset[1 - strip.along]
        lines = self.data.narrow(other, border, self.data.shape[other] - 2 * border)
        size = lines.shape[axis] - 2 * width
        if end > self.shift:
            first, last = (self._taken(lines.narrow(axis, at, width), end) for at in (width, size))
            for at, found in zip((0, width + size), strip.beside(first, last), strict=True):
                if found is not None:
                    self._place(lines.narrow(axis, at, width), found, self.shift)
        return strip.neighbours

    def _taken(self, data: Tensor, end: int) -> Tensor:
        """The frames of the piece, e[shift] to e[end - 1], out of their slots; strides of one only."""
        slots = data.unflatten(-1, (self.taps, -1))
        whole = min(end, slots.shape[1])
        frames = slots[:, self.shift : whole, :, :, 0]
        if end == whole:
            return frames
        # The last ones stand beside the last that has a place of its own.
        rest = slots[:, -1, :, :, max(self.shift - whole + 1, 1) : end - whole + 1].movedim(3, 1)
        return torch.cat([frames, rest], 1)

    def _frame(self, index: int) -> Tensor:
        """Frame e[index] as (B, 1, H, W, C), from one of the slots that hold it; strides of one only."""
        tap = max(index - self.data.shape[1] + 1, 0)
        return self.data.unflatten(-1, (self.taps, -1))[:, index - tap : index - tap + 1, :, :, tap]

    def _place(self, data: Tensor, frames_BTHWC: Tensor, start: int) -> None:
        """Write frames that are e[start], e[start + 1], ... into every slot that holds them; a rehearsal has no numbers
        to write."""
        if data.is_meta:
            return
        slots, stride = data.unflatten(-1, (self.taps, -1)), self.stride
        for tap in range(self.taps):
            # Slot `tap` of frame t is e[t * stride + tap].
            first = max(-(-(start - tap) // stride), 0)
            found = frames_BTHWC[:, first * stride + tap - start :: stride][:, : max(slots.shape[1] - first, 0)]
            copy_rows(slots[:, first : first + found.shape[1], :, :, tap], found)


class Convolved(NamedTuple):
    """A convolution's result. Where kernels are fused its bias is left for the kernel that reads the result next, which
    saves a pass over memory."""

    value: Tensor
    bias: Tensor | None

    def settled(self) -> Tensor:
        """The result with its bias."""
        return self.value if self.bias is None else self.value.add_(self.bias.view(-1, 1, 1, 1))

    def plus(self, other: Tensor) -> Tensor:
        """The sum with another feature map, in the place of the result."""
        rows = rows_of(self.value)
        if self.bias is None or not rows.is_contiguous():
            return self.settled().add_(other)
        from fastvideo_vae_core.ops.kernels.rms_norm import add_

        add_(rows, self.bias, rows_of(other))
        return self.value

    def plus_late(self, other: Tensor, layer: nn.Module, cache: Cache) -> Tensor:
        """The sum with a feature map of which this result has not reached the end yet; what is not needed yet waits in
        the cache under the name of the layer."""
        waiting, frames = cache.take(layer), self.value.shape[2]
        if waiting is None and frames == other.shape[2]:
            return self.plus(other)
        early = 0 if waiting is None else waiting.shape[1]
        if waiting is not None and min(early, frames):
            Convolved(self.value[:, :, :early], self.bias).plus(waiting.movedim(-1, 1)[:, :, :frames])
        if frames > early:
            Convolved(self.value[:, :, early:], self.bias).plus(other[:, :, : frames - early])
        if not cache.last:
            left = rows_of(other)[:, max(frames - early, 0) :]
            if waiting is not None and early > frames:
                left = torch.cat([waiting[:, frames:], left], 1)
            cache.keep(layer, left)
        return self.value


def norm_silu_conv(
    x: Tensor | Convolved,
    norm: RMSNorm | PixelNorm,
    conv: CausalConv3d,
    cache: Cache,
    modulation: Modulation | None = None,
) -> Convolved:
    """conv(silu(norm(x))). The activation is written straight into the window that the convolution reads.

    modulation: what a pixel norm is followed by, for each item of the batch.
    """
    value, bias = x if isinstance(x, Convolved) else (x, None)
    if value.shape[2] == 0 and not cache.last:
        return Convolved(conv(value, cache), None)
    window = conv.window(value, cache)
    fuses = cache.fuses(value, conv)
    if not fuses:
        window.write(norm.silu(rows_of(value), modulation))
    elif value.shape[2]:
        from fastvideo_vae_core.ops.kernels.rms_norm import norm_silu_into

        norm_silu_into(
            window.data,
            rows_of(value),
            norm.scale,
            bias,
            taps=window.taps,
            shift=window.shift,
            inset=window.inset,
            eps=norm.eps,
            modulation=modulation,
        )
    # What the window was made from is not needed during the convolution.
    del x, value
    made = conv.convolve(window, cache, None if fuses else conv.bias)
    return Convolved(made.contiguous(memory_format=torch.channels_last_3d), conv.bias if fuses else None)


def stacks(channels: int, kernel: tuple[int, int, int]) -> bool:
    """Whether windows of frames side by side are faster than a 3-D convolution, for that many input channels.

    Measured, in TFLOP/s of an H100 in bfloat16 with channels innermost, 3-D against side by side: 96 channels 247, 525;
    384 channels 586, 790; but 160 channels 509, 440; 192 channels 600, 525. On a CPU in float32, in GFLOP/s of two
    cores: 16 channels 7, 43; 64 channels 21, 118; 96 channels 202, 229; from 192 on they are alike.
    """
    return kernel[1:] == (1, 1) or channels <= 128 or channels == 384


def formulation(network: nn.Module, device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """For people: how the convolutions and norms of a network are computed on that device in that type."""
    convs = [each for each in network.modules() if isinstance(each, CausalConv3d) and each.kernel_size[1:] != (1, 1)]
    widths = sorted({each.in_channels for each in convs if each.stacked})
    notes = []
    if widths:
        notes.append(f"convolutions of {', '.join(map(str, widths))} channels in 2-D over frames side by side")
    if device.type == "cuda" and _HAS_TRITON and dtype != torch.float64:
        notes.append("norm, SiLU and the input of the next convolution in one kernel")
    return tuple(notes)


def rows_of(x_BCTHW: Tensor) -> Tensor:
    """(B, T, H, W, C): a view of the same memory, channels innermost."""
    return x_BCTHW.movedim(1, -1)


def stack(x_BTHWC: Tensor) -> Tensor:
    """Frames as the items of a batch (B * T, C, H, W), for 2-D operations; a view."""
    return x_BTHWC.flatten(0, 1).movedim(-1, 1)


def unstack(y_NCHW: Tensor, like_BTHWC: Tensor) -> Tensor:
    """(B, C, T, H, W) from the frames of a batch of videos like the given one; a view."""
    return y_NCHW.unflatten(0, like_BTHWC.shape[:2]).transpose(1, 2)


_HAS_TRITON = importlib.util.find_spec("triton") is not None
