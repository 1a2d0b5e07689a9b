"""FAD, the Frechet distance between codes of a plain autoencoder."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from ..model.autoencoder import Autoencoder

__all__ = ["FrechetAutoencoderDistance"]


class FrechetAutoencoderDistance(FrechetInceptionDistance):
    r"""Frechet distance of generated and real images in an autoencoder's latent space.

    .. math::
        d^2 = |\mu_r - \mu_g|^2
              + \mathrm{tr}(\Sigma_r + \Sigma_g - 2 (\Sigma_r \Sigma_g)^{1/2})

    with mean and covariance of the codes of real and generated images, in float64. For grey images
    it is more honest than FID, whose features come from colour photographs.

    A torchmetrics metric: states are sums, so results are right under DDP and independent of the
    batches. Lower is better. Values depend on the autoencoder and are comparable only for one.

    Args:
        autoencoder: a trained :class:`~sj_taid.model.autoencoder.Autoencoder`; put in eval mode.

    Raises:
        ValueError: images of another shape; at ``compute``, too few images for a covariance.

    Source: Kamata et al. 2022, arXiv 2110.00375, section 5.

    >>> import torch
    >>> fad = FrechetAutoencoderDistance(Autoencoder(1, 8, (4,), 2))
    >>> images = torch.rand(16, 1, 8, 8)
    >>> fad.update(images, real=True)
    >>> fad.update(images, real=False)
    >>> abs(fad.compute().item()) < 1e-4
    True
    """

    def __init__(self, autoencoder: Autoencoder, **kwargs: Any) -> None:
        super().__init__(feature=_Codes(autoencoder), **kwargs)

    @property
    def codes(self) -> _Codes:
        """What torchmetrics calls the inception network."""
        return cast(_Codes, self.inception)

    def update(self, imgs: Tensor, real: bool) -> None:
        """Add images ``[N, C, H, W]`` in [-1, 1] to the real or to the generated ones."""
        autoencoder = self.codes.autoencoder
        expected = (autoencoder.in_channels, autoencoder.image_size, autoencoder.image_size)
        if imgs.dim() != 4 or imgs.shape[1:] != expected:
            raise ValueError(
                f"FAD's autoencoder was made for images [N, {', '.join(map(str, expected))}], "
                f"but got {list(imgs.shape)}"
            )
        super().update(imgs, real)

    def compute(self) -> Tensor:
        """The distance of all images so far."""
        needed = self.codes.num_features + 1
        counts = {
            "real": int(self.real_features_num_samples),
            "generated": int(self.fake_features_num_samples),
        }
        for kind, count in counts.items():
            if count < needed:
                raise ValueError(
                    f"FAD got {count} {kind} images; a covariance of "
                    f"{self.codes.num_features} features needs at least {needed}, and the "
                    "papers use 5000: add images"
                )
        return super().compute()


class _Codes(nn.Module):
    """From images to features, never in training mode."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.num_features = autoencoder.latent_channels
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> _Codes:
        return super().train(False)

    def forward(self, image: Tensor) -> Tensor:
        return self.autoencoder.encode(image)
