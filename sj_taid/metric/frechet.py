"""The Frechet distance between two sets of images, and FAD, through an autoencoder's codes."""

import hashlib
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torchmetrics
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from .._internal.checks import expand_home
from ..model.autoencoder import Autoencoder
from ..model.block import check_values


class Features(nn.Module):
    """A network from images ``[N, C, H, W]`` in [-1, 1] to features ``[N, num_features]``.

    A subclass sets ``num_features`` and ``description``, which names the network in protocols,
    defines ``extract(images)``, and calls ``freeze()`` at the end of its constructor.

    Raises:
        ValueError: images with NaN, infinite values or values beyond [-1, 1].
    """

    num_features: int
    description: str

    def freeze(self) -> None:
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode: a metric must not learn."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        check_values(self, images, bound=1.0)
        with torch.autocast(images.device.type, enabled=False):  # or metrics would be in bfloat16
            return self.extract(images.float())

    def extract(self, images: Tensor) -> Tensor:
        raise NotImplementedError


def check_image_count(metric: str, needed: int, **counts: int) -> None:
    """Raise a ``ValueError`` if there are fewer images of a kind than a metric needs."""
    for kind, count in counts.items():
        if count < needed:
            raise ValueError(
                f"{metric} needs at least {needed} images, and the papers use 5000, but got "
                f"{count} {kind} ones; add images"
            )


class FrechetDistance(FrechetInceptionDistance):
    r"""Frechet distance between real and generated images, as if their features were Gaussian.

    .. math::
        d^2 = |\mu_r - \mu_g|^2
              + \mathrm{tr}(\Sigma_r + \Sigma_g - 2 (\Sigma_r \Sigma_g)^{1/2})

    with mean and covariance of the features of real and generated images, in float64. Lower is
    better. With :class:`~sj_taid.metric.Inception` it is FID, with
    :class:`~sj_taid.metric.AutoencoderCodes` FAD.

    A torchmetrics metric: states are sums, so results are right under DDP and independent of the
    batches. It draws no random numbers.

    Args:
        features: the network that turns images into features.
        kwargs: arguments of torchmetrics' ``FrechetInceptionDistance``.

    Raises:
        ValueError: images that are not finite or beyond [-1, 1]; at ``compute``, too few images for
            a covariance.

    Source: Heusel et al. 2017, arXiv 1706.08500, equation 6.
    """

    def __init__(self, features: Features, **kwargs: Any) -> None:
        super().__init__(feature=features, **kwargs)
        self.needed = features.num_features + 1
        self.protocol = (
            f"Frechet distance of {features.num_features} features of {features.description}, "
            f"torchmetrics {torchmetrics.__version__}"
        )

    def compute(self) -> Tensor:
        """The distance of all images so far."""
        real, generated = map(int, (self.real_features_num_samples, self.fake_features_num_samples))
        check_image_count("the Frechet distance", self.needed, real=real, generated=generated)
        return super().compute()


class AutoencoderCodes(Features):
    """Latent codes of a trained :class:`~sj_taid.model.Autoencoder`, for our own FAD.

    They fit grey images better than Inception, which was trained on colour photographs. Values
    compare only through the same autoencoder.

    Source: Kamata et al. 2022, arXiv 2110.00375, section 5.
    """

    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.num_features = autoencoder.latent_channels
        self.description = f"this project's own autoencoder (weights {_digest(autoencoder)})"
        self.freeze()

    def extract(self, images: Tensor) -> Tensor:
        return self.autoencoder.encode(images)


class PublishedFrechetAutoencoderDistance(FrechetDistance):
    r"""FAD as published: through the autoencoders and statistics of the FSVAE repository.

    Values compare with the papers' tables, and never with values of our own autoencoder. In the
    papers' protocol batch norm takes the statistics of each batch, so a value needs batches of 256
    images, 20 of them.

    Args:
        folder: holds ``<name>_64.pth`` and ``<name>_test_64.npz``, from the folders
            ``metrics/stat_checkpoints`` and ``metrics/stats`` of
            https://github.com/kamata1729/FullySpikingVAE.
        name: ``"mnist"`` or ``"fashion"``; images are ``[N, 1, 32, 32]`` in [-1, 1].
        kwargs: arguments of torchmetrics' ``FrechetInceptionDistance``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: images of another shape, not finite or beyond [-1, 1].

    Source: Kamata et al. 2022, arXiv 2110.00375, section 5, and its code.
    """

    batch_size, batches = 256, 20

    def __init__(self, folder: str | Path, name: str, **kwargs: Any) -> None:
        folder = expand_home(folder)
        super().__init__(PublishedCodes(folder / f"{name}_64.pth"), **kwargs)
        with np.load(folder / f"{name}_test_64.npz") as arrays:
            mean, covariance = (torch.tensor(arrays[key]).double() for key in ("mu", "sigma"))
        # torchmetrics keeps sums over the images; their number cancels out.
        n = 10_000
        self.real_features_sum = n * mean
        self.real_features_cov_sum = (n - 1) * covariance + n * torch.outer(mean, mean)
        self.real_features_num_samples = torch.tensor(n)
        self.reset_real_features = False
        self.protocol += f", as published: batch norm by batches of {self.batch_size}"


class PublishedCodes(Features):
    """Codes of the papers' autoencoder, whose weights are in the file ``path``.

    Batch norm takes the statistics of each batch, as in the papers.
    """

    num_features = 64

    def __init__(self, path: Path) -> None:
        super().__init__()
        norm = partial(nn.BatchNorm2d, track_running_stats=False)
        blocks = (
            (nn.Conv2d(a, b, 3, 2, 1), norm(b), nn.LeakyReLU())
            for a, b in pairwise((1, 32, 64, 128, 256))
        )
        self.encoder = nn.Sequential(*(nn.Sequential(*block) for block in blocks))
        self.latent_layer = nn.Linear(256 * 2 * 2, self.num_features)
        state = torch.load(path, map_location="cpu", weights_only=True)
        self.load_state_dict({name: state[name] for name in self.state_dict()})
        self.description = f"the papers' autoencoder {path.stem} (weights {_digest(self)})"
        self.freeze()

    def extract(self, images: Tensor) -> Tensor:
        if images.shape[1:] != (1, 32, 32):
            raise ValueError(
                f"the papers' autoencoder takes images [N, 1, 32, 32], but got {list(images.shape)}"
            )
        return self.latent_layer(self.encoder(images).flatten(1))


def _digest(network: nn.Module) -> str:
    """The first digits of a SHA-256 of a network's weights."""
    digest = hashlib.sha256()
    for value in network.state_dict().values():
        digest.update(value.cpu().double().numpy().tobytes())
    return digest.hexdigest()[:8]
