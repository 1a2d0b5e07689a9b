"""ESVAE: a spiking VAE whose latent is a firing rate, with a prior that needs one pass to draw."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._checks import check_weights
from .block import Neuron, evaluating
from .rate import GaussianMixturePrior, LearnedPrior, rbf_mmd, spikes_from_rate
from .spiking_vae import SpikingVAE

PRIORS = ("learned", "gaussian_mixture")


class ESVAEOutput(NamedTuple):
    """What a pass gives: the reconstruction and rates of both latent distributions."""

    image: Tensor  #: ``[N, C, H, W]`` in [-1, 1]
    q: Tensor  #: posterior rates ``[N, latent]``
    p: Tensor  #: rates drawn from the learned prior ``[N, latent]``


class ESVAE(SpikingVAE):
    r"""Efficient Spiking VAE: the latent is a rate, from which the spikes of each step are drawn.

    .. math::
        r_q = \mathrm{mean}_t\, \mathrm{encoder}(x)[t], \quad
        r_p = \mathrm{sigmoid}(W n + b),\ n \sim N(0, I); \qquad
        z[t] = 1[r > u[t]],\ u[t] \sim U(0, 1)

    Trained by the squared error and ``mmd_weight`` times the MMD of ``r_q`` and ``r_p``. The
    learned prior can be replaced after training by a mixture of Gaussians fitted to the training
    images' ``r_q``: :meth:`fit_prior`.

    Args:
        prior: what :meth:`sample` draws from, ``"learned"`` or ``"gaussian_mixture"``.
        components: Gaussians in the mixture.
        covariance: of each: full, tied, diag or spherical.
        iterations: of the mixture's fit, at most.
        mmd_weight: the weight of the MMD beside the squared error.
        args: and ``kwargs``: those of :class:`~sj_taid.model.spiking_vae.SpikingVAE`.

    Raises:
        ValueError: a bad argument, or images of another shape; outside training also
            values beyond [-1, 1] or NaN.

    Source: Zhan et al., arXiv 2310.14839; the mixture as in Ghosh et al., arXiv 1903.12436.

    >>> model = ESVAE(image_size=8, T=4, hidden_channels=(4, 8), latent_channels=6)
    >>> output = model(torch.rand(2, 1, 8, 8))
    >>> output.image.shape, output.q.shape, model.sample(5).shape
    (torch.Size([2, 1, 8, 8]), torch.Size([2, 6]), torch.Size([5, 1, 8, 8]))
    """

    def __init__(
        self,
        *args: Any,
        prior: str = "learned",
        components: int = 10,
        covariance: str = "full",
        iterations: int = 100,
        mmd_weight: float = 1e-3,
        **kwargs: Any,
    ) -> None:
        check_weights(mmd_weight=mmd_weight)
        self.prior = _known(prior)
        self.components = components
        self.covariance = covariance
        self.iterations = iterations
        self.mmd_weight = mmd_weight
        super().__init__(*args, **kwargs)

    def _make_latent(self, neuron: Neuron) -> None:
        d = self.latent_channels
        self.learned = LearnedPrior(d)
        self.gaussian_mixture = GaussianMixturePrior(
            d, self.components, self.covariance, levels=self.T, iterations=self.iterations
        )

    def forward(self, image: Tensor) -> ESVAEOutput:
        """Reconstruct ``image`` ``[N, C, H, W]`` in [-1, 1]."""
        rate = self.rate(image)
        reconstruction = self.decode(spikes_from_rate(rate, self.T))
        return ESVAEOutput(reconstruction, rate, self.learned(len(image)))

    def rate(self, image: Tensor) -> Tensor:
        """The posterior rate ``[N, latent]`` of ``image`` ``[N, C, H, W]``."""
        return self.encode(image).mean(0)

    def latent_spikes(self, image: Tensor) -> Tensor:
        return spikes_from_rate(self.rate(image), self.T)

    def sample_latent(self, n: int) -> Tensor:
        return spikes_from_rate(getattr(self, self.prior)(n), self.T)

    def fit_prior(self, images: Iterable[Tensor], seed: int = 0) -> None:
        """Fit the mixture to the rates of ``images``, batches ``[N, C, H, W]`` of training images.

        In eval mode and without gradient; after, every module is back in the mode it was in.

        Raises:
            TypeError: batches that are no tensors, as those with labels.
            ValueError: fewer images than components, or none.
        """
        with evaluating(self), torch.no_grad():
            rates = [self.rate(_alone(image)).float() for image in images]
        if not rates:
            raise ValueError(
                "no batch of images to fit the prior to; an iterator that was read through gives "
                "none again"
            )
        self.gaussian_mixture.fit(torch.cat(rates), seed)

    @contextmanager
    def drawing_from(self, prior: str) -> Iterator[None]:
        """Inside, :meth:`sample` draws from ``prior``."""
        before, self.prior = self.prior, _known(prior)
        try:
            yield
        finally:
            self.prior = before

    def training_loss(self, image: Tensor, progress: float = 0.0) -> dict[str, Tensor]:
        """``loss`` and its terms: those of the images, and the weighted MMD of q and p."""
        output = self(image)
        return self.summed(output.image, image, self.mmd_weight * rbf_mmd(output.q, output.p))


def _alone(image: Any) -> Tensor:
    if not isinstance(image, Tensor):
        raise TypeError(
            f"expected batches of images alone, but got a {type(image).__name__}; of a loader with "
            "labels give (image for image, label in loader)"
        )
    return image


def _known(prior: str) -> str:
    if prior not in PRIORS:
        raise ValueError(f"prior must be one of {', '.join(PRIORS)}, but it is {prior!r}")
    return prior
