"""FAD's autoencoder."""

import torch
from torch.nn import functional as F

from sj_taid.model import Autoencoder
from tests.model.conftest import images


def test_learns_to_reconstruct():
    model, image, errors = Autoencoder(1, 8, 8, 12), images(8), []
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(40):
        errors.append(F.mse_loss(model(image), image))
        optimizer.zero_grad()
        errors[-1].backward()
        optimizer.step()
    assert errors[-1] < 0.6 * errors[0]
