"""Train the miniature AutoencoderOobleck that ships with fastvideo-vae-oobleck, on recordings that packages carry.

    python tools/train_demo_oobleck.py prepare --output .carry/oobleck-audio
    python tools/train_demo_oobleck.py train --recordings .carry/oobleck-audio --output out --minutes 5

`prepare` needs PyPI and Debian's `apt-get`. `train` needs neither a network nor an installed workspace, only its
sources on PYTHONPATH, and wants a GPU. `out/demo` is then the package's `demo` folder; `out/log.txt` is for looking.

Shape legend: B batch, C channels; S samples, s latents.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from demo_card import Card, table, write_sources
from demo_training import (
    Log,
    Optimisation,
    Progress,
    Run,
    Trainer,
    Way,
    add_steps,
    command_line,
    history,
    read_checkpoint,
    write_checkpoint,
)
from demo_waves import SHIPPED, Row, about_recordings, read_wave, write_wave
from fastvideo_vae_core.config import VAEConfig
from fastvideo_vae_oobleck.checkpoint import weight_norm_state_dict
from fastvideo_vae_oobleck.config import OobleckArchConfig
from fastvideo_vae_oobleck.model import AutoencoderOobleck, ResidualUnit

RATE = 22_050


@dataclass(frozen=True, kw_only=True)
class Recipe(Optimisation):
    """What the miniature is and how it learns.

    Attributes:
        samples, batch: of the clips.
        windows: of the short-time Fourier transforms whose magnitudes are compared.
        kl: weight of the Kullback-Leibler divergence per latent value.
    """

    arch: OobleckArchConfig = field(
        default_factory=lambda: OobleckArchConfig(
            encoder_hidden_size=48,
            downsampling_ratios=(2, 4, 8),
            channel_multiples=(1, 2, 3),
            decoder_channels=52,
            decoder_input_channels=24,
            sampling_rate=RATE,
        )
    )
    seed: int = 0
    samples: int = 16_384
    batch: int = 24
    windows: tuple[int, ...] = (2048, 1024, 512, 256, 128, 64)
    waveform: float = 20.0
    spectral: float = 1.0
    kl: float = 1e-5
    betas: tuple[float, float] = (0.8, 0.99)
    weight_decay: float = 1e-4


RECIPES = {"large": Recipe(), "small": Recipe(samples=4096, batch=4, windows=(1024, 256, 64))}


def main(arguments: Sequence[str] | None = None) -> None:
    parser, steps = command_line(__doc__)
    preparing = steps.add_parser("prepare", help="collect the recordings into a folder")
    preparing.add_argument("--output", type=Path, required=True)
    add_steps(
        steps, {"recordings": "what `prepare` wrote"}, recipes=tuple(RECIPES), minutes=5.0, reserve=15.0, compiles=False
    )
    options = parser.parse_args(arguments)
    if options.step == "prepare":
        prepare(options.output)
    elif options.step == "train":
        train(RECIPES[options.recipe], options.recordings, Way.of(options))
    else:
        measure(options.recordings, options.output, options.device)


# -------------------------------------------------------------------- prepare


@dataclass(frozen=True, kw_only=True)
class Package:
    """What carries recordings: a wheel of PyPI or a package of Debian."""

    kind: str
    requirement: str
    licence: str
    credit: str


@dataclass(frozen=True, kw_only=True)
class Recording:
    """A recording in a package; `start` and `seconds` are of what is taken from it."""

    name: str
    package: Package
    member: str
    held_out: bool = False
    start: float = 0.0
    seconds: float = 60.0


def prepare(output: Path) -> None:
    """Fetch the packages, and write their recordings in stereo, 16 bits and RATE, with a list of their sources."""
    from demo_photographs import Fetcher
    from fastvideo_vae_core.media.audio import read_audio, resample

    listed, roots = [], dict[Package, Path]()
    with tempfile.TemporaryDirectory(prefix="demo-recordings-") as scratch:
        fetch = Fetcher(Path(scratch))
        for recording in CATALOGUE:
            if recording.package not in roots:
                roots[recording.package] = fetch(recording.package.kind, recording.package.requirement)
            source = roots[recording.package] / recording.member
            x_CS, rate = read_audio(source)
            first = round(recording.start * rate)
            x_CS = x_CS[:, first : first + round(recording.seconds * rate)]
            x_CS = resample(x_CS, rate, RATE)
            x_CS = x_CS[:2] if len(x_CS) > 1 else x_CS.expand(2, -1)
            folder = output / ("held-out" if recording.held_out else "training")
            folder.mkdir(parents=True, exist_ok=True)
            write_wave(folder / f"{recording.name}.wav", x_CS, RATE)
            if recording.name == SHIPPED:
                shutil.copyfile(source, output / f"recording{source.suffix}")
            listed.append({**asdict(recording), "length": x_CS.shape[1] / RATE})
            print(f"{folder.name}/{recording.name}  {x_CS.shape[1] / RATE:.1f} s", flush=True)
    write_sources(output, listed)


# -------------------------------------------------------------------- train


def train(recipe: Recipe, recordings: Path, way: Way) -> None:
    """Train until the time is nearly over, saving what ships now and then."""
    torch.manual_seed(recipe.seed)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    run = Run[AutoencoderOobleck](
        way,
        recipe,
        lambda averaged, folder, _: save(averaged, recipe.arch, folder),
        lambda steps: f"{steps} steps of {recipe.batch} clips of {recipe.samples} samples",
    )
    model = run.begin(initialised(recipe.arch), load_saved, LARGEST_WEIGHTS_BYTES)
    clips = Clips([read_wave(path) for path in sorted((recordings / "training").glob("*.wav"))], recipe, way.device)
    fit(model, clips, recipe, run)
    if way.measured:
        measure(recordings, way.output, way.device)


def initialised(arch: OobleckArchConfig) -> AutoencoderOobleck:
    """PyTorch's initialisation, but residual units begin as the identity, and the posterior begins narrow."""
    model = AutoencoderOobleck(VAEConfig(arch_config=arch))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, ResidualUnit):
                module.conv2.weight.mul_(0.1)
        _, scale = model.encoder.conv2.weight.chunk(2)
        assert model.encoder.conv2.bias is not None
        _, bias = model.encoder.conv2.bias.chunk(2)
        scale.zero_()
        bias.fill_(-5)
    return model


class Clips:
    """Random clips of all recordings."""

    def __init__(self, recordings: Sequence[Tensor], recipe: Recipe, device: str) -> None:
        self.row, self.batch = Row(recordings, recipe.samples, device, seed=recipe.seed), recipe.batch

    def draw(self) -> Tensor:
        """(B, 2, samples): cut, made louder or softer, their channels swapped, the sign turned, some made mono."""
        generator = self.row.generator
        chosen = self.row.choose(self.batch)
        first, loud, flags = torch.rand(3, self.batch, 4, generator=generator, device=generator.device)
        x_BCS = self.row.cut(chosen, first[:, 0])
        x_BCS = torch.where(flags[:, 0, None, None] < 0.5, x_BCS.flip(1), x_BCS)
        x_BCS = torch.where(flags[:, 1, None, None] < 0.1, x_BCS.mean(1, keepdim=True), x_BCS)
        gain = 10 ** (loud[:, 0] * 0.9 - 0.6) * torch.where(flags[:, 2] < 0.5, -1.0, 1.0)
        return (x_BCS * gain[:, None, None]).clamp(-1, 1)


class Spectral:
    """Distance of magnitudes at several resolutions: relative, and of their logarithms."""

    def __init__(self, windows: Sequence[int], device: str) -> None:
        self.windows = [torch.hann_window(size, device=device) for size in windows]

    def __call__(self, made_BCS: Tensor, x_BCS: Tensor) -> Tensor:
        # Sum and difference tell where a sound is, as the two channels do.
        pairs = [torch.cat([y, y.sum(1, keepdim=True), y.diff(dim=1)], 1).flatten(0, 1) for y in (made_BCS, x_BCS)]
        losses = []
        for window in self.windows:
            made, x = (self._magnitudes(pair, window).unflatten(0, (len(x_BCS), -1)) for pair in pairs)
            # Of all four together, because the difference of a sound in the middle is nothing.
            relative = (made - x).square().sum((1, 2, 3)).sqrt() / (x.square().sum((1, 2, 3)).sqrt() + 1.0)
            losses.append(relative.mean() + (made.log() - x.log()).abs().mean())
        return torch.stack(losses).mean()

    def _magnitudes(self, x_BS: Tensor, window: Tensor) -> Tensor:
        spectrum = torch.stft(x_BS, len(window), len(window) // 4, window=window, return_complex=True)
        return (spectrum.real.square() + spectrum.imag.square() + 1e-5).sqrt()


def fit(model: AutoencoderOobleck, clips: Clips, recipe: Recipe, run: Run[AutoencoderOobleck]) -> None:
    """Train until the deadline."""
    spectral = Spectral(recipe.windows, str(model.device))
    trainer, progress = Trainer(model, run), Progress(told, run.log, every=100 if model.device.type == "cuda" else 10)
    while trainer.passed < 1:
        x_BCS = clips.draw()
        posterior = model.posterior(model.encoder(x_BCS))
        made_BCS = model.decoder(posterior.sample())
        waveform, magnitudes = (made_BCS - x_BCS).abs().mean(), spectral(made_BCS, x_BCS)
        divergence = posterior.kl() / posterior.mean.shape[1]
        trainer.step(recipe.waveform * waveform + recipe.spectral * magnitudes + recipe.kl * divergence)
        with torch.no_grad():
            progress(torch.stack([waveform, magnitudes, si_sdr(made_BCS, x_BCS).median()]), trainer)
    trainer.finish()


def told(means: Sequence[float], _: float) -> str:
    return f"waveform {means[0]:.4f}, spectral {means[1]:.3f}, SI-SDR {means[2]:.2f} dB"


def si_sdr(made_BCS: Tensor, x_BCS: Tensor) -> Tensor:
    """Scale-invariant signal-to-distortion ratio (B,) in dB, over both channels together."""
    made, x = made_BCS.flatten(1), x_BCS.flatten(1)
    target = (made * x).sum(1, keepdim=True) / (x.square().sum(1, keepdim=True) + 1e-8) * x
    return 10 * torch.log10((target.square().sum(1) + 1e-8) / ((made - target).square().sum(1) + 1e-8))


def measure(recordings: Path, output: Path, device: str) -> None:
    """Complete the demo folder of a run from what its files themselves give back."""
    log, folder = Log(output / "log.txt"), output / "demo"
    model = load_saved(folder).to(device)
    measured = table(("recording", "length", "SI-SDR, dB"), ratios(model, recordings, output))
    log(measured)
    shipped = next(recordings.glob("recording.*"))
    shutil.copyfile(shipped, folder / shipped.name)
    card(model.arch, measured, recordings).write(folder, history(output))
    log("done")


def ratios(model: AutoencoderOobleck, recordings: Path, output: Path) -> list[tuple[str, ...]]:
    """A row of the table for each held-out recording, through the mode of the posterior; and files to listen to."""
    rows: list[tuple[str, ...]] = []
    for path in sorted((recordings / "held-out").glob("*.wav")):
        x = read_wave(path)[None].to(model.device)
        with torch.inference_mode():
            z = model.encode(model.pad_to_valid(x)).latent_dist.mode()
            made = model.crop_to(model.decode(z).sample, x.shape)
        write_wave(output / f"{path.stem}-made.wav", made[0].cpu(), RATE)
        rows.append((path.stem, f"{x.shape[2] / RATE:.1f} s", f"{float(si_sdr(made, x)):.2f}"))
    return rows


def save(model: AutoencoderOobleck, arch: OobleckArchConfig, folder: Path) -> None:
    """Write the weights in float16 with their norms in float32, and the configuration, as diffusers lays them out."""
    half = copy.deepcopy(model).cpu().half()
    config = arch.to_dict()
    config.pop("scaling_factor")
    write_checkpoint(folder, "AutoencoderOobleck", weight_norm_state_dict(half), config)


def load_saved(folder: Path) -> AutoencoderOobleck:
    """What was written, in float32."""

    def plain(stored: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name.removesuffix("_v"): tensor for name, tensor in stored.items() if not name.endswith("weight_g")}

    return read_checkpoint(folder, AutoencoderOobleck, OobleckArchConfig, plain).eval()


def card(arch: OobleckArchConfig, measured: str, recordings: Path) -> Card:
    """The README of the demo folder."""
    return Card(
        class_name="AutoencoderOobleck",
        described=DESCRIBED.format(
            strides="-".join(map(str, arch.downsampling_ratios)),
            latents=arch.decoder_input_channels,
            hop=arch.hop_length,
            rate=arch.sampling_rate,
        ),
        compared=COMPARED,
        table=measured,
        script="train_demo_oobleck.py",
        learns=LEARNS,
        example="The recording",
        **about_recordings(recordings),
    )


DESCRIBED = """\
`diffusion_pytorch_model.safetensors` and `config.json` are a small but really trained `AutoencoderOobleck` in
diffusers' layout: strides {strides}, {latents} latent channels, one latent for {hop} samples in stereo at {rate} Hz,
stored in float16. It is there for demonstrations and tests. Its quality is that of a miniature; for work, load a
published checkpoint."""
COMPARED = (
    "Recordings, or parts of recordings, that it was not trained on, sent whole through the mode of the posterior in"
    " float32:"
)
LEARNS = """\
the absolute error of the waveform, magnitudes of short-time Fourier
transforms at several resolutions, a small Kullback-Leibler term, and a moving average of the weights."""

# The norms are stored in float32, beside directions of the same number of values.
LARGEST_WEIGHTS_BYTES = 2_940_000

_ARCADE = Package(
    kind="wheel",
    requirement="arcade==3.3.3",
    licence="given away for any use; Arcade bundles CC0 or similar",
    credit="Anttis instrumentals",
)
_ALSA = Package(kind="deb", requirement="alsa-utils", licence="GPL-2+", credit="the ALSA project")
_PYGAME = Package(
    kind="wheel", requirement="pygame-ce==2.5.8", licence="public domain", credit="the examples of pygame-ce"
)
_MUSIC = "arcade/resources/assets/music"
_SPEECH = "usr/share/sounds/alsa"
_EXAMPLES = "pygame/examples/data"
CATALOGUE = (
    Recording(name="robot", member=f"{_MUSIC}/funkyrobot.mp3", start=4, seconds=60, package=_ARCADE),
    Recording(
        name="robot-end", member=f"{_MUSIC}/funkyrobot.mp3", start=150, seconds=8, held_out=True, package=_ARCADE
    ),
    Recording(name="1918", member=f"{_MUSIC}/1918.mp3", start=4, seconds=60, package=_ARCADE),
    Recording(name="1918-end", member=f"{_MUSIC}/1918.mp3", start=120, seconds=8, held_out=True, package=_ARCADE),
    *(
        Recording(name=name.lower(), member=f"{_SPEECH}/{name}.wav", package=_ALSA)
        for name in ("Front_Left", "Front_Right", "Rear_Center", "Rear_Left", "Side_Left", "Side_Right")
    ),
    Recording(name="front_center", member=f"{_SPEECH}/Front_Center.wav", held_out=True, package=_ALSA),
    *(
        Recording(name=name, member=f"{_EXAMPLES}/{name}.wav", package=_PYGAME)
        for name in ("secosmic_lo", "boom", "whiff", "car_door")
    ),
    Recording(name="punch", member=f"{_EXAMPLES}/punch.wav", held_out=True, package=_PYGAME),
    Recording(name=SHIPPED, member=f"{_EXAMPLES}/house_lo.ogg", held_out=True, package=_PYGAME),
)

if __name__ == "__main__":
    main()
