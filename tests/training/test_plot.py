"""What the pictures show."""

import pytest
import torch
from torchvision.io import decode_image

from sj_taid.training.plot import draw_classes, draw_confusion, draw_recordings


@pytest.mark.parametrize("names", [[], ["a gesture of both hands" * 4] * 2], ids=len)
def test_draw_confusion_cuts_no_class_name(tmp_path, names):
    draw_confusion(torch.tensor([[5, 1], [0, 7]]), names, tmp_path / "a.png")
    white = decode_image(tmp_path / "a.png").eq(255).all(0)
    assert white[[0, -1]].all() and white[:, [0, -1]].all()


class Shades:
    """A generator that draws its classes in shades of grey."""

    def sample(self, n, label):
        return torch.tensor(label).div(4)[:, None, None, None].expand(n, 1, 8, 8)


def test_draw_classes_has_a_named_row_for_each(tmp_path):
    draw_classes(Shades(), [0, 2, 4], tmp_path / "a.png", 5, ["a", "-", "ankle boot", "-", "b"])
    picture = decode_image(tmp_path / "a.png")[0]
    columns, rows = picture[:, -150].unique_consecutive(), picture.eq(255).all(1)
    assert [shade for shade in columns.tolist() if shade < 255] == [127, 191]
    assert not rows.all() and picture[:, :20].lt(100).any()  # words at the left


def test_draw_recordings_colours_both_polarities(tmp_path):
    frames = torch.zeros(1, 2, 2, 2, 2)
    frames[0, 0, 0, 0, 0] = 4.0  # darker, in the first frame
    frames[0, 1, 1, 1, 1] = 4.0  # brighter, in the second
    draw_recordings(frames, tmp_path / "a.png")
    picture = decode_image(tmp_path / "a.png").permute(1, 2, 0).flatten(0, 1)
    colours = {tuple(colour) for colour in picture.unique(dim=0).tolist()}
    assert colours == {(255, 255, 255), (0, 0, 255), (255, 0, 0)}
