"""The Frechet distance between two sets of images, measured on their features."""

from typing import Any, Self

import torchmetrics
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

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
        return self.extract(images)

    def extract(self, images: Tensor) -> Tensor:
        raise NotImplementedError


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
        kwargs: those of torchmetrics' ``FrechetInceptionDistance``.

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
        counts = self.real_features_num_samples, self.fake_features_num_samples
        for kind, count in zip(("real", "generated"), map(int, counts), strict=True):
            if count < self.needed:
                raise ValueError(
                    f"the Frechet distance got {count} {kind} images; a covariance of "
                    f"{self.needed - 1} features needs at least {self.needed}, and the papers "
                    "use 5000: add images"
                )
        return super().compute()
