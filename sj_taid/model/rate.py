"""The rate latent: spikes drawn from rates, and the distributions of rates.

A rate ``r`` in [0, 1] is the probability of a spike at each time step, ``[N, d]`` for d latent
channels. Source: Zhan et al., ESVAE, arXiv 2310.14839.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .._checks import check_sizes
from .._extras import needs


def check_rates(rate: Tensor) -> None:
    """Refuse rates that are no probabilities; compiled code is not checked."""
    if not torch.compiler.is_compiling() and not ((rate >= 0) & (rate <= 1)).all():
        raise ValueError(
            f"rates must be probabilities in [0, 1], but these are from {rate.min().item():.4g} to "
            f"{rate.max().item():.4g}; clamp them, or if they are NaN load an earlier "
            "checkpoint of their model, which may have diverged"
        )


class _SpikesFromRate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rate: Tensor, noise: Tensor) -> Tensor:
        ctx.save_for_backward((rate - noise).abs() < 0.5)
        return (rate > noise).to(rate.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (near,) = ctx.saved_tensors
        return (grad * near).sum(0), None


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
    return _SpikesFromRate.apply(rate, noise)


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
            f"rbf_mmd needs two samples [N, d] of one shape with at least 2 points, but got "
            f"{list(x.shape)} and {list(y.shape)}; in training raise dataset.batch_size"
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


class FittedPrior(nn.Module):
    """Prior of rates that is fitted to those of the training images.

    Most rates are 0 or 1, or nearly, and no smooth density has that shape. So a subclass draws
    ranks, and a rate is the one of its rank among the training images' rates (a copula). All
    tensors are in a checkpoint.
    """

    name: str  #: as in ``sample_from``
    needed: int  #: the fewest rates that can be fitted
    cumulative: Tensor  #: the share of training rates at or below each level, ``[d, levels + 1]``

    def __init__(self, channels: int, levels: int) -> None:
        super().__init__()
        self.levels = levels
        self.register_buffer("cumulative", torch.zeros(channels, levels + 1))

    @property
    def fitted(self) -> bool:
        """Whether :meth:`fit` has succeeded, or a fitted prior was loaded."""
        return bool(self.cumulative.any())

    def clear(self) -> None:
        """Undo :meth:`fit`."""
        self.cumulative.zero_()

    def check_enough(self, n: int) -> None:
        """Refuse to be fitted to the rates of ``n`` images, if they are too few."""
        if n < self.needed:
            raise ValueError(
                f"a {self.name} needs the rates of at least {self.needed} images, but got {n}; "
                "give more"
            )

    def check(self, rates: Tensor) -> None:
        """Refuse rates that cannot be fitted."""
        d = len(self.cumulative)
        if rates.dim() != 2 or rates.shape[1] != d:
            raise ValueError(f"expected rates [n, {d}], but got {list(rates.shape)}")
        self.check_enough(len(rates))
        check_rates(rates)

    def count(self, rates: Tensor) -> None:
        """Count the training rates ``[n, d]`` at each level."""
        counts = (rates * self.levels).round()
        for level in range(self.levels + 1):
            self.cumulative[:, level] = (counts <= level).double().mean(0)

    def fit(self, rates: Tensor, seed: int = 0) -> None:
        """Fit to ``rates`` ``[n, d]``."""
        raise NotImplementedError

    def draw(self, n: int) -> Tensor:
        """Draw ``n`` ranks ``[n, d]`` in [0, 1]."""
        raise NotImplementedError

    def forward(self, n: int) -> Tensor:
        """Draw ``n`` rates ``[n, d]``."""
        if not self.fitted:
            raise RuntimeError(
                f"the {self.name} is not fitted; call model.fit_prior(images), or draw from the "
                "learned prior: sample_from='learned'"
            )
        if n == 0:
            return self.cumulative.new_zeros(0, len(self.cumulative))
        rank = self.draw(n)
        level = torch.searchsorted(self.cumulative, rank.t().contiguous()).clamp(max=self.levels)
        return level.t().to(rank.dtype) / self.levels


class GaussianMixturePrior(FittedPrior):
    r"""Mixture of Gaussians, fitted to the rates of the training images.

    The rank of a draw ``x`` is that of the mixture's distribution function, in each channel:

    .. math::
        r_c = Q_c(F_c(x_c)), \quad x \sim \sum_k w_k N(\mu_k, \Sigma_k), \quad
        F_c(x) = \sum_k w_k \Phi\!\left(\frac{x - \mu_{kc}}{\sqrt{\Sigma_{kcc}}}\right)

    with the quantile function :math:`Q_c` of channel c, a step function over the ``levels`` + 1
    values that a mean of spikes can have.

    Args:
        channels: latent channels d.
        components: Gaussians K, each with a full covariance.
        levels: time steps of which a rate is the mean.
        iterations: of the fit, at most.

    Raises:
        ValueError: a bad argument.
        RuntimeError: at a call, a mixture that is not fitted.

    Source: the mixture after training from Ghosh et al., arXiv 1903.12436; the copula from Tewari
    et al. 2011, ICDM Workshops.
    """

    weights: Tensor  #: ``[K]``
    means: Tensor  #: ``[K, d]``
    cholesky: Tensor  #: factors of the covariances, ``[K, d, d]``
    name = "mixture"

    def __init__(
        self, channels: int, components: int = 10, levels: int = 16, iterations: int = 100
    ) -> None:
        check_sizes(components=components, iterations=iterations)
        super().__init__(channels, levels)
        self.components = self.needed = components
        self.iterations = iterations
        self.register_buffer("weights", torch.zeros(components))
        self.register_buffer("means", torch.zeros(components, channels))
        self.register_buffer("cholesky", torch.zeros(components, channels, channels))

    @property
    def fitted(self) -> bool:
        # Loading a mixture of another size fails, but leaves what has the same size.
        return super().fitted and bool(self.weights.any())

    def fit(self, rates: Tensor, seed: int = 0) -> None:
        """Fit the mixture to ``rates`` ``[n, d]`` by expectation maximisation.

        scikit-learn warns if the fit has not converged in ``iterations``, or where there are fewer
        different rates than components.

        Raises:
            ValueError: fewer rates than components, of another width, or outside [0, 1].
            ModuleNotFoundError: without scikit-learn.
        """
        with needs("scikit-learn"):
            from sklearn.mixture import GaussianMixture
        self.check(rates)
        # A channel that never or always fires has no spread of its own: regularise it.
        mixture = GaussianMixture(
            self.components, reg_covar=1e-5, max_iter=self.iterations, random_state=seed
        )
        mixture.fit(rates.double().cpu().numpy())
        cholesky = torch.linalg.cholesky(torch.as_tensor(mixture.covariances_))
        self.weights.copy_(torch.as_tensor(mixture.weights_))
        self.means.copy_(torch.as_tensor(mixture.means_))
        self.cholesky.copy_(cholesky)
        self.count(rates)

    def draw(self, n: int) -> Tensor:
        component = torch.multinomial(self.weights, n, replacement=True)
        x = torch.randn(n, self.means.shape[1], dtype=self.means.dtype, device=self.means.device)
        for k, (mean, cholesky) in enumerate(zip(self.means, self.cholesky, strict=True)):
            drawn = component == k  # one component at a time: its factor is not copied per draw
            x[drawn] = mean + x[drawn] @ cholesky.t()
        rank = torch.zeros_like(x)
        spreads = self.cholesky.square().sum(2).sqrt()  # of each component and channel
        for weight, mean, spread in zip(self.weights, self.means, spreads, strict=True):
            rank += weight * torch.special.ndtr((x - mean) / spread)
        return rank
