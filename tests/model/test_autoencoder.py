"""FAD's autoencoder."""

import pytest
import torch

from sj_taid.model import Autoencoder
from tests.model.conftest import images

SMALL = {"in_channels": 1, "image_size": 8, "hidden_channels": (8, 16), "latent_channels": 12}


def test_learns_to_reconstruct():
    model = Autoencoder(**SMALL)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    image = images(8)
    errors = []
    for _ in range(40):
        losses = model.training_loss(image)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        errors.append(losses["reconstruction"].item())
    assert errors[-1] < 0.6 * errors[0]


def test_bad_images():
    model = Autoencoder(**SMALL).eval()
    with pytest.raises(
        ValueError, match=r"expects images \[N, 1, 8, 8\], but got \[2, 1, 16, 16\]"
    ):
        model(torch.zeros(2, 1, 16, 16))
    with pytest.raises(ValueError, match=r"values from 0 to 255, but expects .*\[-1, 1\]; scale"):
        model(torch.tensor([0.0, 255]).expand(1, 1, 8, 4, 2).flatten(3))
