from __future__ import annotations

import math

import pytest
import torch
from PIL import Image

from dit_opt.demo.images import (
    MAX_PSNR_DB,
    UPSCALE,
    amplify_difference,
    compare_clips,
    write_contact_sheet,
    write_gif,
)


@pytest.fixture
def clip() -> torch.Tensor:
    return torch.rand(1, 3, 4, 16, 24, generator=torch.Generator().manual_seed(0)) - 0.5


def test_psnr_of_a_constant_shift_is_its_definition(clip):
    likeness = compare_clips(clip + 0.02, clip)
    assert likeness.psnr_db == pytest.approx(20 * math.log10(2 / 0.02), abs=1e-3)
    assert 0.99 < likeness.ssim < 1


def test_identical_clips_are_as_like_as_can_be(clip):
    likeness = compare_clips(clip, clip)
    assert likeness.psnr_db == MAX_PSNR_DB
    assert likeness.ssim == pytest.approx(1, abs=1e-12)


def test_values_out_of_range_are_shown_clamped_and_compared_so(clip):
    assert compare_clips(clip.sign() * 5, clip.sign()).psnr_db == MAX_PSNR_DB


def test_shuffled_frames_are_unlike(clip):
    likeness = compare_clips(clip.flip(2), clip)
    assert likeness.psnr_db < 20 and likeness.ssim < 0.3


def test_other_shapes_are_refused(clip):
    with pytest.raises(ValueError, match="cannot be compared"):
        compare_clips(clip[:, :, :1], clip)


def test_difference_is_grey_where_clips_agree(clip):
    other = clip.clone()
    other[..., 0, 0] += 0.1
    difference = amplify_difference(other, clip)
    assert torch.count_nonzero(difference) == 3 * 4
    torch.testing.assert_close(difference[0, 0, 0, 0, 0], torch.tensor(0.4))


def test_gif_holds_every_frame_enlarged(clip, tmp_path):
    write_gif(tmp_path / "clip.gif", clip)
    with Image.open(tmp_path / "clip.gif") as gif:
        assert gif.n_frames == 4
        assert gif.size == (24 * UPSCALE, 16 * UPSCALE)
        assert gif.info["loop"] == 0


def test_contact_sheet_shows_each_row_under_its_label(clip, tmp_path):
    path = tmp_path / "sheet.png"
    write_contact_sheet(path, ["title"], [("red", _paint(0)), ("blue", _paint(2))])
    sheet = Image.open(path).convert("RGB")
    counts = {pixel: count for count, pixel in sheet.getcolors(1 << 20)}
    area = 4 * 16 * UPSCALE * 24 * UPSCALE
    assert counts[255, 0, 0] == counts[0, 0, 255] == area


def _paint(channel: int) -> torch.Tensor:
    clip = -torch.ones(1, 3, 4, 16, 24)
    clip[:, channel] = 1
    return clip
