"""FSVAE: a spiking VAE whose latent are spike trains from autoregressive networks."""

from typing import Any

import torch
from torch import Tensor

from .._internal.checks import SHARE, check, check_sizes
from .block import Neuron
from .latent import Posterior, Prior, mmd_loss
from .spiking_vae import SpikingVAE, SpikingVAEOutput


class FSVAE(SpikingVAE):
    r"""Fully Spiking VAE: a latent of Bernoulli spike trains from autoregressive networks.

    .. math::
        L = \mathrm{mean}\,(\hat x - x)^2 + \mathrm{MMD}(q, p)

    Posterior, prior and their distance: :mod:`sj_taid.model.latent`.

    All other arguments are the arguments of :class:`~sj_taid.model.spiking_vae.SpikingVAE`.

    Args:
        k: candidate spikes of each latent channel.
        own_sample_probability: the prior's scheduled sampling at the start and at the end of
            training, two probabilities. The first steps are never replaced: below T = 7 none is.

    Source: Kamata et al. 2022, arXiv 2110.00375; the image decoder from Qiu et al. 2023,
    arXiv 2406.03046.

    >>> model = FSVAE(image_size=8, T=4, hidden_channels=(4, 8), latent_channels=6, k=3)
    >>> output = model(torch.rand(2, 1, 8, 8))
    >>> output.image.shape, output.q.shape, model.sample(5).shape
    (torch.Size([2, 1, 8, 8]), torch.Size([4, 2, 6, 3]), torch.Size([5, 1, 8, 8]))
    """

    def __init__(
        self,
        *args: Any,
        k: int = 20,
        own_sample_probability: tuple[float, float] = (0.1, 0.3),
        **kwargs: Any,
    ) -> None:
        check_sizes(k=k)
        first, last = own_sample_probability
        for probability in (first, last):
            check(SHARE, own_sample_probability=probability)
        self.k = k
        self.own_sample_probability = first, last
        super().__init__(*args, **kwargs)

    def _make_latent(self, neuron: Neuron) -> None:
        latent = self.latent_channels
        self.posterior = Posterior(2 * latent, latent, self.k, neuron)
        self.prior = Prior(latent, latent, self.k, neuron)

    def forward(
        self, image: Tensor, own_sample_probability: float | Tensor = 0.0
    ) -> SpikingVAEOutput:
        """Reconstruct ``image`` ``[N, C, H, W]`` in [-1, 1].

        ``own_sample_probability`` is the prior's scheduled sampling, used in training. The latent
        distributions are candidates ``[T, N, latent, k]``.
        """
        x_seq = self.encode(image)
        z_seq, q = self.posterior(x_seq, self._picks(len(image)))
        p = self.prior(z_seq, own_sample_probability)
        return SpikingVAEOutput(self.decode(z_seq), q, p)

    def latent_spikes(self, image: Tensor) -> Tensor:
        """Draw the decoder's input ``[T, N, latent]`` for ``image`` ``[N, C, H, W]``."""
        return self.posterior(self.encode(image), self._picks(len(image)))[0]

    def sample_latent(self, n: int, labels: Tensor | None = None) -> Tensor:
        """Draw latent spikes ``[T, n, latent]`` from the prior, step by step; it has no classes."""
        return self.prior.sample(self._picks(n))

    def training_loss(self, image: Tensor, progress: float = 0.0) -> dict[str, Tensor]:
        """``loss`` and its terms; ``progress`` of the training, 0 to 1, sets the own samples."""
        first, last = self.own_sample_probability
        # A tensor: compiled, each float would be a constant of a graph of its own.
        output = self(image, torch.tensor(first + (last - first) * progress))
        return self.sum_losses(output.image, image, mmd_loss(output.q, output.p))

    def _picks(self, n: int) -> Tensor:
        device = next(self.parameters()).device
        return torch.randint(self.k, (self.T, n, self.latent_channels), device=device)
