"""The plain autoencoder."""

import pytest
import torch

from sj_taid.model.autoencoder import Autoencoder


def test_learns_to_reconstruct():
    autoencoder = Autoencoder(1, 8, (8, 16), 12)
    optimizer = torch.optim.AdamW(autoencoder.parameters(), 1e-2)
    image = torch.rand(8, 1, 8, 8) * 2 - 1
    errors = []
    for _ in range(30):
        error = (autoencoder(image) - image).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < 0.5 * errors[0]


def test_bad_size():
    with pytest.raises(ValueError, match="image_size=12 cannot be halved 3 times"):
        Autoencoder(1, 12, (4, 4, 4), 2)
