"""FAD, the Frechet distance between codes of a plain autoencoder."""

from __future__ import annotations

import hashlib
from typing import Any

from torch import Tensor

from ..model.autoencoder import Autoencoder
from .frechet import Features, FrechetDistance

__all__ = ["FrechetAutoencoderDistance"]


class FrechetAutoencoderDistance(FrechetDistance):
    r"""Frechet distance of generated and real images in an autoencoder's latent space.

    For grey images it is more honest than FID, whose features come from colour photographs. Values
    depend on the autoencoder and are comparable only for one.

    Args:
        autoencoder: a trained :class:`~sj_taid.model.autoencoder.Autoencoder`; put in eval mode.
        kwargs: those of torchmetrics' ``FrechetInceptionDistance``.

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
    >>> fad.protocol
    "Frechet distance of 2 features of this project's own autoencoder (weights ...), ..."
    """

    def __init__(self, autoencoder: Autoencoder, **kwargs: Any) -> None:
        super().__init__(_Codes(autoencoder), **kwargs)
        self.shape = (autoencoder.in_channels, autoencoder.image_size, autoencoder.image_size)

    def update(self, imgs: Tensor, real: bool) -> None:
        """Add images ``[N, C, H, W]`` in [-1, 1] to the real or to the generated ones."""
        if imgs.dim() != 4 or imgs.shape[1:] != self.shape:
            raise ValueError(
                f"FAD's autoencoder was made for images [N, {', '.join(map(str, self.shape))}], "
                f"but got {list(imgs.shape)}"
            )
        super().update(imgs, real)


class _Codes(Features):
    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.num_features = autoencoder.latent_channels
        digest = hashlib.sha256()
        for value in autoencoder.state_dict().values():
            digest.update(value.cpu().double().numpy().tobytes())
        weights = digest.hexdigest()[:8]
        self.description = f"this project's own autoencoder (weights {weights})"
        self.freeze()

    def forward(self, image: Tensor) -> Tensor:
        return self.autoencoder.encode(image)
