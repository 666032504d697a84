"""Pictures and files: awkward pictures are made here, by hand where Pillow would be the judge of its own case."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps

from fastvideo_vae_core.errors import MediaError, ShapeError
from fastvideo_vae_core.media import atomic_output, from_uint8, media_kind, read_image, to_uint8, write_image


@pytest.fixture
def photo() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def levels(path: Path) -> np.ndarray:
    return to_uint8(read_image(path)).permute(1, 2, 0).numpy()


def png_16(path: Path, array_HWC: np.ndarray) -> None:
    """A 16-bit PNG from the specification: grey, grey + alpha, RGB or RGBA by the number of channels."""
    height, width, channels = array_HWC.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array_HWC)
    blocks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in blocks
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def profile_with_red_and_green_exchanged() -> bytes:
    """sRGB whose table of tags points red's primary at green's and the other way round, under another name."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert profile.count(b"rXYZ") == profile.count(b"gXYZ") == 1
    exchanged = profile.replace(b"rXYZ", b"swap").replace(b"gXYZ", b"rXYZ").replace(b"swap", b"gXYZ")
    renamed = exchanged.replace("sRGB".encode("utf-16-be"), "test".encode("utf-16-be"))
    assert renamed != exchanged
    return renamed


def test_every_level_comes_back() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(every)), every)
    assert from_uint8(every)[[0, 255]].tolist() == [-1.0, 1.0]


def test_to_uint8_rounds_to_the_nearest_level_and_clamps() -> None:
    x = torch.tensor([-7.0, -1.0, -1 + 0.49 / 127.5, -1 + 0.51 / 127.5, 0.999, 1.0, 7.0])
    assert to_uint8(x).tolist() == [0, 0, 0, 1, 255, 255, 255]
    assert to_uint8(torch.ones(2, 3, dtype=torch.bfloat16)).tolist() == [[255] * 3] * 2


def test_conversions_leave_their_input_alone() -> None:
    x, level = torch.full((3,), 0.5), torch.full((3,), 10.0)
    to_uint8(x)
    from_uint8(level)
    assert x.tolist() == [0.5] * 3
    assert level.tolist() == [10.0] * 3


@pytest.mark.parametrize("suffix", [".png", ".webp", ".PNG"])
def test_lossless_formats_return_the_very_pixels(tmp_path: Path, photo: np.ndarray, suffix: str) -> None:
    path = tmp_path / f"photo{suffix}"
    write_image(path, from_uint8(torch.from_numpy(photo).permute(2, 0, 1)))
    assert np.array_equal(levels(path), photo)
    assert read_image(path).dtype == torch.float32


def test_jpeg_keeps_colour_at_full_resolution(tmp_path: Path) -> None:
    stripes = torch.full((3, 32, 32), -1.0)
    stripes[0, :, ::2], stripes[2, :, 1::2] = 1.0, 1.0
    write_image(tmp_path / "stripes.jpg", stripes)
    error = (read_image(tmp_path / "stripes.jpg") - stripes).abs().max()
    assert error < 0.2, "red and blue columns side by side would blend into purple in 4:2:0"


@given(data=st.data())
def test_png_round_trip_of_any_size(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    height, width = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    raw = data.draw(st.binary(min_size=3 * height * width, max_size=3 * height * width))
    photo = np.frombuffer(raw, np.uint8).reshape(height, width, 3)
    path = tmp_path_factory.getbasetemp() / "any.png"
    write_image(path, from_uint8(torch.from_numpy(photo.copy()).permute(2, 0, 1)))
    assert np.array_equal(levels(path), photo)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, photo: np.ndarray, orientation: int) -> None:
    image = Image.fromarray(photo)
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as stored:
        assert np.array_equal(levels(tmp_path / "turned.png"), np.asarray(ImageOps.exif_transpose(stored)))


def test_a_phone_held_upright_gives_an_upright_picture(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20))
    image.paste((255, 255, 255), (0, 0, 20, 20))  # bright on the left of the sensor, which is the top of the scene
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "phone.jpg", exif=exif)
    x_CHW = read_image(tmp_path / "phone.jpg")
    assert x_CHW.shape == (3, 40, 20)
    assert x_CHW[:, :18].min() > 0.9
    assert x_CHW[:, 22:].max() < -0.9


def test_transparency_is_laid_over_white(tmp_path: Path) -> None:
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 0], rgba[0, :, 3] = 200, (0, 128, 255)
    Image.fromarray(rgba).save(tmp_path / "alpha.png")
    x_CHW = (read_image(tmp_path / "alpha.png") + 1) * 127.5
    half = 128 / 255
    assert torch.allclose(x_CHW[0, 0], torch.tensor([255.0, 200 * half + 255 * (1 - half), 200.0]), atol=1e-3)
    assert torch.allclose(x_CHW[1, 0], torch.tensor([255.0, 255 * (1 - half), 0.0]), atol=1e-3)


def test_grey_with_alpha_and_transparent_palette(tmp_path: Path) -> None:
    Image.fromarray(np.array([[[100, 255], [100, 0]]], np.uint8), "LA").save(tmp_path / "la.png")
    assert levels(tmp_path / "la.png")[0].tolist() == [[100] * 3, [255] * 3]
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "p.png", transparency=0)
    assert levels(tmp_path / "p.png")[0].tolist() == [[255] * 3, [40, 50, 60]]


def test_bilevel_and_grey_become_rgb(tmp_path: Path) -> None:
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "bit.png")
    assert levels(tmp_path / "bit.png")[0].tolist() == [[255] * 3, [0] * 3]
    Image.fromarray(np.array([[7, 77]], np.uint8)).save(tmp_path / "grey.bmp")
    assert levels(tmp_path / "grey.bmp")[0].tolist() == [[7] * 3, [77] * 3]


def test_16_bit_grey_spans_the_whole_range(tmp_path: Path) -> None:
    png_16(tmp_path / "grey.png", np.array([[[0], [0x80FF], [65535]]]))
    expected = torch.tensor([-1.0, 0x80FF / 32767.5 - 1, 1.0])
    assert torch.allclose(read_image(tmp_path / "grey.png")[:, 0], expected.expand(3, 3), atol=1e-6)


@pytest.mark.parametrize("channels", [3, 4, 2])
def test_16_bit_colour_keeps_its_low_byte(tmp_path: Path, channels: int) -> None:
    values = np.random.default_rng(1).integers(0, 65536, (6, 9, channels))
    if channels != 3:
        values[..., -1] = 65535
    png_16(tmp_path / "deep.png", values)
    expected = np.broadcast_to(values[..., : 1 if channels == 2 else 3], (6, 9, 3)) / 32767.5 - 1
    x_HWC = read_image(tmp_path / "deep.png").permute(1, 2, 0).numpy()
    assert np.abs(x_HWC - expected).max() < 1e-6


def test_16_bit_transparency_is_laid_over_white(tmp_path: Path) -> None:
    png_16(tmp_path / "clear.png", np.array([[[0, 0, 0, 0], [0, 0, 0, 32768]]]))
    x_CHW = read_image(tmp_path / "clear.png")
    assert torch.allclose(x_CHW[:, 0, 0], torch.ones(3))
    assert torch.allclose(x_CHW[:, 0, 1], torch.full((3,), 1 - 2 * 32768 / 65535), atol=1e-5)


def test_cmyk_jpeg(tmp_path: Path) -> None:
    Image.new("CMYK", (16, 16), (255, 0, 0, 0)).save(tmp_path / "cyan.jpg", quality=100)
    assert np.abs(levels(tmp_path / "cyan.jpg").astype(int) - [0, 255, 255]).max() <= 2


def test_an_embedded_profile_is_converted_to_srgb(tmp_path: Path) -> None:
    red = Image.new("RGB", (4, 4), (255, 0, 0))
    red.save(tmp_path / "red.png", icc_profile=profile_with_red_and_green_exchanged())
    assert np.abs(levels(tmp_path / "red.png").astype(int) - [0, 255, 0]).max() <= 2
    red.save(tmp_path / "plain.png", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    assert levels(tmp_path / "plain.png")[0, 0].tolist() == [255, 0, 0]


def test_a_profile_converts_the_colours_of_a_transparent_picture(tmp_path: Path) -> None:
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (255, 0, 0, 0))
    image.save(tmp_path / "red.png", icc_profile=profile_with_red_and_green_exchanged())
    assert np.abs(levels(tmp_path / "red.png")[0].astype(int) - [[0, 255, 0], [255, 255, 255]]).max() <= 2


def test_an_unusable_profile_is_ignored_aloud(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2), (9, 8, 7)).save(tmp_path / "odd.png", icc_profile=b"not a profile")
    with pytest.warns(UserWarning, match="colour profile does not fit"):
        assert levels(tmp_path / "odd.png")[0, 0].tolist() == [9, 8, 7]


def test_what_is_no_picture_is_refused_in_one_line(tmp_path: Path, photo: np.ndarray) -> None:
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.png").touch()
    Image.fromarray(np.zeros((2, 2), np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(np.full((2, 2), 70_000, np.int32)).save(tmp_path / "wide.tif")
    for name, reason in {
        "text.png": "is not an image",
        "empty.png": "is empty",
        "missing.png": "No such file",
        "": "is a folder",
        "float.tif": "without a known white",
        "wide.tif": "without a known white",
    }.items():
        with pytest.raises(MediaError, match=reason) as caught:
            read_image(tmp_path / name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_a_truncated_picture_is_refused(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(2).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = io.BytesIO()
    Image.fromarray(noise).save(whole, {".png": "PNG", ".jpg": "JPEG", ".webp": "WEBP"}[suffix])
    path = tmp_path / f"cut{suffix}"
    path.write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    with pytest.raises(MediaError, match=r"cut\."):
        read_image(path)


def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("1", (64, 64)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(MediaError, match="more pixels than is safe"):
        read_image(tmp_path / "bomb.png")


def test_what_cannot_be_written_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    x_CHW = torch.zeros(3, 4, 4)
    broken = x_CHW.clone()
    broken[1, 2, 3] = float("nan")
    (tmp_path / "file").touch()
    before = sorted(tmp_path.iterdir())
    for path, picture, reason in [
        (tmp_path / "a.png", broken, "1 of 48 values are not finite"),
        (tmp_path / "a.png", x_CHW / 0, "not finite"),
        (tmp_path / "a.xyz", x_CHW, "choose one of these suffixes"),
        (tmp_path / "no" / "a.png", x_CHW, "does not exist; create it first"),
        (tmp_path / "file" / "a.png", x_CHW, "cannot write"),
        (tmp_path / "b.webp", torch.zeros(3, 1, 20_000), "cannot write"),
    ]:
        with pytest.raises(MediaError, match=reason):
            write_image(path, picture)
    for shape in [(1, 3, 4, 4), (4, 4, 4), (3, 0, 4)]:
        with pytest.raises(ShapeError, match=r"\(3, H, W\)"):
            write_image(tmp_path / "a.png", torch.zeros(shape))
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_keeps_the_old_file_and_no_temporary_one(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "result.png"
    target.write_text("old")

    def fail_half_way() -> None:
        with atomic_output(target) as temporary:
            temporary.write_text("half")
            assert (temporary.suffix, temporary.parent) == (".png", tmp_path)
            raise error

    with pytest.raises(error):
        fail_half_way()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_success_replaces_the_file_with_ordinary_permissions(tmp_path: Path) -> None:
    target = tmp_path / "result.bin"
    target.write_text("old")
    with atomic_output(target) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    (tmp_path / "reference").touch()
    assert target.stat().st_mode == (tmp_path / "reference").stat().st_mode


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real.txt").touch()
    (tmp_path / "link.txt").symlink_to(tmp_path / "real.txt")
    with atomic_output(tmp_path / "link.txt") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text() == "new"


def test_a_folder_or_a_device_is_no_target(tmp_path: Path) -> None:
    for target, reason in [(tmp_path, "is a folder"), (Path(os.devnull), "not a regular file")]:
        with pytest.raises(MediaError, match=reason), atomic_output(target):
            pytest.fail("the block must not run")
    assert Path(os.devnull).exists()


def test_media_kind() -> None:
    names = ["a.PNG", "b.tar.jpeg", "c.mp4", "d.gif", "e.flac", "f.opus"]
    assert [media_kind(name) for name in names] == ["image", "image", "video", "video", "audio", "audio"]
    for name in ["a.txt", "png", ""]:
        with pytest.raises(MediaError, match=r"\.webm"):
            media_kind(name)


def test_a_missing_library_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(MediaError, match=r"Pillow is not installed; run: pip install \"fastvideo-vae-core\[media\]\""):
        read_image(tmp_path / "a.png")


def test_asking_for_a_kind_imports_no_torch() -> None:
    code = "import sys, fastvideo_vae_core.media as m; m.media_kind('a.png'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
