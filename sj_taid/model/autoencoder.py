"""The non-spiking autoencoder whose code FAD compares."""

from itertools import pairwise

from torch import Tensor, nn

from .._internal.checks import check_sizes
from .block import check_images, encoder_shape


class Autoencoder(nn.Module):
    """The autoencoder whose code FAD compares.

    Convolutions 3x3 of stride 2 with batch norm and ReLU to a linear code, mirrored back to an
    image; tanh.

    Args:
        in_channels: image channels C.
        image_size: height and width, an even number.
        hidden_channels: width of the encoder's first convolution; widths double until 2x2 pixels
            or an odd side are left.
        latent_channels: width of the code.

    Raises:
        ValueError: sizes that do not fit, or images of another shape or range.

    Source: the evaluation of Kamata et al. 2022, arXiv 2110.00375 (latent 64 for MNIST and
    FashionMNIST, 128 for CIFAR10 and CelebA).

    >>> import torch
    >>> autoencoder = Autoencoder(1, 16, 8, 10)
    >>> images = torch.rand(3, 1, 16, 16)
    >>> autoencoder(images).shape, autoencoder.encode(images).shape
    (torch.Size([3, 1, 16, 16]), torch.Size([3, 10]))
    """

    def __init__(
        self,
        in_channels: int,
        image_size: int,
        hidden_channels: int,
        latent_channels: int,
    ) -> None:
        super().__init__()
        check_sizes(in_channels=in_channels, latent_channels=latent_channels)
        widths, side = encoder_shape(hidden_channels, image_size)
        flat = widths[-1] * side * side
        self.in_channels = in_channels
        self.image_size = image_size
        self.latent_channels = latent_channels

        down: list[nn.Module] = []
        for a, b in pairwise((in_channels, *widths)):
            conv = nn.Conv2d(a, b, 3, stride=2, padding=1)
            down += [conv, nn.BatchNorm2d(b), nn.ReLU()]
        self.encoder = nn.Sequential(*down, nn.Flatten(), nn.Linear(flat, latent_channels))

        up: list[nn.Module] = [
            nn.Linear(latent_channels, flat),
            nn.Unflatten(1, (widths[-1], side, side)),
        ]
        for a, b in pairwise((*reversed(widths), widths[0])):
            conv_transpose = nn.ConvTranspose2d(a, b, 3, stride=2, padding=1, output_padding=1)
            up += [conv_transpose, nn.BatchNorm2d(b), nn.ReLU()]
        to_image = nn.ConvTranspose2d(widths[0], in_channels, 3, padding=1)
        self.decoder = nn.Sequential(*up, to_image, nn.Tanh())

    def encode(self, image: Tensor) -> Tensor:
        """The code ``[N, latent]`` of ``image`` ``[N, C, H, W]`` in [-1, 1]."""
        check_images(self, image)
        return self.encoder(image)

    def forward(self, image: Tensor) -> Tensor:
        """Reconstruct ``image`` ``[N, C, H, W]`` in [-1, 1]."""
        return self.decoder(self.encode(image))
