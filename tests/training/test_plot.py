"""What the pictures show."""

import pytest
import torch
from matplotlib.figure import Figure
from torchvision.io import decode_image

from sj_taid.training import plot
from sj_taid.training.plot import _label, draw_classes, draw_confusion, draw_pairs


@pytest.mark.parametrize("names", [[], ["a gesture of both hands" * 4] * 2], ids=len)
def test_draw_confusion_cuts_no_class_name(tmp_path, names):
    draw_confusion(torch.tensor([[5, 1], [0, 7]]), names, tmp_path / "a.png")
    white = decode_image(tmp_path / "a.png").eq(255).all(0)
    assert white[[0, -1]].all() and white[:, [0, -1]].all()


@pytest.mark.parametrize(("first", "last"), [(1, 1), (0, 20), (1, 21)])
def test_ticks_are_whole_numbers_within_the_curve(first, last):
    axis = Figure().subplots()
    axis.plot(range(first, last + 1), [0.0] * (last + 1 - first))
    _label(axis, "epoch", "loss")
    ticks = axis.get_xticks()
    assert len(ticks) and (ticks == ticks.round()).all()
    assert first <= ticks.min() and ticks.max() <= last


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


@pytest.mark.parametrize("n", [1, 5])
def test_draw_pairs_has_each_image_above_its_own_and_says_what_they_are(tmp_path, monkeypatch, n):
    images, drawn = torch.arange(n).div(8)[:, None, None, None].expand(n, 1, 8, 8), []
    draw_pairs(images, -images, tmp_path / "a.png", 4, ("test image", "through the model"))
    picture = decode_image(tmp_path / "a.png")[0]
    assert picture[:, :20].lt(100).any()  # words at the left
    monkeypatch.setattr(plot, "draw_grid", lambda *how: drawn.append(how))
    draw_pairs(images, -images, tmp_path / "a.png", 4, ("a", "b"))
    ((grid, _, columns, names),) = drawn
    rows = grid[:, 0, 0, 0].split(columns)
    assert [*names] == ["a", "b"] * (len(rows) // 2)
    flat = torch.cat(rows[::2]), torch.cat(rows[1::2])
    assert torch.equal(flat[0][:n], images[:, 0, 0, 0]) and torch.equal(flat[1][:n], -flat[0][:n])
    assert all(part[n:].eq(1).all() for part in flat)  # white
