"""The figure is read back: the right pixels stand in the right panels."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.data import astronaut

from fastvideo_vae_core import report
from fastvideo_vae_core.errors import MediaError, ShapeError
from fastvideo_vae_core.report import clip_figure, comparison_figure


@pytest.fixture(scope="module")
def photo() -> torch.Tensor:
    return torch.from_numpy(astronaut()).permute(2, 0, 1) / 127.5 - 1


def sheet(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_both_pictures_stand_side_by_side_unblurred(tmp_path: Path, photo: torch.Tensor) -> None:
    x_CHW = photo[:, 100:196, 180:276]
    y_CHW = x_CHW.flip(2)
    comparison_figure(tmp_path / "figure.png", x_CHW, y_CHW, title="costs $5 and $6")
    page = sheet(tmp_path / "figure.png")
    side = 4 * 96
    top = report._MARGIN + report._TITLE + report._NUMBERS + report._HEADING
    for place, picture in enumerate((x_CHW, y_CHW)):
        left = report._MARGIN + place * (side + report._GAP)
        expected = report.to_uint8(picture).permute(1, 2, 0).numpy().repeat(4, 0).repeat(4, 1)
        inside = slice(2, side - 2)  # the outermost pixels carry the frame
        assert np.array_equal(page[top : top + side, left : left + side][inside, inside], expected[inside, inside])


def test_the_error_map_is_bright_where_the_error_is(tmp_path: Path) -> None:
    x_CHW = torch.zeros(3, 64, 64)
    y_CHW = x_CHW.clone()
    y_CHW[1, 40:60, 4:24] = 80 / 127.5
    comparison_figure(tmp_path / "figure.png", x_CHW, y_CHW)
    page = sheet(tmp_path / "figure.png").astype(int)
    scale = report._Scale.of(64, 64)
    left = report._MARGIN + 2 * (scale.w + report._GAP)
    top = report._MARGIN + report._NUMBERS + report._HEADING
    panel = page[top : top + scale.h, left : left + scale.w].sum(-1)
    assert panel[50 * 6, 14 * 6] > 400
    assert panel[10 * 6, 40 * 6] < 20
    assert panel[50 * 6, 40 * 6] < 20


@pytest.mark.parametrize(("height", "width"), [(400, 300), (5, 7), (1, 900), (900, 1), (800, 1100)])
def test_any_size_fits_its_sheet(tmp_path: Path, photo: torch.Tensor, height: int, width: int) -> None:
    x_CHW = torch.nn.functional.interpolate(photo[None], size=(height, width))[0]
    comparison_figure(tmp_path / "figure.png", x_CHW, x_CHW * 0.9, title="a title " * 60)
    page = sheet(tmp_path / "figure.png")
    scale = report._Scale.of(height, width)
    assert max(scale.w, scale.h) <= 720
    assert page.shape[1] < 2500
    border = np.concatenate([page[:8].reshape(-1, 3), page[-8:].reshape(-1, 3), page[:, :8].reshape(-1, 3)])
    border = np.concatenate([border, page[:, -8:].reshape(-1, 3)])
    assert (border == 255).all(), "something runs over the edge of the sheet"


def test_large_pictures_say_that_they_are_scaled_down() -> None:
    scale = report._Scale.of(3024, 4032)
    assert (scale.h, scale.w) == (504, 672)
    assert "4032 × 3024 pixels, shown at 1/6" in scale.note()
    assert report._Scale.of(64, 64).note() == "64 × 64 pixels, shown 6 times as large"


def test_one_wrong_pixel_survives_scaling_down() -> None:
    error_HW = torch.zeros(2000, 2000)
    error_HW[1234, 777] = 200
    shown = report._Scale.of(2000, 2000).map(error_HW)
    assert shown.max() == 200
    assert (shown > 0).sum() == 1


def test_numbers_are_those_of_the_caller_or_measured(tmp_path: Path, photo: torch.Tensor) -> None:
    x_CHW = photo[:, :64, :64]
    measured = report._measured(x_CHW, x_CHW + 1 / 127.5)
    assert measured["PSNR"] == "48.13 dB"
    assert 0.99 < float(measured["SSIM"]) < 1
    assert report._measured(x_CHW, x_CHW)["PSNR"] == "∞ dB"
    assert "SSIM" not in report._measured(x_CHW[:, :8], x_CHW[:, :8])
    assert [report._number(value) for value in (0.5, 31.234, "3 dB", float("inf"))] == ["0.5000", "31.23", "3 dB", "∞"]
    comparison_figure(tmp_path / "a.png", x_CHW, x_CHW, metrics={"LPIPS": 0.1})
    comparison_figure(tmp_path / "b.png", x_CHW, x_CHW, metrics={"LPIPS": 0.2})
    assert (sheet(tmp_path / "a.png") != sheet(tmp_path / "b.png")).any()


def test_bad_input_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    x_CHW = torch.zeros(3, 16, 16)
    for path, y_CHW, error, reason in [
        (tmp_path / "a.jpg", x_CHW, MediaError, r"\.png"),
        (tmp_path / "no" / "a.png", x_CHW, MediaError, "does not exist"),
        (tmp_path / "a.png", x_CHW / 0, MediaError, "not finite"),
        (tmp_path / "a.png", x_CHW[:, 1:], ShapeError, "one shape"),
        (tmp_path / "a.png", x_CHW[None], ShapeError, "one shape"),
    ]:
        with pytest.raises(error, match=reason):
            comparison_figure(path, x_CHW, y_CHW)
    assert list(tmp_path.iterdir()) == []


def test_frames_of_a_clip_stand_below_each_other(tmp_path: Path, photo: torch.Tensor) -> None:
    x_CHW = photo[:, :64, :64]
    frames = [(f"Frame {index}", x_CHW.roll(index, 1), x_CHW.roll(index, 1) * 0.9) for index in range(3)]
    clip_figure(tmp_path / "clip.png", frames, title="a clip", metrics={"PSNR": "1 dB"})
    comparison_figure(tmp_path / "one.png", *frames[0][1:], title="a clip", metrics={"PSNR": "1 dB"})
    clip, one = sheet(tmp_path / "clip.png"), sheet(tmp_path / "one.png")
    row = report._HEADING + report._Scale.of(64, 64).h
    assert clip.shape[0] == one.shape[0] + 2 * row
    assert clip.shape[1] == one.shape[1]
    with pytest.raises(ShapeError, match="frames of one shape"):
        clip_figure(tmp_path / "none.png", [])
    with pytest.raises(ShapeError, match="frames of one shape"):
        clip_figure(tmp_path / "none.png", [*frames, ("other", x_CHW[:, 1:], x_CHW[:, 1:])])
    assert not (tmp_path / "none.png").exists()


def test_pyplot_is_never_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    comparison_figure(tmp_path / "a.png", torch.zeros(3, 16, 16), torch.zeros(3, 16, 16))
    assert (tmp_path / "a.png").exists()


def test_missing_matplotlib_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MediaError, match=r"matplotlib is not installed; run: .*\[report\]"):
        comparison_figure(tmp_path / "a.png", torch.zeros(3, 16, 16), torch.zeros(3, 16, 16))
    assert list(tmp_path.iterdir()) == []
