"""What the pictures show."""

import math

import pytest
import torch
from torchvision.io import decode_image

from sj_taid.training.plot import draw_confusion, mean_gradient, spectrum


@pytest.mark.parametrize("names", [[], ["a", "b"], ["a gesture of both hands" * 4] * 2], ids=len)
def test_draw_confusion_cuts_no_class_name(tmp_path, names):
    draw_confusion(torch.tensor([[5, 1], [0, 7]]), names, tmp_path / "a.png")
    white = decode_image(tmp_path / "a.png").eq(255).all(0)
    assert white[[0, -1]].all() and white[:, [0, -1]].all()


def test_spectrum_of_a_wave_has_its_frequency_alone():
    wave = torch.cos(2 * math.pi * 3 * torch.arange(8) / 8).expand(2, 1, 8, 8)
    power = spectrum(wave)
    # By Parseval its ring holds the sum of squares, 8 rows of 8 / 2, shared by the ring's entries.
    frequencies = [(a, b) for a in range(-4, 4) for b in range(-4, 4) if 3 <= math.hypot(a, b) < 4]
    assert torch.allclose(power, torch.tensor([0, 0, 0, 32 / len(frequencies), 0]).double())


def test_spectrum_of_blurred_noise_lacks_high_frequencies():
    noise = torch.rand(4, 1, 9, 9, generator=torch.Generator().manual_seed(0))
    blurred = torch.nn.functional.avg_pool2d(noise, 3, 1, 1)
    assert len(spectrum(noise)) == 5
    assert (spectrum(blurred)[3:] < 0.5 * spectrum(noise)[3:]).all()


def test_mean_gradient_is_that_of_neighbours_in_a_row():
    image = torch.tensor([[0.0, 1.0, -1.0], [5.0, 5.0, 5.0]])
    assert mean_gradient(image[None, None]) == (1 + 2 + 0 + 0) / 4
