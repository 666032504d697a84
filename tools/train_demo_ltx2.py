"""Train the miniatures of LTX-2's video and audio autoencoders that ship with fastvideo-vae-ltx2.

    python tools/demo_clips.py --output .carry/wan-clips
    python tools/demo_photographs.py --output .carry/kl-photos
    python tools/train_demo_ltx2.py train --clips .carry/wan-clips --photographs .carry/kl-photos --output out/video

    python tools/train_demo_oobleck.py prepare --output .carry/oobleck-audio
    python tools/train_demo_ltx2.py prepare-audio --recordings .carry/oobleck-audio --output .carry/ltx2-mels
    python tools/train_demo_ltx2.py train-audio --mels .carry/ltx2-mels --output out/audio

`train` and `train-audio` need neither a network nor an installed workspace, only its sources on PYTHONPATH, and want a
GPU. `out/video/demo` and `out/audio/demo` are then the folders `demo/vae` and `demo/audio_vae` of the package. No
vocoder is trained: good ones need adversaries and hours. What is written for listening is made of spectrograms by
Griffin and Lim's algorithm, of the original ones too, so that the two can be compared.

Shape legend: B batch, C channels; T frames, M mel bins, F frequencies, S samples.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

import demo_video
from demo_card import Card, read_sources, table
from demo_training import (
    Log,
    Objective,
    Optimisation,
    Progress,
    Run,
    Trainer,
    Way,
    add_steps,
    command_line,
    compiled_or_plain,
    history,
    read_checkpoint,
    write_checkpoint,
)
from demo_video import POLISH_STAGES, SMALL_STAGES, Miniature, Recipe, orthogonal
from demo_waves import Row, about_recordings, read_wave, write_wave
from fastvideo_vae_core.config import VAEConfig
from fastvideo_vae_ltx2.audio import AutoencoderKLLTX2Audio
from fastvideo_vae_ltx2.audio import ResidualBlock as AudioBlock
from fastvideo_vae_ltx2.config import LTX2AudioArchConfig, LTX2VideoArchConfig
from fastvideo_vae_ltx2.mel import FLOOR, WINDOW, mel_filters
from fastvideo_vae_ltx2.model import AutoencoderKLLTX2Video
from fastvideo_vae_ltx2.network import Decoder, Downsample, Encoder, ResidualBlock, Upsample

# The published networks compress 32 x 32 pixels and 8 frames. With fewer as few parameters do well.
VIDEO = LTX2VideoArchConfig(
    latent_channels=24,
    patch_size=2,
    block_out_channels=(48, 48),
    down_block_types=("LTX2VideoDownBlock3D",) * 2,
    layers_per_block=(1, 1, 1),
    spatio_temporal_scaling=(True,) * 2,
    downsample_type=("spatiotemporal", "temporal"),
    decoder_block_out_channels=(56, 56),
    decoder_layers_per_block=(2, 1, 1),
    decoder_spatio_temporal_scaling=(True,) * 2,
    decoder_inject_noise=(False,) * 3,
    upsample_type=("temporal", "spatiotemporal"),
    upsample_residual=(True,) * 2,
    upsample_factor=(2, 1),
    decoder_causal=False,
)
AUDIO = LTX2AudioArchConfig(base_channels=64, ch_mult=(1, 1, 1), num_res_blocks=1, latent_channels=4)
RECIPES = {
    "large": Recipe(arch=VIDEO),
    "polish": Recipe(arch=VIDEO, stages=POLISH_STAGES),
    "small": Recipe(arch=VIDEO, stages=SMALL_STAGES),
}


@dataclass(frozen=True, kw_only=True)
class AudioRecipe(Optimisation):
    """What the miniature of audio is and how it learns.

    Attributes:
        frames, batch: of the clips of spectrograms.
        kl: weight of the Kullback-Leibler divergence per latent value.
        gain: how much louder or softer they are made at most, in nepers, which is what spectrograms are in.
    """

    arch: LTX2AudioArchConfig = AUDIO
    seed: int = 0
    frames: int = 129
    batch: int = 32
    kl: float = 1e-4
    gain: float = 1.0


# The file of the one that ships.
RECORDING = "recording.ogg"
AUDIO_RECIPES = {"large": AudioRecipe(), "small": AudioRecipe(frames=65, batch=4)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser, steps = command_line(__doc__)
    demo_video.add_video_steps(steps, VIDEO_MINIATURE)
    preparing = steps.add_parser("prepare-audio", help="make spectrograms of recordings")
    preparing.add_argument("--recordings", type=Path, required=True, help="what train_demo_oobleck.py prepared")
    preparing.add_argument("--output", type=Path, required=True)
    mels = {"mels": "what `prepare-audio` wrote"}
    add_steps(steps, mels, recipes=tuple(AUDIO_RECIPES), minutes=8.0, reserve=15.0, suffix="-audio")
    options = parser.parse_args(arguments)
    if options.step == "prepare-audio":
        prepare_audio(options.recordings, options.output)
    elif options.step == "train-audio":
        train_audio(AUDIO_RECIPES[options.recipe], options.mels, Way.of(options))
    elif options.step == "measure-audio":
        measure_audio(options.mels, options.output, options.device)
    else:
        demo_video.perform(VIDEO_MINIATURE, options)


# ---------------------------------------------------------------- video


def initialised(arch: LTX2VideoArchConfig) -> AutoencoderKLLTX2Video:
    """PyTorch's initialisation, but signals begin on a path that loses none of them, or little.

    Residual blocks begin as the identity, the convolutions between them as orthogonal maps of single positions. Norms
    forget how long a row is, so the last of each half begins with a constant added to it, beside which signals are
    small. The posterior begins narrow: at variance 1 the first latents would be lost in noise.
    """
    model = AutoencoderKLLTX2Video(VAEConfig(arch_config=arch))
    encoder, decoder = model.encoder, model.decoder
    assert isinstance(encoder, Encoder)
    assert isinstance(decoder, Decoder)
    # A decoder sees one later frame, so the frame itself is in the middle.
    causal, centred = [(2, 1, 1)], [(2 if arch.decoder_causal else 1, 1, 1)]
    with torch.no_grad():
        for half, here in ((encoder, causal), (decoder, centred)):
            orthogonal(half.conv_in.conv, here)
            orthogonal(half.conv_out.conv, here)
            for module in half.modules():
                if isinstance(module, ResidualBlock):
                    module.conv2.conv.weight.zero_()
                elif isinstance(module, Downsample | Upsample):
                    orthogonal(module.conv.conv, here)
        for last in (encoder.mid_block.resnets[-1], decoder.up_blocks[-1].resnets[-1]):
            assert last.conv2.conv.bias is not None
            last.conv2.conv.bias.fill_(1)
        assert encoder.conv_out.conv.bias is not None
        encoder.conv_out.conv.weight[-1].zero_()
        encoder.conv_out.conv.bias[-1].fill_(-8)
    return model


def with_statistics(
    arch: LTX2VideoArchConfig, state: dict[str, Tensor], mean: Tensor, std: Tensor
) -> tuple[LTX2VideoArchConfig, dict[str, Tensor]]:
    """The family keeps them among the weights."""
    return arch, {**state, "latents_mean": mean, "latents_std": std}


def describe(arch: LTX2VideoArchConfig) -> str:
    time, side = arch.ratios
    return (
        f"the network of LTX-2 at widths {'-'.join(map(str, arch.block_out_channels))}, {arch.latent_channels} latent"
        f" channels, one latent for {time} frames of {side} × {side} pixels"
    )


VIDEO_MINIATURE = Miniature(
    script="train_demo_ltx2.py",
    class_name="AutoencoderKLLTX2Video",
    model=AutoencoderKLLTX2Video,
    arch=LTX2VideoArchConfig,
    recipes=RECIPES,
    initialised=initialised,
    with_statistics=with_statistics,
    describe=describe,
)


# ---------------------------------------------------------------- audio


def prepare_audio(recordings: Path, output: Path) -> None:
    """Spectrograms (2, T, M) of all recordings, with the list of where they come from."""
    output.mkdir(parents=True, exist_ok=True)
    model = AutoencoderKLLTX2Audio(VAEConfig(arch_config=AudioRecipe().arch))
    mels = {}
    for each in read_sources(recordings):
        folder = "held-out" if each["held_out"] else "training"
        x_CS = read_wave(recordings / folder / f"{each['name']}.wav")
        rate = round(x_CS.shape[1] / each["length"])
        # Recordings may be shorter than half a window.
        x_CS = F.pad(x_CS, (0, max(0, WINDOW * 2 - x_CS.shape[1])))
        mels[f"{folder}/{each['name']}"] = model.waveform_to_mel(x_CS[None], rate)[0].half().contiguous()
    save_file(mels, output / "mels.safetensors")
    for name in ("sources.json", RECORDING):
        shutil.copyfile(recordings / name, output / name)


def read_mels(folder: Path, part: str) -> dict[str, Tensor]:
    """Names and spectrograms (2, T, M) in float32, of "training" or "held-out"."""
    stored = load_file(folder / "mels.safetensors")
    return {name.removeprefix(f"{part}/"): mel.float() for name, mel in stored.items() if name.startswith(f"{part}/")}


def train_audio(recipe: AudioRecipe, mels: Path, way: Way) -> None:
    """Train until the time is nearly over, saving what ships now and then."""
    torch.manual_seed(recipe.seed)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    material = Spectrograms(read_mels(mels, "training").values(), recipe, way.device)

    def write(averaged: AutoencoderKLLTX2Audio, folder: Path, _: bool) -> None:
        save_audio(averaged, recipe.arch, material, folder)

    run = Run[AutoencoderKLLTX2Audio](
        way,
        recipe,
        write,
        lambda steps: f"{steps} steps of {recipe.batch} clips of {recipe.frames} frames of spectrograms",
    )
    model = run.begin(initialised_audio(recipe.arch), load_audio)
    compute: Objective = audio_objective
    kl = torch.tensor(recipe.kl, device=way.device)
    if way.compiled:
        examples = {f"{recipe.frames} frames": (model, material.draw(), kl)}
        compute = compiled_or_plain(audio_objective, examples, model, run.log)
    trainer = Trainer(model, run)
    progress = Progress(told_audio, run.log, every=200 if way.device == "cuda" else 20)
    while trainer.passed < 1:
        loss, error = compute(model, material.draw(), kl)
        trainer.step(loss)
        progress(error, trainer)
    trainer.finish()
    if way.measured:
        measure_audio(mels, way.output, way.device)


def initialised_audio(arch: LTX2AudioArchConfig) -> AutoencoderKLLTX2Audio:
    """PyTorch's initialisation, but residual blocks begin as the identity, and the posterior begins narrow.

    Norms forget how loud it is, so the last of each half begins with a constant added to it, and first convolutions
    bring spectrograms to a scale at which that constant counts.
    """
    model = AutoencoderKLLTX2Audio(VAEConfig(arch_config=arch))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, AudioBlock):
                module.conv2.conv.weight.zero_()
        for last in (model.encoder.mid.block_2, model.decoder.up[0].block[-1]):
            assert last.conv2.conv.bias is not None
            last.conv2.conv.bias.fill_(1)
        model.encoder.conv_in.conv.weight.mul_(0.3)
        out, end = model.encoder.conv_out.conv, model.decoder.conv_out.conv
        assert out.bias is not None
        assert end.bias is not None
        out.weight[arch.latent_channels :].zero_()
        out.bias[arch.latent_channels :].fill_(-8)
        end.bias.fill_(math.log(FLOOR) / 2)
    return model


class Spectrograms:
    """Random clips of all spectrograms."""

    def __init__(self, mels: Iterable[Tensor], recipe: AudioRecipe, device: str) -> None:
        self.recipe = recipe
        self.row = Row(mels, recipe.frames, device, seed=recipe.seed, silence=math.log(FLOOR))

    def draw(self) -> Tensor:
        """(B, 2, frames, M): cut, made louder or softer, their channels swapped."""
        batch, generator = self.recipe.batch, self.row.generator
        chosen = self.row.choose(batch)
        first, loud, swap = torch.rand(3, batch, generator=generator, device=generator.device)
        x_BCTM = self.row.cut(chosen, first)
        x_BCTM = torch.where(swap[:, None, None, None] < 0.5, x_BCTM.flip(1), x_BCTM)
        gain = (2 * loud - 1) * self.recipe.gain
        return (x_BCTM + gain[:, None, None, None]).clamp(min=math.log(FLOOR)).contiguous()


def audio_objective(model: AutoencoderKLLTX2Audio, x_BCTM: Tensor, kl: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, and the mean absolute error in it."""
    posterior = model.encode(x_BCTM).latent_dist
    error = model.decode(posterior.sample()).sample - x_BCTM
    absolute = error.abs().mean()
    divergence = posterior.kl().mean() / posterior.mean[0].numel()
    return absolute + 0.1 * error.square().mean() + kl * divergence, absolute.detach()


def told_audio(means: Sequence[float], steps_per_second: float) -> str:
    return f"training error {means[0] * _DECIBELS:.3f} dB, {steps_per_second:.1f} steps/s"


def save_audio(model: AutoencoderKLLTX2Audio, arch: LTX2AudioArchConfig, material: Spectrograms, folder: Path) -> None:
    """Write the weights in float16 with the statistics of the latents, which the family keeps among them."""
    with torch.inference_mode():
        z_BCtm = torch.cat([model.encode(material.draw()).latent_dist.mode() for _ in range(16)])
    std, mean = (each.flatten().cpu() for each in torch.std_mean(z_BCtm.transpose(1, 2).flatten(0, 1), dim=0))
    state = {**model.state_dict(), "latents_mean": mean, "latents_std": std}
    tensors = {name: tensor.half() for name, tensor in state.items()}
    write_checkpoint(folder, "AutoencoderKLLTX2Audio", tensors, arch.to_dict())


def load_audio(folder: Path) -> AutoencoderKLLTX2Audio:
    """What was written, in float32 on the CPU."""
    return read_checkpoint(folder, AutoencoderKLLTX2Audio, LTX2AudioArchConfig)


def measure_audio(mels: Path, output: Path, device: str) -> None:
    """Complete the demo folder of a run from what its files themselves give back."""
    log, folder = Log(output / "log.txt"), output / "demo"
    model = load_audio(folder).to(device)
    arch = model.arch
    rows = []
    for name, mel_CTM in read_mels(mels, "held-out").items():
        x_BCTM = mel_CTM[None].to(device)
        padded = model.pad_to_valid(x_BCTM)
        with torch.inference_mode():
            made = model.crop_to(model.decode(model.encode(padded).latent_dist.mode()).sample, x_BCTM.shape)
        error = (made - x_BCTM).abs().mean()
        spread = (x_BCTM - x_BCTM.mean()).abs().mean()
        seconds = x_BCTM.shape[2] * arch.mel_hop_length / arch.sample_rate
        rows.append((name, f"{seconds:.1f} s", f"{error * _DECIBELS:.2f}", f"{spread * _DECIBELS:.2f}"))
        for kind, each in (("original", x_BCTM), ("made", made)):
            write_wave(output / f"{name}-{kind}.wav", griffin_lim(each[0], arch).cpu(), arch.sample_rate)
    measured = table(("recording", "length", "error, dB", "spread, dB"), rows)
    log(measured)
    shutil.copyfile(mels / RECORDING, folder / RECORDING)
    card(arch, measured, mels).write(folder, history(output))
    log("done")


def griffin_lim(mel_CTM: Tensor, arch: LTX2AudioArchConfig, rounds: int = 60) -> Tensor:
    """A waveform (C, S) whose spectrogram is about the given one: a phase is sought for magnitudes that fit it."""
    filters_FM = mel_filters(arch.sample_rate, WINDOW // 2 + 1, arch.mel_bins).to(mel_CTM)
    magnitudes_CFT = (mel_CTM.exp() @ torch.linalg.pinv(filters_FM)).clamp(min=0).transpose(1, 2)
    window = torch.hann_window(WINDOW, device=mel_CTM.device)
    generator = torch.Generator(mel_CTM.device).manual_seed(0)
    angles = 2 * math.pi * torch.rand(magnitudes_CFT.shape, generator=generator, device=mel_CTM.device)
    spectrum = torch.polar(magnitudes_CFT, angles)
    for _ in range(rounds):
        x_CS = torch.istft(spectrum, WINDOW, arch.mel_hop_length, window=window)
        found = torch.stft(x_CS, WINDOW, arch.mel_hop_length, window=window, return_complex=True)
        spectrum = torch.polar(magnitudes_CFT, found.angle())
    return torch.istft(spectrum, WINDOW, arch.mel_hop_length, window=window)


def card(arch: LTX2AudioArchConfig, measured: str, mels: Path) -> Card:
    """The README of the demo folder."""
    return Card(
        class_name="AutoencoderKLLTX2Audio",
        described=DESCRIBED.format(
            widths="-".join(map(str, arch.widths)),
            latents=arch.latent_channels,
            ratio=arch.ratio,
            rate=arch.sample_rate,
        ),
        compared=COMPARED,
        table=measured,
        script="train_demo_ltx2.py",
        learns=LEARNS,
        example=RECORDING,
        **about_recordings(mels),
    )


DESCRIBED = """\
`diffusion_pytorch_model.safetensors` and `config.json` are a small but really trained `AutoencoderKLLTX2Audio` in
diffusers' layout: widths {widths}, {latents} latent channels, one latent for {ratio} frames of {ratio} mel bins of
spectrograms of stereo sound at {rate} Hz, stored in float16. It is there for demonstrations and tests. Its quality is
that of a miniature; for work, load a published checkpoint. No vocoder comes with it: to hear the table,
`tools/train_demo_ltx2.py measure-audio` makes waveforms of both spectrograms by Griffin and Lim's algorithm."""
COMPARED = """\
Spectrograms of recordings, or parts of recordings, that it was not trained on, sent whole through the mode of the
posterior in float32. The error is the mean distance of levels; the spread is the error of a single level for all:"""
LEARNS = """\
the absolute error of logarithmic levels with a small weight on the
squared one, a small Kullback-Leibler term, and a moving average of the weights."""

# Of a neper.
_DECIBELS = 20 / math.log(10)

if __name__ == "__main__":
    main()
