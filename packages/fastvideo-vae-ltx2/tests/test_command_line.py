"""The command line on clips with sound: one checkpoint takes both, and both stay in step."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import fastvideo_vae_core as fvae
from fastvideo_vae_core.audio_metrics import si_sdr
from fastvideo_vae_core.latents import read_latents
from fastvideo_vae_core.media import VideoReader, VideoWriter, probe_video, read_audio, resample, write_audio
from fastvideo_vae_core.testing.command import Command
from fastvideo_vae_core.testing.golden import make_input
from fastvideo_vae_core.testing.parity import relative_error
from fastvideo_vae_ltx2 import AutoencoderKLLTX2Audio, WaveformDecoder, WaveformEncoder

FOLDERS = {"video": "vae", "audio": "audio_vae", "vocoder": "vocoder"}
RATES = {"vocoder 2.0": 24_000, "vocoder 2.3": 48_000}
FRAME_RATE = 25
# No 8k + 1, and a second and a bit of sound.
FRAMES, SIZE = 27, 64


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


@pytest.fixture(scope="session")
def checkpoints(random_model: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of two diffusers pipelines, of which only the vocoder differs."""
    root = tmp_path_factory.mktemp("pipelines")
    for name in RATES:
        for component, which in {"video": "2.0", "audio": "audio", "vocoder": name}.items():
            model, folder = random_model(which), root / name / FOLDERS[component]
            folder.mkdir(parents=True)
            extended = component == "vocoder" and model.arch.extension
            kind = "LTX2VocoderWithBWE" if extended else type(model).__name__
            (folder / "config.json").write_text(json.dumps({"_class_name": kind, **model.arch.to_dict()}))
            save_file(model.state_dict(), folder / "diffusion_pytorch_model.safetensors")
    return root


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoints: Path) -> Path:
    """A folder to work in, with both pipelines in it."""
    monkeypatch.chdir(tmp_path)
    for name in RATES:
        Path(name).symlink_to(checkpoints / name)
    return tmp_path


def write_clip(path: str, sound_CS: Tensor, *, rate: int = 48_000, late: float = 0.0, frames: int = FRAMES) -> None:
    """A moving clip whose sound begins so many seconds behind its first picture."""
    with av.open("sound-only.mkv", "w") as container:
        stream = container.add_stream("pcm_f32le", rate=rate, layout="stereo")
        interleaved = sound_CS.numpy().T.reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(interleaved), format="flt", layout="stereo")
        frame.sample_rate, frame.pts, frame.time_base = rate, round(late * rate), Fraction(1, rate)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    t = torch.arange(frames).view(1, -1, 1, 1) * 0.3
    x = torch.arange(SIZE) / 7
    phase = torch.tensor([0.0, 2.0, 4.0]).view(3, 1, 1, 1)
    with VideoWriter(path, frame_rate=FRAME_RATE, height=SIZE, width=SIZE, audio_from="sound-only.mkv") as writer:
        writer.write((torch.sin(x + t + phase) * torch.cos(x.view(-1, 1) - t)).clamp(-1, 1))


def noise(seconds: float, rate: int = 48_000) -> Tensor:
    return make_input("command line", (2, round(seconds * rate)), "audio").float() / 2


def through(root: str, x_CS: Tensor, rate: int) -> tuple[Tensor, Tensor, int]:
    """Latents and sound by the public calls, all at once, as in the README: the sound is padded as a whole."""
    audio, vocoder = (fvae.load(root, component=name) for name in ("audio", "vocoder"))
    x_16k = resample(x_CS, rate, audio.sampling_rate)
    latents = max(-(-(x_16k.shape[1] + 480) // 640), 2)
    x_16k = torch.nn.functional.pad(x_16k, (0, 640 * latents - 480 - x_16k.shape[1]))
    with torch.no_grad():
        mel = audio.waveform_to_mel(x_16k[None], audio.sampling_rate)[:, :, : 4 * latents - 3]
        z = audio.encode(mel).latent_dist.mode()
        y = vocoder(audio.decode(z).sample)[0]
    return z, y[:, : -(-x_CS.shape[1] * vocoder.sampling_rate // rate)], vocoder.sampling_rate


# -------------------------------------------------------------------- clips


@pytest.mark.parametrize("name", RATES)
def test_sound_goes_through_its_own_networks(run: Command, desk: Path, name: str) -> None:
    sound = noise(FRAMES / FRAME_RATE)
    write_clip("clip.mkv", sound)
    before, _ = read_audio("clip.mkv")
    document = run("roundtrip", "clip.mkv", "-o", "back.mkv", "--model", name, "--json").json
    _, expected, rate = through(name, before, 48_000)
    assert rate == RATES[name]
    made, made_rate = read_audio("back.mkv")
    assert (made_rate, made.shape) == (rate, expected.shape)
    with VideoReader("back.mkv") as reader:
        assert sum(piece.shape[1] for piece in reader) == FRAMES
    # 24 bits.
    assert (made - expected).abs().max() <= 2e-6 + 1e-5 * float(expected.abs().max())
    told = document["sound"]
    assert (told["way"], told["sampling_rate"], told["decoded_sampling_rate"]) == ("decoded", 16_000, rate)
    assert (told["model"]["component"], document["model"]["component"]) == ("audio", "video")
    assert document["metrics"].keys() == {"psnr", "ssim"}
    original = resample(before, 48_000, rate)
    assert told["metrics"]["si_sdr"] == pytest.approx(si_sdr(original[None], expected[None]).item(), abs=1e-2)
    assert told["metrics"]["stft_distance"] > 0


def test_it_is_told_to_people(run: Command, desk: Path) -> None:
    write_clip("clip.mp4", noise(1))
    ran = run("roundtrip", "clip.mp4", "-o", "back.mp4", "--model", "vocoder 2.0", "--plan")
    assert ran.code == 0, ran.err
    for words in ("PSNR", "back at 24000 Hz", "SI-SDR", "STFT distance", "streamed"):
        assert words in ran.out
    assert ran.out.count("latents ") >= 2
    # AAC ends on a packet.
    made, rate = read_audio("back.mp4")
    assert rate == 24_000
    assert 0 <= made.shape[1] - 24_000 < 1024
    assert sorted(path.name for path in desk.glob("back*")) == ["back-comparison.png", "back.mp4"]


@pytest.mark.parametrize("late", [0.0, 0.2])
def test_a_click_stays_at_its_flash(run: Command, desk: Path, late: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks with random weights keep no click, so perfect ones stand in for them behind the loading: spectrograms
    through the true front end, their energy in every frame back as the sound of that frame."""
    flash, rate = 15, 48_000
    click = round((flash / FRAME_RATE - late) * rate)
    sound = torch.zeros(2, round((FRAMES / FRAME_RATE - late) * rate))
    sound[:, click : click + 48] = 0.9
    write_clip("clip.mkv", sound, late=late)
    energies: list[Tensor] = []

    def listen(self: AutoencoderKLLTX2Audio, direction: str, chunks: Any) -> Any:
        mel = torch.cat(list(chunks), 2)
        energies.append(mel.exp().mean((0, 1, 3)))
        yield torch.zeros(1, 2 * self.arch.latent_channels, (mel.shape[2] + 3) // 4, self.arch.mel_bins // 4)

    def speak(self: WaveformDecoder, direction: str, chunks: Any) -> Any:
        frames = 4 * sum(chunk.shape[2] for chunk in chunks) - 3
        [energy] = energies
        assert len(energy) == frames
        y = torch.zeros(1, 2, frames * self.hop)
        # A frame is centred on its first sample.
        y[..., int(energy.argmax()) * self.hop] = 0.9
        yield y

    monkeypatch.setattr(AutoencoderKLLTX2Audio, "_stream", listen)
    monkeypatch.setattr(WaveformDecoder, "_stream", speak)
    ran = run("roundtrip", "clip.mkv", "-o", "back.mkv", "--model", "vocoder 2.3")
    assert ran.code == 0, ran.err
    times = []
    with av.open("back.mkv") as container:
        for frame in container.decode(audio=0):
            loud = np.abs(frame.to_ndarray()).reshape(-1, 2).max(1)
            times += [frame.time + index / rate for index in np.flatnonzero(loud > 0.01 * 2**31)]
    with av.open("back.mkv") as container:
        shown = [frame.time for frame in container.decode(video=0)]
    # A frame of the spectrogram is 10 ms; Matroska counts milliseconds.
    assert times[0] - shown[flash] == pytest.approx(0, abs=0.011)
    assert len(shown) == FRAMES


def test_the_inputs_own_sound_on_request(run: Command, desk: Path) -> None:
    write_clip("clip.mkv", noise(1))
    kept = run("roundtrip", "clip.mkv", "-o", "kept.mkv", "--model", "vocoder 2.0", "--keep-sound", "--json")
    assert kept.code == 0, kept.err
    kept = kept.json
    assert kept["sound"] == {"way": "copied"}
    assert torch.equal(read_audio("kept.mkv")[0], read_audio("clip.mkv")[0])
    mute = run("roundtrip", "clip.mkv", "-o", "mute.mkv", "--model", "vocoder 2.0", "--no-sound", "--json").json
    assert mute["sound"] is None
    assert not probe_video("mute.mkv").has_audio
    ran = run("roundtrip", "clip.mkv", "-o", "x.mkv", "--model", "vocoder 2.0", "--no-sound", "--keep-sound")
    ran.assert_fails("not allowed with")


def test_a_checkpoint_of_pictures_alone_copies_the_sound(run: Command, desk: Path) -> None:
    write_clip("clip.mkv", noise(1))
    for model in ("vocoder 2.0/vae", "vocoder 2.0/vae/diffusion_pytorch_model.safetensors"):
        document = run("roundtrip", "clip.mkv", "-o", "back.mkv", "--model", model, "--json").json
        assert document["sound"] == {"way": "copied"}


def test_one_official_file(run: Command, desk: Path, official: Any) -> None:
    tensors: dict[str, Tensor] = {}
    config: dict[str, Any] = {}
    for name in ("2.0", "audio 64", "vocoder 2.0"):
        part = official(name)
        tensors |= part.tensors
        config |= part.config
    save_file(tensors, "ltx-2.safetensors", {"config": json.dumps(config)})
    write_clip("clip.mkv", noise(1))
    ran = run("roundtrip", "clip.mkv", "-o", "back.mkv", "--model", "ltx-2.safetensors", "--json")
    assert ran.code == 0, ran.err
    assert (ran.json["sound"]["way"], read_audio("back.mkv")[1]) == ("decoded", 24_000)


# -------------------------------------------------------------------- sound alone


@pytest.mark.parametrize(("name", "rate"), [("vocoder 2.0", 44_100), ("vocoder 2.3", 16_000)])
def test_a_recording_becomes_the_latents_of_one_call_and_comes_back(
    run: Command, desk: Path, name: str, rate: int
) -> None:
    write_audio("song.wav", noise(1.3, rate), rate)
    x, _ = read_audio("song.wav")
    z, y, out_rate = through(name, x, rate)
    encoded = run("encode", "song.wav", "-o", "song.safetensors", "--model", name, "--component", "audio")
    assert encoded.code == 0, encoded.err
    file = read_latents("song.safetensors")
    assert (file.provenance.component, file.sampling_rate) == ("audio", 16_000)
    assert relative_error(file.latents, z) <= 1e-5
    # The latents say whose they are.
    decoded = run("decode", "song.safetensors", "-o", "back.wav", "--model", name)
    assert decoded.code == 0, decoded.err
    direct = run("roundtrip", "song.wav", "-o", "direct.wav", "--model", name, "--component", "audio")
    assert direct.code == 0, direct.err
    for path in ("back.wav", "direct.wav"):
        made, made_rate = read_audio(path)
        assert made_rate == out_rate
        assert abs(made.shape[1] - y.shape[1]) <= out_rate / 16_000
        length = min(made.shape[1], y.shape[1])
        assert relative_error(made[:, :length], y[:, :length]) <= 1e-4


def test_sound_is_the_same_however_it_is_cut(desk: Path) -> None:
    """Streams of uneven chunks against one call, in float64."""
    audio, vocoder = (fvae.load("vocoder 2.0", component=name, dtype="float64") for name in ("audio", "vocoder"))
    hears, speaks = WaveformEncoder(audio), WaveformDecoder(audio, vocoder)
    x = noise(1)[None, :, : 640 * 20 + 160].double()
    with torch.no_grad():
        parameters, y = hears.encode(x).latent_dist.parameters, None
        mel = audio.waveform_to_mel(x, 16_000)[:, :, :81]
        assert torch.equal(parameters, audio.encode(mel).latent_dist.parameters)
        for size in (97, 700, 5000):
            pieces = [each.parameters for each in hears.encode_stream(x.split(size, 2))]
            assert (torch.cat(pieces, 2) - parameters).abs().max() <= 1e-11
        z = parameters.chunk(2, 1)[0]
        y = speaks.decode(z).sample
        assert y.shape == (1, 2, speaks.decoded_shape(z.shape)[2]) == (1, 2, 81 * 240)
        assert torch.equal(y, vocoder(audio.decode(z).sample))
        for size in (1, 5, 9):
            streamed = torch.cat(list(speaks.decode_stream(z.split(size, 2))), 2)
            assert (streamed - y).abs().max() <= 1e-11
        for tile in (8 * 160, 640 * 5):
            tiled = hears.encode(x, plan=hears.plan_encode(x.shape, tile=(tile,))).latent_dist.parameters
            assert (tiled - parameters).abs().max() <= 1e-11
        tiled = speaks.decode(z, plan=speaks.plan_decode(z.shape, tile=(20 * 240,))).sample
        assert (tiled - y).abs().max() <= 1e-11


@pytest.mark.parametrize("seconds", [0.001, 0.02, 0.05])
def test_the_shortest_sounds(run: Command, desk: Path, seconds: float) -> None:
    write_audio("blip.wav", noise(seconds), 48_000)
    ran = run("roundtrip", "blip.wav", "-o", "back.wav", "--model", "vocoder 2.3", "--component", "audio", "-q")
    assert ran.code == 0, ran.err
    assert read_audio("back.wav")[0].shape == (2, round(seconds * 48_000))


def test_what_is_missing_is_named(run: Command, desk: Path) -> None:
    write_audio("song.wav", noise(1), 48_000)
    arguments = ("roundtrip", "song.wav", "-o", "back.wav", "-q", "--model")
    run(*arguments, "vocoder 2.0/audio_vae", "--component", "audio").assert_fails("holds no vocoder")
    run(*arguments, "vocoder 2.0").assert_fails("model of video", "--component audio")
    encoded = run("encode", "song.wav", "-o", "z.safetensors", "-q", "--model", "vocoder 2.0/audio_vae")
    assert encoded.code == 0, encoded.err


@pytest.mark.slow
def test_a_memory_budget(run: Command, desk: Path) -> None:
    write_audio("song.wav", noise(2), 48_000)
    arguments = ("roundtrip", "song.wav", "-o", "back.wav", "--model", "vocoder 2.0", "--component", "audio")
    whole = run(*arguments, "--plan", "--json").json["plan"]
    budget = 6 << 20
    assert max(plan["peak_bytes"] for plan in whole.values()) > budget
    ran = run(*arguments, "--plan", "--json", "--memory-budget", str(budget))
    assert ran.code == 0, ran.err
    for plan in ran.json["plan"].values():
        assert plan["peak_bytes"] <= budget
    run(*arguments, "-q", "--memory-budget", "1KiB").assert_fails("or more, the budget is")
