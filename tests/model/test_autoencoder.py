"""The plain autoencoder and the VAE."""

import math

import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

from sj_taid.model import VAE, Autoencoder
from sj_taid.model.autoencoder import VAEOutput
from tests.model.conftest import images

SMALL = {"in_channels": 1, "image_size": 8, "hidden_channels": (8, 16), "latent_channels": 12}


KINDS = pytest.mark.parametrize("kind", [Autoencoder, VAE])


@KINDS
def test_learns_to_reconstruct(kind):
    model = kind(**SMALL)
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
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_vae_loss_is_the_evidence_lower_bound(monkeypatch):
    output = VAEOutput(images(8), torch.randn(8, 12), torch.randn(8, 12))
    monkeypatch.setattr(VAE, "forward", lambda self, image: output)
    image = images(8)
    pixels = image[0].numel()
    log_likelihood = Independent(Normal(output.image, 1.0), 3).log_prob(image)
    posterior = Independent(Normal(output.mean, (output.log_variance / 2).exp()), 1)
    prior = Independent(Normal(torch.zeros(8, 12), 1.0), 1)
    bound = (log_likelihood - kl_divergence(posterior, prior)).mean()
    expected = -2 / pixels * bound - math.log(2 * math.pi)
    losses = VAE(**SMALL).training_loss(image)
    torch.testing.assert_close(losses["loss"], expected)
    assert losses["loss"] == losses["reconstruction"] + losses["latent"]
    heavier = VAE(**SMALL, kl_weight=1.0).training_loss(image)
    torch.testing.assert_close(heavier["latent"], losses["latent"] * pixels / 2)


def test_vae_draws_codes_around_their_mean():
    model = VAE(**SMALL).eval()
    image = images(1).expand(64, -1, -1, -1)
    assert model(image).image.std(0).max() > 0
    with torch.no_grad():
        model.encoder[-1].bias[12:] = -100  # no variance: the mean itself
    output = model(image)
    torch.testing.assert_close(output.image, model.decode(output.mean))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_vae_samples_in_its_weights_dtype(dtype):
    assert VAE(1, 8, (4, 8), 6).to(dtype).sample(2).dtype == dtype


def test_vae_samples_in_eval_mode_and_leaves_the_modes():
    model = VAE(**SMALL)
    statistics = model.decoder[3].running_mean.clone()
    samples = model.sample(5)
    assert samples.shape == (5, 1, 8, 8) and samples.abs().max() <= 1
    assert not samples.requires_grad and model.training
    assert torch.equal(model.decoder[3].running_mean, statistics)
    assert samples.std(0).max() > 0


@KINDS
def test_bad_size(kind):
    with pytest.raises(ValueError, match="image_size=12 cannot be halved 3 times"):
        kind(1, 12, (4, 4, 4), 2)
    with pytest.raises(ValueError, match="latent_channels must be an integer >= 1, but it is 0"):
        kind(**SMALL | {"latent_channels": 0})
    with pytest.raises(
        ValueError, match=r"expects images \[N, 1, 8, 8\], but got \[2, 1, 16, 16\]"
    ):
        kind(**SMALL)(torch.zeros(2, 1, 16, 16))


@KINDS
def test_bad_values(kind):
    model = kind(**SMALL).eval()
    assert model(torch.ones(1, 1, 8, 8)).image.isfinite().all()
    with pytest.raises(ValueError, match=r"values from 0 to 255, but expects .*\[-1, 1\]; scale"):
        model(torch.tensor([0.0, 255]).expand(1, 1, 8, 4, 2).flatten(3))


def test_bad_weight_of_the_divergence():
    with pytest.raises(ValueError, match="kl_weight must be a number >= 0, but it is -1"):
        VAE(**SMALL, kl_weight=-1)
