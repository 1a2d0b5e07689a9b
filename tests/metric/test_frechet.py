"""FAD against scipy's matrix root, and as published."""

import numpy as np
import pytest
import torch
from scipy import linalg
from torch import nn

from sj_taid.metric import (
    AutoencoderCodes,
    FrechetDistance,
    InceptionScore,
    Precision,
    PublishedFrechetAutoencoderDistance,
    Recall,
)
from sj_taid.model.autoencoder import Autoencoder
from tests.metric.pixels import Classifying, Pixels


def scipys(real, generated):
    mu_r, mu_g = real.mean(0).numpy(), generated.mean(0).numpy()
    s_r, s_g = np.cov(real.T.numpy()), np.cov(generated.T.numpy())
    root = linalg.sqrtm(s_r @ s_g).real
    return ((mu_r - mu_g) ** 2).sum() + np.trace(s_r + s_g - 2 * root)


def test_frechet_distance_equals_scipys_matrix_root():
    real, generated = (torch.randn(n, 4).double() @ torch.rand(4, 4).double() for n in (400, 300))
    metric = FrechetDistance(Pixels())
    for is_real, codes in ((True, real), (False, generated + 0.5)):
        for part in codes.split(7):
            metric.update(part.view(-1, 1, 2, 2), real=is_real)
    expected = scipys(real, generated + 0.5)
    assert float(metric.compute()) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_is_in_float32_under_autocast_and_of_any_images():
    images, found = torch.rand(300, 1, 8, 8).half(), []
    metric = FrechetDistance(AutoencoderCodes(Autoencoder(1, 8, 4, 2)))
    for enabled, dtype in ((False, torch.float32), (True, torch.float16), (True, torch.float64)):
        metric.reset()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            metric.update(images.to(dtype), real=True)
            metric.update(0.5 * images.to(dtype), real=False)
        found.append(metric.compute())
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    ("metric", "real", "generated", "needed"),
    [
        (FrechetDistance(Pixels()), 50, 4, "at least 5 images, .*but got 4 generated ones"),
        (InceptionScore(Classifying()), 50, 0, "at least 4 images, .*but got 0 generated ones"),
        (InceptionScore(Classifying()), 50, 3, "at least 4 images, .*but got 3 generated ones"),
        (Precision(Pixels(), k=4), 4, 5, "by 4 .* at least 5 images, .*but got 4 real ones; add"),
        (Recall(Pixels(), k=3), 4, 0, "but got 0 generated ones"),
    ],
)
def test_metrics_refuse_too_few_images(metric, real, generated, needed):
    for is_real, n in ((True, real), (False, generated)):
        for image in torch.rand(n, 1, 1, 2, 2):
            metric.update(image, real=is_real)
    with pytest.raises(ValueError, match=needed):
        metric.compute()


def test_autoencoder_codes_refuse_other_images_and_stay_in_eval_mode():
    metric = FrechetDistance(AutoencoderCodes(Autoencoder(1, 8, 4, 2))).train()
    assert not metric.inception.autoencoder.training
    message = r"expects images \[N, 1, 8, 8\], but got \[5, 3, 8, 8\]"
    with pytest.raises(ValueError, match=message):
        metric.update(torch.rand(5, 3, 8, 8), real=True)
    for value in (float("nan"), float("inf"), 255.0, -1.1):
        images = torch.rand(5, 1, 8, 8)
        images[3, 0, 1, 1] = value
        with pytest.raises(ValueError, match=r"got values from .* finite values in \[-1, 1\]"):
            metric.update(images, real=False)


class Network(nn.Module):
    """The papers' autoencoder, as its checkpoints name its layers; in training mode."""

    def __init__(self):
        super().__init__()
        blocks = (
            (nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.LeakyReLU())
            for a, b in ((1, 32), (32, 64), (64, 128), (128, 256))
        )
        self.encoder = nn.Sequential(*(nn.Sequential(*block) for block in blocks))
        self.latent_layer = nn.Linear(1024, 64)
        self.decoder_input = nn.Linear(64, 1024)

    def codes(self, images, batch):
        with torch.no_grad():
            parts = [self.latent_layer(self.encoder(x).flatten(1)) for x in images.split(batch)]
        return torch.cat(parts).double()


@pytest.fixture
def published(tmp_path):
    """A network with made-up weights, images, and the files that stand for both."""
    torch.manual_seed(0)
    network, images = Network(), torch.rand(160, 1, 32, 32) * 2 - 1
    torch.save(network.state_dict(), tmp_path / "mnist_64.pth")
    codes = network.codes(images, 80)
    np.savez(tmp_path / "mnist_test_64.npz", mu=codes.mean(0), sigma=np.cov(codes.T))
    return network, images, codes


def test_published_distance_takes_the_norm_of_each_batch(published, tmp_path):
    network, images, codes = published
    metric = PublishedFrechetAutoencoderDistance(tmp_path, "mnist")
    generated = (images + 0.4).clamp(-1, 1)
    expected = scipys(codes, network.codes(generated, 40))
    for x, batch, value in ((images, 80, 0.0), (generated, 40, expected)):
        metric.reset()  # keeps the published statistics
        for part in x.split(batch):
            metric.update(part, real=False)
        assert float(metric.compute()) == pytest.approx(value, rel=1e-5, abs=1e-4)
    assert "papers' autoencoder mnist_64 (weights " in metric.protocol
    assert "as published: batch norm by batches of 256" in metric.protocol


def test_published_distance_says_what_it_needs(published, tmp_path):
    metric = PublishedFrechetAutoencoderDistance(tmp_path, "mnist")
    with pytest.raises(ValueError, match=r"images \[N, 1, 32, 32\], but got \[5, 1, 28, 28\]"):
        metric.update(torch.zeros(5, 1, 28, 28), real=False)
    with pytest.raises(FileNotFoundError, match=r"fashion_64\.pth"):
        PublishedFrechetAutoencoderDistance(tmp_path, "fashion")
