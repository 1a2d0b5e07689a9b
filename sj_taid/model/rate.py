"""The rate latent: spikes drawn from rates, and the distributions of rates.

A rate ``r`` in [0, 1] is the probability of a spike at each time step, ``[N, d]`` for d latent
channels. Source: Zhan et al., ESVAE, arXiv 2310.14839.
"""

import torch
from torch import Tensor, nn


def check_rates(rate: Tensor) -> None:
    """Refuse rates that are no probabilities; compiled code is not checked."""
    if not torch.compiler.is_compiling() and not ((rate >= 0) & (rate <= 1)).all():
        raise ValueError(
            f"rates must be probabilities in [0, 1], but these are from {rate.min().item():.4g} to "
            f"{rate.max().item():.4g}"
        )


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
