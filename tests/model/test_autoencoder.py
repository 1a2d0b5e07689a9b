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


def test_bad_sizes_and_images():
    with pytest.raises(ValueError, match="image_size=8 cannot be halved 4 times"):
        Autoencoder(**SMALL | {"hidden_channels": (4, 4, 4, 4)})
    with pytest.raises(ValueError, match="latent_channels must be an integer >= 1, but it is 0"):
        Autoencoder(**SMALL | {"latent_channels": 0})
    with pytest.raises(
        ValueError, match=r"expects images \[N, 1, 8, 8\], but got \[2, 1, 16, 16\]"
    ):
        Autoencoder(**SMALL)(torch.zeros(2, 1, 16, 16))
    with pytest.raises(ValueError, match=r"expects .*\[-1, 1\]; scale"):
        Autoencoder(**SMALL).eval()(torch.full((1, 1, 8, 8), 255.0))
