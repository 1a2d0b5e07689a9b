"""Non-spiking networks of FSVAE's shape: FAD's autoencoder, and the VAE to compare with."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._checks import check_count, check_sizes, check_weights
from .block import check_images, encoder_shape, eval_mode


class AutoencoderOutput(NamedTuple):
    """Output of the autoencoder."""

    image: Tensor  #: ``[N, C, H, W]`` in [-1, 1]
    code: Tensor  #: ``[N, latent]``


class VAEOutput(NamedTuple):
    """Output of the VAE: the reconstruction and the posterior, a Gaussian."""

    image: Tensor  #: ``[N, C, H, W]`` in [-1, 1]
    mean: Tensor  #: ``[N, latent]``
    log_variance: Tensor  #: ``[N, latent]``


class _Convolutional(nn.Module):
    """Convolutions of stride 2 with batch norm and ReLU down to a linear layer, mirrored back."""

    code_vectors = 1  # the encoder's outputs, each of the latent width

    def __init__(
        self,
        in_channels: int,
        image_size: int,
        hidden_channels: int | Sequence[int],
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
        to_code = nn.Linear(flat, self.code_vectors * latent_channels)
        self.encoder = nn.Sequential(*down, nn.Flatten(), to_code)

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
        """The code ``[N, code_vectors * latent]`` of ``image`` ``[N, C, H, W]`` in [-1, 1]."""
        check_images(self, image)
        return self.encoder(image)

    def decode(self, code: Tensor) -> Tensor:
        """The image ``[N, C, H, W]`` in [-1, 1] for a code ``[N, latent]``."""
        return self.decoder(code)


class Autoencoder(_Convolutional):
    """The autoencoder whose code FAD compares.

    Convolutions 3x3 of stride 2 with batch norm and ReLU to a linear code, mirrored back to an
    image; tanh.

    Args:
        in_channels: image channels C.
        image_size: height and width, divisible by two once for each hidden width.
        hidden_channels: widths of the encoder, or the first: it doubles until 2x2 pixels are left.
        latent_channels: width of the code.

    Raises:
        ValueError: sizes that do not fit, or images of another shape; outside training also
            values beyond [-1, 1] or NaN.

    Source: the evaluation of Kamata et al. 2022, arXiv 2110.00375 (latent 64 for MNIST and
    FashionMNIST, 128 for CIFAR10 and CelebA).

    >>> autoencoder = Autoencoder(1, 16, (8, 16), 10)
    >>> output = autoencoder(torch.rand(3, 1, 16, 16))
    >>> output.image.shape, output.code.shape
    (torch.Size([3, 1, 16, 16]), torch.Size([3, 10]))
    """

    def forward(self, image: Tensor) -> AutoencoderOutput:
        """Reconstruct ``image`` ``[N, C, H, W]`` in [-1, 1]."""
        code = self.encode(image)
        return AutoencoderOutput(self.decode(code), code)

    def training_loss(self, image: Tensor, progress: float = 0.0) -> dict[str, Tensor]:
        """The squared error, as ``loss``; the same at all times, whatever the ``progress``."""
        reconstruction = F.mse_loss(self(image).image, image)
        return {"loss": reconstruction, "reconstruction": reconstruction}


class VAE(_Convolutional):
    r"""The VAE that FSVAE is compared with: :class:`Autoencoder` with a Gaussian code.

    .. math::
        L = \mathrm{mean}\,(\hat x - x)^2 + \beta \, \mathrm{KL}(N(\mu, \sigma^2) \,|\, N(0, 1))

    KL is summed over the code. With the default :math:`\beta = 2 / CHW`, our choice, :math:`-L` is
    the evidence lower bound of a Gaussian decoder of variance 1, up to a factor and a constant.

    Args:
        in_channels, image_size, hidden_channels, latent_channels: those of :class:`Autoencoder`.
        kl_weight: :math:`\beta`.

    Raises:
        ValueError: as :class:`Autoencoder`, or a weight below 0.

    Source: D. P. Kingma and M. Welling 2014, arXiv 1312.6114; the shape and the role from Kamata et
    al. 2022, arXiv 2110.00375, Table 1.

    >>> model = VAE(1, 16, (8, 16), 10)
    >>> output = model(torch.rand(3, 1, 16, 16))
    >>> output.image.shape, output.mean.shape, model.sample(5).shape
    (torch.Size([3, 1, 16, 16]), torch.Size([3, 10]), torch.Size([5, 1, 16, 16]))
    """

    code_vectors = 2

    def __init__(
        self,
        in_channels: int,
        image_size: int,
        hidden_channels: int | Sequence[int],
        latent_channels: int,
        kl_weight: float | None = None,
    ) -> None:
        super().__init__(in_channels, image_size, hidden_channels, latent_channels)
        self.kl_weight = 2 / (in_channels * image_size**2) if kl_weight is None else kl_weight
        check_weights(kl_weight=self.kl_weight)

    def forward(self, image: Tensor) -> VAEOutput:
        """Reconstruct ``image`` ``[N, C, H, W]`` in [-1, 1] from a draw of its code."""
        mean, log_variance = self.encode(image).chunk(2, dim=1)
        code = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        return VAEOutput(self.decode(code), mean, log_variance)

    def sample(self, n: int) -> Tensor:
        """Draw ``n`` images ``[n, C, H, W]`` in [-1, 1], without gradient and in eval mode.

        Raises:
            ValueError: ``n`` is no integer >= 0.
        """
        check_count(n)
        with eval_mode(self), torch.no_grad():
            weight = next(self.parameters())
            code = torch.randn(n, self.latent_channels, dtype=weight.dtype, device=weight.device)
            return self.decode(code)

    def training_loss(self, image: Tensor, progress: float = 0.0) -> dict[str, Tensor]:
        """``loss`` and its terms; the same at all times, whatever the ``progress``."""
        output, mean, log_variance = self(image)
        reconstruction = F.mse_loss(output, image)
        divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean() / 2
        latent = self.kl_weight * divergence
        return {"loss": reconstruction + latent, "reconstruction": reconstruction, "latent": latent}
