"""Where the time of the Wan autoencoders goes on a GPU: end to end beside diffusers, then layer by layer.

Run from the repository's root; with `--seconds` it leaves out what no longer fits. Every part stands for itself: one
that fails says so, and the others go on. `fastvideo_vae_core.ops.causal.stacks` follows the table of convolutions.
"""

# ruff: noqa: B023 - functions are timed where they are made, before the loop goes on.

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench_tools import Options, attempt, busiest, cudnn_benchmark, error, measure, run_parts, timed
from fastvideo_vae_core.config import VAEConfig
from fastvideo_vae_core.ops.causal import Cache, CausalConv3d, norm_silu_conv
from fastvideo_vae_core.ops.rms_norm import RMSNorm, rms_norm_silu
from fastvideo_vae_wan.config import WAN21, WAN22, WanArchConfig
from fastvideo_vae_wan.model import AutoencoderKLWan

BF16 = torch.bfloat16

# Input and output channels, frames, height, width: the layers that take the time, at 480 x 832 and 704 x 1280.
CONVOLUTIONS = [
    (96, 96, 4, 480, 832),
    (96, 96, 8, 480, 832),
    (96, 3, 4, 480, 832),
    (3, 96, 4, 480, 832),
    (96, 192, 4, 240, 416),
    (192, 192, 4, 240, 416),
    (192, 192, 8, 240, 416),
    (192, 384, 4, 120, 208),
    (384, 384, 4, 120, 208),
    (384, 384, 2, 60, 104),
    (384, 384, 4, 60, 104),
    (16, 384, 4, 60, 104),
    (256, 256, 4, 352, 640),
    (512, 256, 4, 352, 640),
    (256, 12, 4, 352, 640),
    (12, 160, 4, 352, 640),
    (160, 160, 4, 352, 640),
    (512, 512, 4, 176, 320),
    (1024, 512, 4, 176, 320),
    (320, 320, 4, 176, 320),
    (640, 640, 4, 88, 160),
    (1024, 1024, 4, 88, 160),
    (1024, 1024, 2, 44, 80),
    (1024, 1024, 1, 44, 80),
]


def main() -> None:
    parts: dict[str, Callable[[Options], None]] = {
        "accuracy": accuracy,
        "wan21": lambda options: end_to_end(options, WAN21, (21, 60, 104), (1, 2, 3, 4)),
        "profile": profile,
        "convolutions": convolutions,
        "wan22": lambda options: end_to_end(options, WAN22, (31, 44, 80), (1, 2)),
        "norms": norms,
        "resampling": resampling,
        "attention": attention,
        "blocks": blocks,
    }
    run_parts(__doc__, parts)


def accuracy(options: Options) -> None:
    """Both sides' bfloat16 against diffusers' float32, relative."""
    for name, arch in (("wan2.1", WAN21), ("wan2.2", WAN22)):
        model, twin = pair(small(arch) if options.small else arch, options.device, torch.float32)
        grid = (2, 2, 3) if options.small else (4, 12, 20)
        z = torch.randn(1, arch.z_dim, *grid, device=options.device)
        x = torch.rand(model.decoded_shape(z.shape), device=options.device) * 2 - 1
        exact = {"decode": twin.decode(z).sample, "encode": twin.encode(x).latent_dist.mean}
        ours32 = {"decode": model.decode(z).sample, "encode": model.encode(x).latent_dist.mean}
        model, twin = model.to(BF16), twin.to(BF16)
        ours = {"decode": model.decode(z).sample, "encode": model.encode(x).latent_dist.mean}
        theirs = {"decode": twin.decode(z.to(BF16)).sample, "encode": twin.encode(x.to(BF16)).latent_dist.mean}
        for each in exact:
            print(
                f"{name} {each}: float32 {error(ours32[each], exact[each]):.1e}; bfloat16 ours"
                f" {error(ours[each], exact[each]):.2e}, diffusers {error(theirs[each], exact[each]):.2e}"
            )


def end_to_end(options: Options, arch: WanArchConfig, grid: tuple[int, int, int], chunks: tuple[int, ...]) -> None:
    """Times and peak memory in bfloat16, beside diffusers."""
    if options.small:
        arch, grid = small(arch), (3, 2, 3)
    model, twin = pair(arch, options.device, BF16)
    z = torch.randn(1, arch.z_dim, *grid, device=options.device, dtype=BF16)
    shape = model.decoded_shape(z.shape)
    print(
        f"{tuple(z.shape)} <-> {shape}; chosen: decode {model.plan_decode(z.shape).chunk} latents a piece,"
        f" encode {model.plan_encode(shape).chunk}"
    )
    measure("diffusers decode", lambda: twin.decode(z).sample, runs=1)
    for benchmark in (False, True):
        with cudnn_benchmark(benchmark):
            for chunk in chunks if not benchmark else chunks[1:2]:
                plan = model.plan_decode(z.shape, chunk=chunk)
                measure(f"ours decode chunk {chunk} benchmark {benchmark}", partial(model.decode, z, plan=plan))
    x = torch.rand(shape, device=options.device, dtype=BF16) * 2 - 1
    measure("diffusers encode", lambda: twin.encode(x).latent_dist.mean, runs=1)
    for benchmark in (False, True):
        with cudnn_benchmark(benchmark):
            for chunk in chunks if not benchmark else chunks[1:2]:
                plan = model.plan_encode(x.shape, chunk=chunk)
                measure(f"ours encode chunk {chunk} benchmark {benchmark}", partial(model.encode, x, plan=plan))


def profile(options: Options) -> None:
    """What the kernels of a Wan 2.1 decode, and of an encode, sum up to."""
    arch, grid = (small(WAN21), (3, 2, 3)) if options.small else (WAN21, (9, 60, 104))
    model, _ = pair(arch, options.device, BF16, twin=False)
    z = torch.randn(1, arch.z_dim, *grid, device=options.device, dtype=BF16)
    x = torch.rand(model.decoded_shape(z.shape), device=options.device, dtype=BF16) * 2 - 1
    busiest(f"decode of {grid[0]} latents", lambda: model.decode(z))
    busiest("encode of the same", lambda: model.encode(x))


def convolutions(options: Options) -> None:
    """Milliseconds of one 3 x 3 x 3 convolution in each formulation, without bias; TFLOP/s of the best."""
    heading = ("conv3d", "stacked", "taps", "conv3d*", "stacked*", "taps*", "+bias")
    print(f"{'channels, frames, grid':28}" + "".join(f"{each:>10}" for each in heading) + "   best  (* benchmark)")
    for before, after, frames, height, width in CONVOLUTIONS:
        if options.late():
            print("left out: no time")
            return
        if options.small:
            height, width, frames = 8, 8, 2
        make = {"device": options.device, "dtype": BF16}
        line = torch.randn(1, frames + 2, height, width, before, **make)
        side = torch.randn(frames, height, width, 3 * before, **make).movedim(-1, 1)
        weight = torch.randn(after, before, 3, 3, 3, **make)
        deep = weight.contiguous(memory_format=torch.channels_last_3d)
        flat = weight.transpose(1, 2).flatten(1, 2).contiguous(memory_format=torch.channels_last)
        taps = [weight[:, :, each].contiguous(memory_format=torch.channels_last) for each in range(3)]
        bias = torch.randn(after, **make)

        def three(line: Tensor = line, taps: list[Tensor] = taps, frames: int = frames) -> Tensor:
            y = F.conv2d(line[0, :frames].movedim(-1, 1), taps[0], padding=1)
            for each in (1, 2):
                y += F.conv2d(line[0, each : each + frames].movedim(-1, 1), taps[each], padding=1)
            return y

        ways: list[Callable[[], Tensor]] = [
            partial(F.conv3d, line.movedim(-1, 1), deep, padding=(0, 1, 1)),
            partial(F.conv2d, side, flat, padding=1),
            three,
        ]
        times = []
        for benchmark in (False, True):
            with cudnn_benchmark(benchmark):
                times += [attempt(way) for way in ways]
        times.append(attempt(partial(F.conv3d, line.movedim(-1, 1), deep, bias, padding=(0, 1, 1))))
        work = 2 * 27 * before * after * frames * height * width
        name = f"{before}->{after} {frames}x{height}x{width}"
        print(
            f"{name:28}" + "".join(f"{each:10.3f}" for each in times) + f"{work / min(times[:6]) / 1e9:7.0f}",
            flush=True,
        )


def norms(options: Options) -> None:
    """The norm kernel into both kinds of windows, in TB/s of what it must move, for sizes of its tile."""
    from fastvideo_vae_core.ops.kernels import rms_norm as kernels

    for channels, height, width in ((96, 480, 832), (192, 240, 416), (384, 120, 208), (256, 352, 640), (1024, 88, 160)):
        x = torch.randn(1, 4, height, width, channels, device=options.device, dtype=BF16)
        gamma, bias = torch.randn(2, channels, device=options.device, dtype=BF16)
        for taps, out in (
            (1, x.new_empty(1, 6, height, width, channels)),
            (3, x.new_empty(1, 4, height, width, 3 * channels)),
        ):
            moved = x.numel() * 2 + (4 * (1 if taps == 1 else 3) - (0 if taps == 1 else 3)) * x[0, 0].numel() * 2
            text = []
            for tile in (2048, 4096, 8192, 16384):
                kernels._TILE = tile
                spent = timed(lambda: kernels.norm_silu_into(out, x, gamma, bias, taps=taps, shift=2))
                text.append(f"{tile}: {spent:.3f} ms {moved / spent / 1e9:.2f}")
            print(f"norm {channels} {height}x{width} taps {taps}   " + "   ".join(text), flush=True)
        kernels._TILE = 4096
        want = rms_norm_silu((x[0, 3].double() + bias.double()), gamma.double())
        print(f"  error {error(out[0, 3, ..., 2 * channels :], want):.1e}")
        y = x.clone()
        spent = timed(lambda: kernels.add_(y, bias, x))
        print(
            f"  add {spent:.3f} ms {6 * x.numel() / spent / 1e9:.2f} TB/s; torch {timed(lambda: y.add_(x)):.3f} ms;"
            f" plain norm+silu {timed(lambda: rms_norm_silu(x, gamma)):.3f} ms"
        )


def resampling(options: Options) -> None:
    """Ways to do the small things between the convolutions."""
    make = {"device": options.device, "dtype": BF16}
    for before, after, height, width in ((384, 192, 120, 208), (192, 96, 240, 416), (1024, 1024, 88, 160)):
        x = torch.randn(8, height, width, before, **make).movedim(-1, 1)
        weight = torch.randn(after, before, 3, 3, **make).contiguous(memory_format=torch.channels_last)
        up = F.interpolate(x, scale_factor=2.0)
        rows = x.movedim(1, -1)
        ways = {
            "interpolate": lambda: F.interpolate(x, scale_factor=2.0),
            "exact": lambda: F.interpolate(x, scale_factor=2.0, mode="nearest-exact"),
            "expand": lambda: rows[:, :, None, :, None].expand(-1, -1, 2, -1, 2, -1).reshape(8, 2 * height, -1, before),
            "conv": lambda: F.conv2d(up, weight, padding=1),
        }
        print(f"up {before} {height}x{width} x 8: {listed(ways)}", flush=True)
    for channels, height, width in ((96, 480, 832), (192, 240, 416), (384, 120, 208)):
        x = torch.randn(8, height, width, channels, **make).movedim(-1, 1)
        weight = torch.randn(channels, channels, 3, 3, **make).contiguous(memory_format=torch.channels_last)
        last = torch.channels_last
        ways = {
            "pad": lambda: F.pad(x, (0, 1, 0, 1)),
            "pad and conv": lambda: F.conv2d(F.pad(x, (0, 1, 0, 1)), weight, stride=2),
            "conv and cut": lambda: F.conv2d(x, weight, stride=2, padding=2)[:, :, 1:, 1:].contiguous(
                memory_format=last
            ),
        }
        print(f"down {channels} {height}x{width} x 8: {listed(ways)}", flush=True)
    for channels, height, width in ((384, 60, 104), (384, 120, 208), (1024, 44, 80)):
        rows = torch.randn(4, height, width, 3 * channels, **make)
        line = torch.randn(1, 6, height, width, channels, **make).movedim(-1, 1)
        weight = torch.randn(2 * channels, 3 * channels, **make)
        deep = weight.view(2 * channels, 3, channels).transpose(1, 2)[..., None, None]
        deep = deep.contiguous(memory_format=torch.channels_last_3d)
        ways = {"linear": lambda: F.linear(rows, weight), "conv3d": lambda: F.conv3d(line, deep)}
        print(f"time {channels} {height}x{width} x 4: {listed(ways)}", flush=True)


def attention(options: Options) -> None:
    """One head over a frame, four frames: kernels of PyTorch, and the two products with a softmax between."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    for channels, positions in ((384, 60 * 104), (384, 90 * 160), (1024, 44 * 80)):
        q, k, v = torch.randn(3, 1, 4, positions, channels, device=options.device, dtype=BF16)
        text = [f"default {attempt(lambda: F.scaled_dot_product_attention(q, k, v)):.3f}"]
        for backend in (
            SDPBackend.FLASH_ATTENTION,
            SDPBackend.EFFICIENT_ATTENTION,
            SDPBackend.CUDNN_ATTENTION,
            SDPBackend.MATH,
        ):
            with sdpa_kernel(backend):
                text.append(f"{backend.name.lower()} {attempt(lambda: F.scaled_dot_product_attention(q, k, v)):.3f}")
        scale = channels**-0.5

        def product(q: Tensor = q, k: Tensor = k, v: Tensor = v, scale: float = scale) -> Tensor:
            y = torch.empty_like(q)
            for frame in range(q.shape[1]):
                scores = (q[0, frame] * scale) @ k[0, frame].T
                y[0, frame] = scores.softmax(-1) @ v[0, frame]
            return y

        text.append(f"products {attempt(product):.3f}")
        print(f"attention {channels} x {positions}: " + ", ".join(text) + " ms", flush=True)


def blocks(options: Options) -> None:
    """Norm, SiLU and convolution as the network runs them: what the windows cost beside the convolution."""
    for channels, height, width in ((96, 480, 832), (192, 240, 416), (384, 120, 208), (256, 352, 640), (1024, 88, 160)):
        for stacked, frames in itertools.product((False, True), (4, 8)):
            norm = RMSNorm(channels, 3).to(options.device, BF16).requires_grad_(False)
            conv = CausalConv3d(channels, channels).to(options.device, BF16).requires_grad_(False)
            conv.stacked = stacked
            conv.weight.data = conv.weight.data.contiguous(memory_format=torch.channels_last_3d)
            conv.arrange()
            x = torch.randn(1, frames, height, width, channels, device=options.device, dtype=BF16).movedim(-1, 1)
            cache = Cache(x.device)
            norm_silu_conv(x, norm, conv, cache)
            spent = timed(lambda: norm_silu_conv(x, norm, conv, cache))
            work = 54 * channels**2 * frames * height * width
            print(
                f"block {channels} {frames}x{height}x{width} stacked {stacked!s:5}: {spent:.3f} ms,"
                f" {work / spent / 1e9:.0f} TFLOP/s",
                flush=True,
            )


def pair(arch: WanArchConfig, device: str, dtype: torch.dtype, twin: bool = True) -> tuple[AutoencoderKLWan, Any]:
    """Our model and diffusers' with the same random weights, near unit size at every depth."""
    with torch.device("meta"):
        model = AutoencoderKLWan(VAEConfig(arch_config=arch))
    state = {}
    generator = torch.Generator(device).manual_seed(0)
    for name, each in model.state_dict().items():
        noise = torch.randn(each.shape, generator=generator, device=device)
        fan_in = max(each[0].numel(), 1)
        scale = 0.05 if name.endswith("bias") else (0.5 if name == "decoder.conv_out.weight" else 1.0) / fan_in**0.5
        state[name] = (1 + 0.1 * noise if name.endswith("gamma") else noise * scale).to(dtype)
    model.load_state_dict(state, assign=True)
    model = model.to(device).eval().requires_grad_(False)
    if not twin:
        return model, None
    import diffusers

    config = {name: each for name, each in arch.to_dict().items() if name not in ("scaling_factor", "clip_output")}
    with torch.device("meta"):
        reference: Any = getattr(diffusers, type(model).__name__)(**config)
    reference.load_state_dict({name: each.clone() for name, each in state.items()}, assign=True)
    return model, reference.eval().requires_grad_(False)


def small(arch: WanArchConfig) -> WanArchConfig:
    return replace(arch, base_dim=8, decoder_base_dim=8 if arch.is_residual else None, num_res_blocks=1)


def listed(ways: dict[str, Callable[[], Any]]) -> str:
    return ", ".join(f"{name} {attempt(way):.3f}" for name, way in ways.items()) + " ms"


if __name__ == "__main__":
    main()
