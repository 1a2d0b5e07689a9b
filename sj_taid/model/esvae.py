"""ESVAE: a spiking VAE whose latent is a firing rate.

A rate ``r`` in [0, 1] is the probability of a spike at each time step, ``[N, d]`` for d latent
channels. Source: Zhan et al., arXiv 2310.14839.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .._internal.checks import check, check_flags, check_not_negative, check_sizes, integer
from .._internal.context import eval_mode
from .block import Neuron
from .flow import EPOCHS, FlowPrior, check_enough, check_rates
from .spiking_vae import SpikingVAE, SpikingVAEOutput


def spikes_from_rate(rate: Tensor, T: int, exact: bool = False) -> Tensor:
    r"""Draw spikes ``[T, N, d]`` with the probabilities ``rate`` ``[N, d]``.

    .. math::
        z[t] = 1[r > u[t]], \quad u[t] \sim U(0, 1); \qquad
        \frac{\partial z[t]}{\partial r} := 1[|r - u[t]| < 1/2]

    The gradient is a straight-through one: a rectangle of width 1 around the random threshold.

    With ``exact`` the thresholds are 1/2T, 3/2T, ... in random order: exactly round(T r) spikes, at
    random steps.

    Raises:
        ValueError: a rate outside [0, 1], unless compiled.

    Source: Zhan et al., arXiv 2310.14839, section 3.3.

    >>> spikes_from_rate(torch.tensor([[0.0, 1.0]]), T=3)[:, 0]
    tensor([[0., 1.],
            [0., 1.],
            [0., 1.]])
    """
    check_rates(rate)
    noise = torch.rand(T, *rate.shape, dtype=rate.dtype, device=rate.device)
    if exact:
        noise = ((noise.argsort(0).argsort(0) + 0.5) / T).to(rate.dtype)  # by the rank in time
    near = ((rate - noise).abs() < 0.5).to(rate.dtype)
    return (rate > noise).to(rate.dtype) + near * (rate - rate.detach())


def rbf_mmd(x: Tensor, y: Tensor) -> Tensor:
    r"""Squared maximum mean discrepancy of two samples ``[N, d]``, by RBF kernels.

    .. math::
        k(a, b) = \sum_{j=0}^{4} \exp\!\left(-\frac{|a - b|^2}{2^j \, b_0}\right), \quad
        b_0 = \tfrac{1}{4}\,\mathrm{mean}_{a \ne b} |a - b|^2 \text{ over both samples}; \qquad
        \mathrm{mean}\,k(x, x) + \mathrm{mean}\,k(y, y) - 2\,\mathrm{mean}\,k(x, y)

    The biased estimate: a point counts as its own neighbour. The bandwidth is a constant of the
    gradient. Computed in float32 at least: in half precision the sums of distances overflow.

    Raises:
        ValueError: samples of different shapes, or of less than two points.

    Source: Gretton et al. 2012, JMLR 13; the kernels from Zhan et al., arXiv 2310.14839.

    >>> x = torch.tensor([[0.0], [1.0]])
    >>> rbf_mmd(x, x), rbf_mmd(x, x + 9) > 3
    (tensor(0.), tensor(True))
    """
    if x.dim() != 2 or x.shape != y.shape or len(x) < 2:
        raise ValueError(
            f"rbf_mmd needs two samples [N, d] of one shape, N at least 2, but got {list(x.shape)} "
            f"and {list(y.shape)}"
        )
    n = len(x)
    both = torch.cat([x, y])
    if both.dtype.itemsize < 4:
        both = both.float()
    distance = (both.unsqueeze(0) - both.unsqueeze(1)).square().sum(2)
    bandwidth = distance.detach().sum() / (2 * n * (2 * n - 1)) / 4
    # Where all points are equal any bandwidth gives the distance 0.
    bandwidth = bandwidth.clamp(min=torch.finfo(bandwidth.dtype).tiny * 1e6)
    scales = bandwidth * 2.0 ** torch.arange(5, dtype=both.dtype, device=x.device).view(-1, 1, 1)
    kernel = torch.exp(-distance / scales).sum(0)
    return kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean()


class LearnedPrior(nn.Module):
    """Prior of rates ``sigmoid(W n + b)``, ``n ~ N(0, I)``, learned through the MMD."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, channels)

    def forward(self, n: int) -> Tensor:
        """Draw ``n`` rates ``[n, d]``."""
        weight = self.linear.weight
        noise = torch.randn(n, self.linear.in_features, dtype=weight.dtype, device=weight.device)
        return self.linear(noise).sigmoid()


class ESVAE(SpikingVAE):
    """Efficient Spiking VAE: the latent is a rate, from which the spikes of each step are drawn.

    ``docs/mathematics.md`` has the equations. Trained by the squared error and ``mmd_weight`` times
    the MMD of the rates :math:`r_q` of images and :math:`r_p` of the prior. Samples come from the
    learned prior, ``prior``, or, after :meth:`fit_prior`, from a normalising flow fitted to the
    training images' :math:`r_q`, ``flow``; with labels, of the class that is asked for.

    A channel spikes at each step with probability r: in training, and for samples, whose FAD is
    then lower. Reconstructions in eval mode have exactly :math:`T r_q` spikes instead, at random
    steps (on MNIST a quarter less squared error); so has training with ``exact_counts``.

    All other arguments are the arguments of :class:`~sj_taid.model.spiking_vae.SpikingVAE`.

    Args:
        sample_from: the prior that :meth:`sample` draws from, ``"learned"`` or ``"flow"``; the
            model has a flow only if it is ``"flow"``.
        flow_epochs: epochs of the flow's fit. 48 are enough for 60,000 images and 64 latent
            channels; 128 take 120, and 14,000 images 200.
        mmd_weight: weight of the MMD next to the squared error.
        exact_counts: :math:`T r` spikes, rounded, in each channel at random steps also in training:
            the decoder learns from a latent without noise in its counts.

    Raises:
        TypeError, ValueError: a bad argument or bad images, as SpikingVAE.

    Source: Zhan et al., arXiv 2310.14839; fitting after training as in Ghosh et al., arXiv
    1903.12436.

    >>> model = ESVAE(image_size=8, T=4, hidden_channels=4, latent_channels=6)
    >>> output = model(torch.rand(2, 1, 8, 8))
    >>> output.image.shape, output.q.shape, model.sample(5).shape
    (torch.Size([2, 1, 8, 8]), torch.Size([2, 6]), torch.Size([5, 1, 8, 8]))
    """

    def __init__(
        self,
        *args: Any,
        sample_from: str = "learned",
        flow_epochs: int = EPOCHS,
        mmd_weight: float = 1e-3,
        exact_counts: bool = False,
        **kwargs: Any,
    ) -> None:
        check_not_negative(mmd_weight=mmd_weight)
        check_flags(exact_counts=exact_counts)
        check_sizes(flow_epochs=flow_epochs)
        if sample_from not in ("learned", "flow"):
            raise ValueError(f"sample_from must be learned or flow, but it is {sample_from!r}")
        self.sample_from = sample_from
        self.flow_epochs = flow_epochs
        self.mmd_weight = mmd_weight
        self.exact_counts = exact_counts
        super().__init__(*args, **kwargs)

    def _make_latent(self, neuron: Neuron) -> None:
        d = self.latent_channels
        self.prior = LearnedPrior(d)
        self.flow = FlowPrior(d, self.T) if self.sample_from == "flow" else None

    def forward(self, image: Tensor) -> SpikingVAEOutput:
        """Reconstruct ``image`` ``[N, C, H, W]`` in [-1, 1]; the distributions are of rates."""
        rate = self.rate(image)
        reconstruction = self.decode(self._spikes(rate))
        return SpikingVAEOutput(reconstruction, rate, self.prior(len(image)))

    def rate(self, image: Tensor) -> Tensor:
        """The posterior rate ``[N, latent]`` of ``image`` ``[N, C, H, W]``."""
        return self.encode(image).mean(0)

    def latent_spikes(self, image: Tensor) -> Tensor:
        return self._spikes(self.rate(image))

    def _spikes(self, rate: Tensor) -> Tensor:
        return spikes_from_rate(rate, self.T, exact=self.exact_counts or not self.training)

    @property
    def labels(self) -> list[int]:
        return self.flow.classes if self.flow and self.sample_from == "flow" else []

    def sample_latent(self, n: int, labels: Tensor | None = None) -> Tensor:
        source = self._source(self.sample_from)
        return spikes_from_rate(source(n) if labels is None else source(n, labels), self.T)

    def walk(self, a: Tensor, b: Tensor, steps: int = 8) -> Tensor:
        """Images ``[steps, C, H, W]`` on the way from image ``a`` to ``b``, each ``[C, H, W]``.

        They are decoded from rates at equal steps between the rates of ``a`` and ``b``, with exact
        spike counts; in eval mode, without gradient.

        Raises:
            ValueError: ``steps`` is no integer >= 2; see :class:`ESVAE` for bad images.
        """
        check(integer(2), steps=steps)
        with eval_mode(self), torch.no_grad():
            first, last = self.rate(torch.stack([a, b]))
            way = torch.linspace(0, 1, steps, dtype=first.dtype, device=first.device)
            return self.decode(self._spikes(torch.lerp(first, last, way[:, None])))

    def _source(self, name: str) -> nn.Module:
        source = {"learned": self.prior, "flow": self.flow}.get(name)
        if source is None:
            raise ValueError(f"this model has no prior {name!r}; train one with sample_from=flow")
        return source

    def fit_prior(
        self,
        images: Iterable[Tensor],
        labels: Sequence[int] | Tensor | None = None,
        mirror: bool = False,
        seed: int = 0,
    ) -> None:
        """Fit the flow, which the model must have, to the rates of training images.

        In eval mode and without gradient; after, every module is back in its own mode, and the
        random state as before.

        Args:
            images: batches ``[N, C, H, W]``, or all in one tensor.
            labels: the class of each image, in the order of all of them, for
                ``sample(n, label=...)``.
            mirror: fit it to the mirror image of each image, too.
            seed: of the fit.

        Raises:
            ValueError: a model without a flow, or what :meth:`.FlowPrior.fit` does not take.
        """
        flow: Any = self._source("flow")
        images = images.split(256) if isinstance(images, Tensor) else images
        with eval_mode(self), torch.no_grad():
            rates = [
                torch.stack([self.rate(x), *([self.rate(x.flip(-1))] if mirror else [])], 1)
                for x in images
            ]
        check_enough(sum(map(len, rates)))
        flow.fit(torch.cat(rates).float(), labels, seed, self.flow_epochs)

    @contextmanager
    def draw_from(self, source: str) -> Iterator[None]:
        """Inside, :meth:`sample` draws from ``source``, one of the priors that the model has."""
        self._source(source)
        before, self.sample_from = self.sample_from, source
        try:
            yield
        finally:
            self.sample_from = before

    def training_loss(self, image: Tensor, progress: float = 0.0) -> dict[str, Tensor]:
        """``loss`` and its terms; ``progress`` changes nothing."""
        output = self(image)
        return self.sum_losses(output.image, image, self.mmd_weight * rbf_mmd(output.q, output.p))
