"""FAD's autoencoder."""

import torch
from torch.nn import functional as F

from sj_taid.model import Autoencoder
from tests.model.conftest import images

SMALL = {"in_channels": 1, "image_size": 8, "hidden_channels": 8, "latent_channels": 12}


def test_learns_to_reconstruct():
    model = Autoencoder(**SMALL)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    image = images(8)
    errors = []
    for _ in range(40):
        error = F.mse_loss(model(image), image)
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < 0.6 * errors[0]
