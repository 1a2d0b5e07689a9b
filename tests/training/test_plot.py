"""What the pictures show."""

import pytest
import torch
from torchvision.io import decode_image

from sj_taid.training.plot import draw_confusion, draw_grid, draw_recordings


@pytest.mark.parametrize("names", [[], ["a", "b"], ["a gesture of both hands" * 4] * 2], ids=len)
def test_draw_confusion_cuts_no_class_name(tmp_path, names):
    draw_confusion(torch.tensor([[5, 1], [0, 7]]), names, tmp_path / "a.png")
    white = decode_image(tmp_path / "a.png").eq(255).all(0)
    assert white[[0, -1]].all() and white[:, [0, -1]].all()


@pytest.mark.parametrize("size", [8, 32, 64, 2000])
def test_draw_grid_is_about_1000_pixels_wide(tmp_path, size):
    draw_grid(torch.zeros(2, 1, 4, size), tmp_path / "a.png", 1)
    assert 700 <= decode_image(tmp_path / "a.png").shape[-1] - 8 <= max(1400, size)


def test_draw_recordings_colours_both_polarities(tmp_path):
    frames = torch.zeros(1, 2, 2, 2, 2)
    frames[0, 0, 0, 0, 0] = 4.0  # darker, in the first frame
    frames[0, 1, 1, 1, 1] = 4.0  # brighter, in the second
    draw_recordings(frames, tmp_path / "a.png")
    picture = decode_image(tmp_path / "a.png").permute(1, 2, 0).flatten(0, 1)
    colours = {tuple(colour) for colour in picture.unique(dim=0).tolist()}
    assert colours == {(255, 255, 255), (0, 0, 255), (255, 0, 0)}
