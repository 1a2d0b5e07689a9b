"""A normalising flow over rates: the prior of ESVAE that is fitted after training."""

import math
from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._context import seeded
from .rate import check_rates

HIDDEN, COUPLINGS = 256, 8
CLUSTERS, K_MEANS_STEPS = 30, 50
EPOCHS, LR = 30, 2e-3
#: The batch shrinks with the data, so every epoch has at least about 40 steps.
STEPS, LARGEST_BATCH = 40, 512
#: The share of rates that is held out, to stop after so many epochs without a better likelihood.
HELD_OUT, PATIENCE = 0.1, 3


class FlowPrior(nn.Module):
    r"""Normalising flow, conditioned on a cluster, fitted to the ranks of training images' rates.

    Affine couplings :math:`f_k` map the normal scores ``x`` of the ranks in cluster k to noise,
    each half of the channels given the other half and k; a draw inverts them:

    .. math::
        r_c = Q_c(\Phi(x_c)), \quad x = f_k^{-1}(z), \ z \sim N(0, I), \ k \sim w

    with the quantile function :math:`Q_c` of the training rates of channel c, and the share
    :math:`w_k` of cluster k in them. Most rates are 0 or 1, or nearly, and no smooth density has
    that shape; ranks have one (a copula). The 30 clusters are by k-means: a flow from one Gaussian
    is continuous, and without them it draws images between those of different classes. Fitted with
    labels, every class has clusters of its own. The couplings learn by maximum likelihood until
    that of a tenth of the rates, held out, no longer improves; a rate's rank is drawn again in each
    epoch, between those of its neighbours.

    Args:
        channels: latent channels d.
        levels: time steps of which a rate is the mean.

    Raises:
        ValueError: at a call, a flow that is not fitted.

    Source: Dinh et al., RealNVP, arXiv 1605.08803; fitting after training as in Ghosh et al.,
    arXiv 1903.12436.
    """

    cumulative: Tensor  #: the share of training rates at or below each level, ``[d, levels + 1]``
    shares: Tensor  #: of the clusters, ``[30]``
    labels: Tensor  #: the class of each cluster, ``[30]``; -1 without labels

    def __init__(self, channels: int, levels: int = 16) -> None:
        super().__init__()
        self.levels = levels
        self.register_buffer("cumulative", torch.zeros(channels, levels + 1))
        self.register_buffer("shares", torch.zeros(CLUSTERS))
        self.register_buffer("labels", torch.full((CLUSTERS,), -1))
        with torch.random.fork_rng([]):  # leaves the weights of the model as they are without it
            self.couplings = nn.ModuleList(Coupling(channels, i) for i in range(COUPLINGS))
        self.requires_grad_(False)  # it learns in fit, not with the model

    @property
    def fitted(self) -> bool:
        """Whether :meth:`fit` has succeeded, or a fitted flow was loaded."""
        return bool(self.cumulative.any())

    @property
    def classes(self) -> list[int]:
        """The labels that the flow was fitted with, in order; empty without."""
        return self.labels[self.labels >= 0].unique().tolist() if self.fitted else []

    def clear(self) -> None:
        """Undo :meth:`fit`."""
        self.cumulative.zero_()

    def fit(
        self, rates: Tensor, labels: Sequence[int] | Tensor | None = None, seed: int = 0
    ) -> None:
        """Fit the flow to ``rates`` ``[n, d]``; the global random state is left alone.

        Args:
            rates: of training images.
            labels: the class of each, an integer >= 0; None fits a flow that knows no classes.
            seed: of the fit.

        Raises:
            ValueError: fewer than 30 rates, of another width, or outside [0, 1]; labels that are
                not one for each, or of more than 30 classes.
            FloatingPointError: the fit has diverged.
        """
        d = len(self.cumulative)
        if rates.dim() != 2 or rates.shape[1] != d:
            raise ValueError(f"expected rates [n, {d}], but got {list(rates.shape)}")
        check_enough(len(rates))
        check_rates(rates)
        labels = _check_labels(labels, len(rates)).to(rates.device)
        with seeded(seed), torch.inference_mode(False), torch.enable_grad():
            rates = rates.clone().float()
            levels = (rates * self.levels).round().long()
            trained = FlowPrior(d, self.levels).to(rates)
            for level in range(self.levels + 1):
                trained.cumulative[:, level] = (levels <= level).double().mean(0)
            cluster = trained.find_clusters(rates, labels)
            trained.learn(levels, cluster)
        self.load_state_dict(trained.state_dict())

    def find_clusters(self, rates: Tensor, labels: Tensor) -> Tensor:
        """The cluster ``[n]`` of each rate, by k-means within the classes; keeps what they are."""
        classes = labels.unique().tolist()
        size = CLUSTERS // len(classes)
        cluster = torch.empty_like(labels)
        for number, label in enumerate(classes):
            first = number * size
            cluster[labels == label] = first + k_means(rates[labels == label], size)
            self.labels[first : first + size] = label
        self.shares.copy_(cluster.bincount(minlength=CLUSTERS) / len(rates))
        return cluster

    def learn(self, levels: Tensor, cluster: Tensor) -> None:
        """Maximise the likelihood of training rates' levels ``[n, d]`` in clusters ``[n]``."""
        order = torch.randperm(len(levels), device=levels.device)
        first, rest = order.tensor_split([math.ceil(HELD_OUT * len(levels))])
        held_out = self.draw_scores(levels[first]), cluster[first]
        levels, cluster = levels[rest], cluster[rest]
        self.couplings.requires_grad_()
        optimizer = torch.optim.Adam(self.couplings.parameters(), LR)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
        size = min(max(len(levels) // STEPS, 1), LARGEST_BATCH)
        best, waited = (math.inf, self.couplings.state_dict()), 0
        for _ in range(EPOCHS):
            order = torch.randperm(len(levels), device=levels.device)
            for batch in order.split(size):
                optimizer.zero_grad()
                self.loss(self.draw_scores(levels[batch]), cluster[batch]).backward()
                optimizer.step()
            schedule.step()
            with torch.no_grad():
                loss = self.loss(*held_out).item()
            waited += 1
            if loss < best[0]:
                best, waited = (loss, deepcopy(self.couplings.state_dict())), 0
            if waited == PATIENCE:
                break
        if not math.isfinite(best[0]):
            raise FloatingPointError("the fit of the flow diverged; take sample_from='learned'")
        self.couplings.load_state_dict(best[1])

    def draw_scores(self, levels: Tensor) -> Tensor:
        """Normal scores ``[n, d]`` of ranks, uniform among those that have the levels."""
        upper = self.cumulative.gather(1, levels.t()).t()
        lower = self.cumulative.gather(1, (levels - 1).clamp(min=0).t()).t() * (levels > 0)
        rank = lower + (upper - lower) * torch.rand_like(upper)
        return torch.special.ndtri(rank.clamp(1e-6, 1 - 1e-6))

    def loss(self, x: Tensor, cluster: Tensor) -> Tensor:
        """The negative log-likelihood per rate given its cluster, but for a constant."""
        volume = x.new_zeros(len(x))
        for coupling in self.couplings:
            scale, shift = coupling(x, cluster)
            x, volume = x * scale.exp() + shift, volume + scale.sum(1)
        return (x.square().sum(1) / 2 - volume).mean() / x.shape[1]

    def draw(self, n: int, labels: Tensor | None = None) -> Tensor:
        """Draw ``n`` ranks ``[n, d]`` in [0, 1]."""
        x = torch.randn(n, len(self.cumulative)).to(self.cumulative)
        shares = self.shares.float().expand(n, -1)
        if labels is not None:
            shares = shares * (self.labels == labels.to(self.labels)[:, None])
        cluster = torch.multinomial(shares, 1).squeeze(1)
        for coupling in reversed(self.couplings):
            scale, shift = coupling(x, cluster)
            x = (x - shift) * (-scale).exp()
        return torch.special.ndtr(x)

    def forward(self, n: int, labels: Tensor | None = None) -> Tensor:
        """Draw ``n`` rates ``[n, d]``, of the classes ``labels`` ``[n]`` if they are given."""
        if not self.fitted:
            raise ValueError(
                "the flow is not fitted, which is done after training: resume the run, or call "
                "model.fit_prior(images)"
            )
        if n == 0:
            return self.cumulative.new_zeros(0, len(self.cumulative))
        rank = self.draw(n, labels)
        level = torch.searchsorted(self.cumulative, rank.t().contiguous()).clamp(max=self.levels)
        return level.t().to(rank.dtype) / self.levels


def check_enough(n: int) -> None:
    """Refuse to fit a flow to the rates of ``n`` images, if they are too few."""
    if n < CLUSTERS:
        raise ValueError(f"a flow needs the rates of at least {CLUSTERS} images, but got {n}")


def _check_labels(labels: Sequence[int] | Tensor | None, n: int) -> Tensor:
    """Labels ``[n]``, all -1 if there are none."""
    if labels is None:
        return torch.full((n,), -1)
    labels = torch.as_tensor(labels)
    if labels.shape != (n,) or labels.is_floating_point() or labels.min() < 0:
        raise ValueError(f"expected {n} labels, integers >= 0, but got {labels.tolist()!s:.60}")
    if (classes := len(labels.unique())) > CLUSTERS:
        raise ValueError(f"a flow takes labels of at most {CLUSTERS} classes, but got {classes}")
    return labels


def k_means(points: Tensor, clusters: int) -> Tensor:
    """The cluster of each of ``points`` ``[n, d]``, by Lloyd's k-means, ``[n]``."""
    centers = points[torch.randperm(len(points), device=points.device)[:clusters]]
    for _ in range(K_MEANS_STEPS):
        cluster = torch.cdist(points, centers).argmin(1)
        one_hot = F.one_hot(cluster, len(centers)).to(points)
        size = one_hot.sum(0)[:, None]
        centers = torch.where(size > 0, one_hot.t() @ points / size.clamp(min=1), centers)
    return cluster


class Coupling(nn.Module):
    """Scale (its logarithm, within 2) and shift of half of the channels, given the rest."""

    mask: Tensor

    def __init__(self, channels: int, number: int) -> None:
        super().__init__()
        halves = torch.randperm(channels, generator=torch.Generator().manual_seed(number // 2))
        self.register_buffer("mask", ((halves % 2) == number % 2).float())
        self.net = nn.Sequential(
            nn.Linear(channels + CLUSTERS, HIDDEN),
            nn.SiLU(),
            nn.Linear(HIDDEN, HIDDEN),
            nn.SiLU(),
            nn.Linear(HIDDEN, 2 * channels),
        )
        for parameter in self.net[-1].parameters():  # starts as the identity
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, cluster: Tensor) -> tuple[Tensor, Tensor]:
        one_hot = F.one_hot(cluster, CLUSTERS).to(x)
        scale, shift = self.net(torch.cat([x * self.mask, one_hot], 1)).chunk(2, 1)
        return 2 * torch.tanh(scale / 2) * (1 - self.mask), shift * (1 - self.mask)
