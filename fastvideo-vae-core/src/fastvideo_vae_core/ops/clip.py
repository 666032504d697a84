"""Causal convolutions with repeated borders, over a whole clip that is there only once.

Where normalisations span the clip, every feature map has to exist as a whole before the next layer can begin. Here it
is a list of pieces of frames, and a layer releases each piece as it reads it; only windows and results of single pieces
exist beside it.

Shape legend: B batch, C channels, T frames, H, W. Pieces are (B, C, T, H, W). Where kernels are fused their channels
lie innermost in memory (`torch.channels_last_3d`).
"""

from __future__ import annotations

import importlib.util
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvideo_vae_core.ops import taps
from fastvideo_vae_core.ops.causal import Window, rows_of, stack, stacks, unstack
from fastvideo_vae_core.ops.norm import Moments, group_norm_act
from fastvideo_vae_core.ops.upsampling import folded, spread, upsampled_frame
from fastvideo_vae_core.rehearsal import device_of


@dataclass(frozen=True)
class Run:
    """How one call goes through a network.

    Attributes:
        device: where it runs; that of the tensors, but for a rehearsal on the meta device.
        numbers: the most numbers of an item that a convolution reads or makes at a time; None: no bound.
        passed: called behind each convolution.
        folded: the convolution of repeated positions that ran last, for the tiles of a step, which it runs for one by
            one.
    """

    device: torch.device
    numbers: int | None = None
    passed: Callable[[], object] = lambda: None
    folded: list[_FoldedConv] = field(default_factory=list, repr=False, compare=False)

    def fuses(self, x: Tensor, weight: Tensor) -> bool:
        """Whether the kernels of this device are to be used, rather than the definitions."""
        differentiates = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        return self.defers(x) and not differentiates

    def defers(self, x: Tensor) -> bool:
        """Whether biases of convolutions of that type are left to whoever reads next."""
        return self.device.type == "cuda" and _HAS_TRITON and x.dtype in _FUSED

    def merges_frames(self, x: Tensor) -> bool:
        """Whether statistics are those of single frames, merged: in float32 on a GPU, where the last bit of a mean
        shows in all that follows, so that pieces of any number of frames have the same."""
        return (
            self.device.type == "cuda"
            and x.dtype == torch.float32
            and not (torch.is_grad_enabled() and x.requires_grad)
        )


def formulation(device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """For people: how convolutions and norms are computed on that device in that type."""
    if device.type == "cuda" and _HAS_TRITON and dtype in _FUSED:
        return ("norm, SiLU and the input of the next convolution in one kernel; upsampling folded into convolutions",)
    return ()


@dataclass
class Clip:
    """The feature map of a whole clip, in pieces that go when they are read.

    Attributes:
        pieces: (B, C, T, H, W) each, one behind the other in time.
        bias: of each channel, which is still to be added by who reads the pieces; it saves a pass over memory.
    """

    pieces: list[Tensor]
    bias: Tensor | None = None

    def joined(self) -> Tensor:
        """The feature map in one tensor; the clip is empty afterwards."""
        pieces, self.pieces = self.pieces, []
        if self.bias is not None:
            # Pieces with a pending bias are new and belong to nobody else.
            pieces = [piece.add_(self.bias.view(-1, 1, 1, 1)) for piece in pieces]
        if len(pieces) == 1:
            return pieces[0]
        if all(rows_of(piece).is_contiguous() for piece in pieces):
            # One behind the other in memory, which needs no index of each number.
            return torch.cat([rows_of(piece) for piece in pieces], 1).movedim(-1, 1)
        return torch.cat(pieces, 2)

    def moments(self, norm: nn.GroupNorm, run: Run) -> Moments | None:
        """Statistics of the whole clip for a norm. None where the whole will be normalised in one go, which takes them
        itself."""
        fuses = run.fuses(self.pieces[0], norm.weight)
        framewise = run.merges_frames(self.pieces[0])
        if len(self.pieces) == 1 and run.numbers is None and not fuses and not framewise:
            return None
        parts = [part for piece in self.pieces for part in (piece.split(1, 2) if framewise else (piece,))]
        return Moments.merged([self._moments_of(part, norm.num_groups, fuses) for part in parts])

    def _moments_of(self, piece: Tensor, groups: int, fuses: bool) -> Moments:
        if not fuses:
            return Moments.of(piece if self.bias is None else piece + self.bias.view(-1, 1, 1, 1), groups)
        # Imported here because Triton takes a second to import and only GPUs need it.
        from fastvideo_vae_core.ops.kernels.group_norm import moments

        return moments(piece.contiguous(memory_format=torch.channels_last_3d), groups, self.bias)


class Reading(NamedTuple):
    """What a convolution sees of the pieces of a clip: silu(norm(piece + bias)), or without a norm the positions of the
    piece, repeated.

    Attributes:
        moments: of the whole clip; None: the piece is the whole.
        repeats: how often each frame, row and column comes. The first frame of a clip comes once.
        inner: whether the rows, and the columns, of the clip go on beyond what the convolution is wanted of, so that
            nothing stands around them.
    """

    norm: nn.GroupNorm | None = None
    moments: Moments | None = None
    bias: Tensor | None = None
    repeats: tuple[int, int, int] = (1, 1, 1)
    inner: tuple[bool, bool] = (False, False)

    def borders(self, border: int) -> tuple[int, int]:
        """How often the nearest position is repeated beyond rows and columns, for a convolution that sees so far."""
        rows, columns = self.inner
        return 0 if rows else border, 0 if columns else border

    def fuses(self, piece: Tensor, run: Run) -> bool:
        """Whether a kernel can do it."""
        if self.norm is None:
            return self.repeats == (1, 1, 1)
        return self.moments is not None and run.fuses(piece, self.norm.weight)

    def of(self, piece: Tensor, first: bool) -> Tensor:
        """The definition."""
        if self.bias is not None:
            piece = piece + self.bias.view(-1, 1, 1, 1)
        if self.norm is not None:
            return group_norm_act(piece, self.norm, F.silu, self.moments)
        return repeated(piece, self.repeats, first)

    def affine(self) -> tuple[Tensor, Tensor] | None:
        """The norm behind the bias as y = x * scale + offset, float32 (B, C) each."""
        if self.norm is None:
            return None
        assert self.moments is not None
        return self.moments.affine(self.norm, torch.float32, self.bias)


# What convolutions have in front of them between calls that continue one another, see `convolved`.
Memory = dict[nn.Module, "_Passing"]


class CausalConv(nn.Module):
    """A convolution whose output frame sees no later input frame. Beyond the borders, and before the first frame, the
    nearest position is repeated.

    (B, C, T, H, W) -> (B, O, ceil(T / stride), ceil(H / stride), ceil(W / stride)). Parameters lie under `conv`, as in
    diffusers. `convolved` runs it over a clip.
    """

    def __init__(self, before: int, after: int, kernel: int = 3, stride: tuple[int, int, int] = (1, 1, 1)) -> None:
        super().__init__()
        self.conv = nn.Conv3d(before, after, kernel, stride)
        self.taps = kernel
        self.border = kernel // 2
        # Frames that lie side by side in the channels of a fused window, see `ops.causal.stacks`. Of 128 channels a 3-D
        # convolution is as fast, and its window a third.
        self.slots = kernel if stride[0] == 1 and before < 128 and stacks(before, (kernel,) * 3) else 1

    @property
    def weight(self) -> Tensor:
        """(O, C, K, 3, 3)."""
        return self.conv.weight

    def forward(self, data: Tensor, weight: Tensor, bias: Tensor | None, fused: bool, run: Run) -> Tensor:
        """The frames that a window, with its borders, is enough for.

        weight: the convolution's, with its taps in the order in which the frames lie there.
        """
        conv = self.conv
        if not fused and taps.takes(run.device, data, conv, any_shape=True):
            if max(conv.stride) > 1:
                made = taps.strided(data, weight, conv.stride)
            else:
                # Contiguous, because all that follows would copy it.
                made = taps.convolved(data, weight).contiguous()
            return made if bias is None else made.add_(bias.view(-1, 1, 1, 1))
        if not fused:
            return F.conv3d(data, weight, bias, conv.stride)
        if self.slots == 1:
            made = F.conv3d(data.movedim(-1, 1), weight, bias, conv.stride)
        else:
            made = F.conv2d(stack(data), weight.transpose(1, 2).flatten(1, 2), bias, conv.stride[1:])
        made = made if self.slots == 1 else unstack(made, data)
        return made.contiguous(memory_format=torch.channels_last_3d)

    def frames(self, x: Tensor, repeats: tuple[int, int, int], run: Run) -> int:
        """How many frames of x it takes at a time."""
        if run.numbers is None:
            return x.shape[2]
        height, width = x.shape[3] * repeats[1], x.shape[4] * repeats[2]
        wanted = run.numbers // (height * width * max(self.conv.in_channels, self.conv.out_channels))
        # Libraries count the numbers of a window in 32 bits.
        frame = x.shape[0] * (height + 2 * self.border) * (width + 2 * self.border) * self.conv.in_channels
        most = ((1 << 31) - 1) // (frame * self.slots) - (self.taps - self.slots)
        return max(min(wanted, most) // repeats[0], 1)


class Pointwise(nn.Module):
    """A linear map of the channels of each position. Parameters lie under `conv`, as in diffusers."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(before, after, 1)

    def forward(self, x: Tensor) -> Tensor:
        rows = rows_of(x)
        if rows.stride(-1) == 1 and x.stride(-1) != 1:
            return F.linear(rows, self.conv.weight.flatten(1), self.conv.bias).movedim(-1, 1)
        if taps.takes(device_of(x), x, self.conv, any_shape=True):
            assert self.conv.bias is not None
            return taps.convolved(x, self.conv.weight).add_(self.conv.bias.view(-1, 1, 1, 1))
        return self.conv(x)


def convolved(
    x: Clip,
    conv: CausalConv | _FoldedConv,
    run: Run,
    reading: Reading | None = None,
    *,
    bias: bool = True,
    passed: Callable[[Tensor], object] | None = None,
    memory: Memory | None = None,
) -> Iterator[Tensor]:
    """The convolution of what it reads of a clip, piece by piece; the clip is empty afterwards.

    bias: whether to add the convolution's own.
    memory: of calls with the same reading, each with the frames that follow those of the one before.
    passed: is given each part of the clip when it has been read, before it is convolved; a convolution without stride
        gives one piece for each part.
    """
    window = None if memory is None else memory.get(conv.conv)
    if window is None:
        window = _Passing(conv, Reading() if reading is None else reading, run)
        if memory is not None:
            memory[conv.conv] = window
    while x.pieces:
        frames = conv.frames(x.pieces[0], window.reading.repeats, run)
        if memory is not None and frames <= _FEW:
            frames = 1
        parts = deque(x.pieces[0].split(frames, 2))
        del x.pieces[0]
        while parts:
            part = parts.popleft()
            window.write(part)
            if passed is not None:
                passed(part)
            # So that it can go before there is its result.
            del part
            yield from window.convolve(conv.conv.bias if bias else None)
    run.passed()


def upsampled(
    x: Clip,
    conv: CausalConv,
    run: Run,
    repeats: tuple[int, int, int],
    inner: tuple[bool, bool] = (False, False),
    memory: Memory | None = None,
) -> Iterator[Tensor]:
    """The convolution of a clip whose positions are repeated, piece by piece; the clip is empty afterwards. Of the
    first frame there is one.

    repeats: 1 or 2 for frames, rows and columns.
    inner: see `Reading`; what the first and the last position become is missing there, where kernels are fused.
    memory: see `convolved`.
    """
    if not run.fuses(x.pieces[0], conv.conv.weight):
        yield from convolved(x, conv, run, Reading(repeats=repeats), memory=memory)
        return
    surplus = repeats[0] - 1 if memory is None or conv.conv not in memory else 0
    for piece in convolved(x, _folded_conv(conv, repeats, run), run, Reading(inner=inner), memory=memory):
        yield piece[:, :, surplus:]
        surplus = 0


class _FoldedConv:
    """A convolution of repeated positions, on the positions themselves."""

    slots = 1

    def __init__(self, conv: CausalConv, repeats: tuple[int, int, int]) -> None:
        self.conv, self.border, self.repeats = conv.conv, conv.border, repeats
        self._plain = conv
        self.weight = folded(self.conv.weight, repeats, causal=True)
        self.taps = self.weight.shape[2]

    def __call__(self, data: Tensor, weight: Tensor, bias: Tensor | None, fused: bool, run: Run) -> Tensor:
        """The frames that a window, with its borders, is enough for; in front of the first one there is another."""
        window = data.movedim(-1, 1)
        if window.shape[2] == self.taps:
            return upsampled_frame(window, weight, self.repeats, bias)
        return spread(rows_of(F.conv3d(window, weight)), self.repeats, bias, causal=True).movedim(-1, 1)

    def frames(self, x: Tensor, repeats: tuple[int, int, int], run: Run) -> int:
        """How many frames of x it takes at a time."""
        return self._plain.frames(x, self.repeats, run)


def _folded_conv(conv: CausalConv, repeats: tuple[int, int, int], run: Run) -> _FoldedConv:
    """The one that ran last, if it is that one."""
    if not run.folded or (run.folded[0].conv, run.folded[0].repeats) != (conv.conv, repeats):
        # The old one goes before the new one comes.
        run.folded.clear()
        run.folded.append(_FoldedConv(conv, repeats))
    return run.folded[0]


def repeated(x: Tensor, repeats: tuple[int, int, int], first: bool) -> Tensor:
    """Each position of x (B, C, T, H, W) repeated, of the first frame of a clip only the rows and columns."""
    if repeats == (1, 1, 1):
        return x
    time, height, width = repeats
    batch, channels, frames = x.shape[:3]
    cells = x[:, :, :, None, :, None, :, None].expand(-1, -1, -1, time, -1, height, -1, width)
    y = cells.reshape(batch, channels, frames * time, x.shape[3] * height, x.shape[4] * width)
    return y[:, :, time - 1 :] if first else y


class _Passing:
    """What a convolution has in front of it while a clip passes by: the frames that it still needs, then those of a
    part, all with their borders.

    The definition has them as (B, C, F, H, W), kernels as `ops.causal.Window`, in memory that is used again and again.
    For as long as parts have one frame each that memory is a ring of as many frames as the convolution has taps: each
    frame takes the place of the oldest, and the taps are turned instead of moving those that stay.
    """

    def __init__(self, conv: CausalConv | _FoldedConv, reading: Reading, run: Run) -> None:
        self.conv, self.reading, self.run = conv, reading, run
        self._data: Tensor | Window | None = None
        self._held: Tensor | None = None
        self._room: Tensor | None = None
        # How many frames the last window had there.
        self._last = 0
        self._affine: tuple[Tensor, Tensor] | None = None
        # Where the oldest frame of a ring is, and the weights for each such place, as convolutions read them.
        self._oldest: int | None = None
        self._turned: dict[int, Tensor] = {}

    def write(self, part: Tensor) -> None:
        """Put a part behind the frames that are still needed."""
        if self.run.fuses(part, self.conv.conv.weight) and self.reading.fuses(part, self.run):
            self._data = self._filled(part)
            return
        before, (rows, columns) = (
            self.conv.taps - 1 if self._held is None else 0,
            self.reading.borders(self.conv.border),
        )
        around = [columns, columns, rows, rows, before, 0]
        made = F.pad(self.reading.of(part, self._held is None), around, mode="replicate")
        self._data = made if self._held is None else torch.cat([self._held, made], 2)

    def convolve(self, bias: Tensor | None) -> Iterator[Tensor]:
        """What the window is enough for; frames that are not needed any more go."""
        data, taps, stride = self._data, self.conv.taps, self.conv.conv.stride[0]
        self._data = None
        assert data is not None
        if self._oldest is not None:
            assert isinstance(data, Window)
            yield self.conv(data.data, self._weight(self._oldest), bias, True, self.run)
            return
        frames = data.data.shape[1] + data.taps - 1 if isinstance(data, Window) else data.shape[2]
        count = max((frames - taps) // stride + 1, 0)
        left = frames - count * stride
        if isinstance(data, Window):
            made = self.conv(data.data, self.conv.weight, bias, True, self.run) if count else None
            self._held = data.last(left)
        else:
            made = self.conv(data, self.conv.weight, bias, False, self.run) if count else None
            self._held = data[:, :, -left:].clone()
        del data
        if made is not None:
            yield made

    def _filled(self, part: Tensor) -> Window:
        conv = self.conv
        borders = self.reading.borders(conv.border)
        sizes = [size + 2 * border for size, border in zip(part.shape[3:], borders, strict=True)]
        window, lead = self._ring(part, sizes) if self._turns(part) else self._behind_held(part, sizes)
        if self._affine is None:
            self._affine = self.reading.affine()
        from fastvideo_vae_core.ops.kernels.clip import fill

        rows = rows_of(part.contiguous(memory_format=torch.channels_last_3d))
        fill(window, rows, self._affine, lead=lead, borders=borders)
        return window

    def _turns(self, part: Tensor) -> bool:
        """Whether a part goes into a ring, which it leaves for good where it has several frames."""
        if part.shape[2] == 1 and self.conv.slots == 1 and self.conv.conv.stride[0] == 1:
            return self._oldest is not None or self._room is None
        if self._oldest is not None and self._room is not None:
            self._held = self._room.roll(-self._oldest, 1)[:, 1:]
            self._room = self._oldest = None
        return False

    def _ring(self, part: Tensor, sizes: Sequence[int]) -> tuple[Window, int]:
        """Room for a part of one frame, in the place of the oldest; and how often it comes in front of itself."""
        taps = self.conv.taps
        if self._oldest is None or self._room is None:
            self._room, self._oldest = part.new_empty(len(part), taps, *sizes, part.shape[1]), 0
            return Window(self._room, taps=1, shift=taps - 1, stride=1), taps - 1
        at, self._oldest = self._oldest, (self._oldest + 1) % taps
        return Window(self._room, taps=1, shift=at, stride=1), 0

    def _weight(self, oldest: int) -> Tensor:
        """The weight for a ring whose oldest frame is there."""
        if oldest not in self._turned:
            weight = self.conv.weight.roll(oldest, 2) if oldest else self.conv.weight
            self._turned[oldest] = weight.contiguous(memory_format=torch.channels_last_3d)
        return self._turned[oldest]

    def _behind_held(self, part: Tensor, sizes: Sequence[int]) -> tuple[Window, int]:
        """Room for a part behind the frames that are held, which are in it; and how often its first frame comes in
        front of itself, where there are none."""
        conv, held = self.conv, self._held
        batch, channels, frames = part.shape[:3]
        lead = conv.taps - 1 if held is None else 0
        shift = lead if held is None else held.shape[1]
        shape = (batch, shift + frames - conv.slots + 1, *sizes, conv.slots * channels)
        room = self._room
        if room is None or batch > 1 or room.shape[1] < shape[1]:
            # The frames that are held lie there.
            held = None if held is None else held.clone()
            self._room = self._held = room = None
            self._room = room = part.new_empty(shape)
        elif held is not None and (conv.slots > 1 or 2 * shift > self._last):
            held = held.clone()
        self._held, self._last = None, shape[1]
        window = Window(room[:, : shape[1]], taps=conv.slots, shift=shift, stride=1)
        if held is not None:
            window.remember(held)
        return window, lead


# Frames that are so large that no more than these are convolved at a time come one by one where calls continue one
# another: in a ring nothing has to be moved.
_FEW = 4
_FUSED = (torch.float16, torch.bfloat16)
_HAS_TRITON = importlib.util.find_spec("triton") is not None
