"""What the pictures show."""

import pytest
import torch
from torchvision.io import decode_image

from sj_taid.training.plot import draw_confusion


@pytest.mark.parametrize("names", [[], ["a", "b"], ["a gesture of both hands" * 4] * 2], ids=len)
def test_draw_confusion_cuts_no_class_name(tmp_path, names):
    draw_confusion(torch.tensor([[5, 1], [0, 7]]), names, tmp_path / "a.png")
    white = decode_image(tmp_path / "a.png").eq(255).all(0)
    assert white[[0, -1]].all() and white[:, [0, -1]].all()
