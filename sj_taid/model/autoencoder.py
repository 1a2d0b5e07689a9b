"""A plain (non-spiking) autoencoder of FSVAE's shape: the feature extractor of the FAD metric."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from .block import halved

__all__ = ["Autoencoder"]


class Autoencoder(nn.Module):
    """Convolutions of stride 2 with batch norm and ReLU down to a linear code, mirrored back.

    Args:
        in_channels: image channels C.
        image_size: height and width, divisible by two once for each hidden width.
        hidden_channels: widths of the encoder.
        latent_channels: width of the code.

    Source: the evaluation of Kamata et al. 2022, arXiv 2110.00375 (latent 64 for MNIST and
    FashionMNIST, 128 for CIFAR10 and CelebA).

    >>> import torch
    >>> autoencoder = Autoencoder(1, 16, (8, 16), 10)
    >>> image = torch.rand(3, 1, 16, 16)
    >>> autoencoder.encode(image).shape, autoencoder(image).shape
    (torch.Size([3, 10]), torch.Size([3, 1, 16, 16]))
    """

    def __init__(
        self,
        in_channels: int,
        image_size: int,
        hidden_channels: tuple[int, ...],
        latent_channels: int,
    ) -> None:
        super().__init__()
        widths = tuple(hidden_channels)
        side = halved(image_size, widths)
        code = widths[-1] * side * side
        self.in_channels = in_channels
        self.image_size = image_size
        self.latent_channels = latent_channels

        down: list[nn.Module] = []
        for a, b in pairwise((in_channels, *widths)):
            conv = nn.Conv2d(a, b, 3, stride=2, padding=1)
            down += [conv, nn.BatchNorm2d(b), nn.ReLU()]
        self.encoder = nn.Sequential(*down, nn.Flatten(), nn.Linear(code, latent_channels))

        up: list[nn.Module] = [
            nn.Linear(latent_channels, code),
            nn.Unflatten(1, (widths[-1], side, side)),
        ]
        for a, b in pairwise((*reversed(widths), widths[0])):
            conv_transpose = nn.ConvTranspose2d(a, b, 3, stride=2, padding=1, output_padding=1)
            up += [conv_transpose, nn.BatchNorm2d(b), nn.ReLU()]
        to_image = nn.ConvTranspose2d(widths[0], in_channels, 3, padding=1)
        self.decoder = nn.Sequential(*up, to_image, nn.Tanh())

    def encode(self, image: Tensor) -> Tensor:
        """The code ``[N, latent]`` of ``image`` ``[N, C, H, W]`` in [-1, 1]."""
        return self.encoder(image)

    def forward(self, image: Tensor) -> Tensor:
        """The reconstruction of ``image``, ``[N, C, H, W]`` in [-1, 1]."""
        return self.decoder(self.encode(image))
