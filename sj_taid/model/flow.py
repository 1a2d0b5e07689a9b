"""A normalising flow over rates: the prior of ESVAE that is fitted after training."""

import logging
import math
from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._internal.checks import check_sizes
from .._internal.context import seeded
from .block import check_labels

log = logging.getLogger(__name__)

WIDTH, BLOCKS, FREQUENCIES = 384, 4, 8
CLASSES = 30
EPOCHS, LR = 48, 2e-3
#: A batch is a hundredth of the rates, at least 32 if that leaves 40 steps, and at most 512.
STEPS, LEAST_STEPS, SMALL_BATCH, LARGEST_BATCH = 100, 40, 32, 512
#: The share of rates that is held out, to choose the epoch; few are repeated to so many, each with
#: noise of its own, or the choice would be by chance.
HELD_OUT, LEAST_HELD_OUT = 0.1, 1024
#: Steps of a draw, each of which evaluates the velocity twice.
DRAW_STEPS = 8


class FlowPrior(nn.Module):
    r"""Continuous normalising flow, fitted to the ranks of training images' rates.

    A small network v learns the velocity with which noise z moves in a straight line to the normal
    scores x of the ranks (flow matching), given the class k of the image; a draw follows it:

    .. math::
        L = E \, \tfrac1d |v(z + t (x - z), t, k) - (x - z)|^2, \ t \sim U(0, 1), \ z \sim N(0, I)

        r_c = Q_c(\Phi(x_c(1))), \quad x(t) = z + \int_0^t v(x(s), s, k) \, ds, \ k \sim w

    with the quantile function :math:`Q_c` of the training rates of channel c, and the share
    :math:`w_k` of class k in them. Many rates are 0 or 1, and no smooth density has that shape;
    ranks have one (a copula). The weights are from the epoch with the lowest loss for a tenth
    of the rates, held out; a rate's rank is drawn again in each epoch, between those of its
    neighbours. The integral has eight steps of the midpoint rule.

    Args:
        channels: latent channels d.
        levels: time steps of which a rate is the mean.

    Raises:
        ValueError: at a call, a flow that is not fitted.

    Source: Lipman et al., arXiv 2210.02747; fitting after training as in Ghosh et al., arXiv
    1903.12436.
    """

    cumulative: Tensor  #: the share of training rates at or below each level, ``[d, levels + 1]``
    labels: Tensor  #: the label of each class, in order, ``[30]``, then -1; without labels all -1
    shares: Tensor  #: of the classes, ``[30]``; without labels the first has all

    def __init__(self, channels: int, levels: int = 16) -> None:
        super().__init__()
        self.levels = levels
        self.register_buffer("cumulative", torch.zeros(channels, levels + 1))
        self.register_buffer("labels", torch.full((CLASSES,), -1))
        self.register_buffer("shares", torch.zeros(CLASSES))
        with torch.random.fork_rng([]):  # leaves the weights of the model as they are without it
            self.velocity = Velocity(channels)
        self.requires_grad_(False)  # it learns in fit, not with the model

    @property
    def fitted(self) -> bool:
        """Whether :meth:`fit` has succeeded, or a fitted flow was loaded."""
        return bool(self.cumulative.any())

    @property
    def classes(self) -> list[int]:
        """The labels that the flow was fitted with, in order; empty without."""
        return self.labels[self.labels >= 0].tolist() if self.fitted else []

    def clear(self) -> None:
        """Undo :meth:`fit`."""
        self.cumulative.zero_()

    def fit(
        self,
        rates: Tensor,
        labels: Sequence[int] | Tensor | None = None,
        seed: int = 0,
        epochs: int = EPOCHS,
    ) -> None:
        """Fit the flow to ``rates`` ``[n, d]``; the global random state is left alone.

        Args:
            rates: of n training images; or ``[n, v, d]`` of v versions of each, such as its mirror
                image, which are held out together.
            labels: the class of each image, an integer >= 0; None fits a flow that knows no
                classes.
            seed: of the fit.
            epochs: of the fit.

        Raises:
            ValueError: fewer than 10 images; rates of another width, or outside [0, 1]; labels that
                are not one for each image, or of more than 30 classes; epochs < 1.
            FloatingPointError: the fit has diverged.
        """
        check_sizes(epochs=epochs)
        n, d = len(rates), len(self.cumulative)
        check_enough(n)
        if rates.shape[-1] != d:
            raise ValueError(f"expected rates [n, {d}], but got {list(rates.shape)}")
        check_rates(rates)
        rates = rates.reshape(n, -1, d)
        if labels is None:
            labels = torch.full((n,), -1)
        else:
            expected = f"expected {n} labels, integers >= 0"
            labels = check_labels(labels, n, range(2**63), expected)
        classes, index = labels.to(rates.device).unique(return_inverse=True)
        if len(classes) > CLASSES:
            raise ValueError(
                f"a flow takes labels of at most {CLASSES} classes, but got {len(classes)}"
            )
        with seeded(seed), torch.inference_mode(False), torch.enable_grad():
            levels = (rates.float() * self.levels).round().long()
            trained = FlowPrior(d, self.levels).to(rates.device, torch.float32)
            for level in range(self.levels + 1):
                trained.cumulative[:, level] = (levels <= level).double().mean((0, 1))
            trained.labels[: len(classes)] = classes
            trained.shares.copy_(index.bincount(minlength=CLASSES) / n)
            trained.learn(levels, index, epochs)
        self.load_state_dict(trained.state_dict())

    def learn(self, levels: Tensor, index: Tensor, epochs: int) -> None:
        """Minimise the loss for the levels ``[n, v, d]`` of images of the classes at ``index``."""
        n, versions, _ = levels.shape
        levels, index = levels.flatten(0, 1), index.repeat_interleave(versions)
        rows = torch.arange(len(levels), device=levels.device).view(n, versions)
        order = rows[torch.randperm(n, device=rows.device)].flatten()
        held_out, rest = order.tensor_split([math.ceil(HELD_OUT * n) * versions])
        unseen = ~torch.isin(index[held_out], index[rest])  # no class is held out whole
        rest = torch.cat([rest, held_out[unseen]])
        held_out = held_out.repeat(math.ceil(LEAST_HELD_OUT / len(held_out)))
        size = max(len(rest) // STEPS, min(len(rest) // LEAST_STEPS, SMALL_BATCH), 1)
        size = min(size, LARGEST_BATCH)
        self.velocity.requires_grad_()
        optimizer = torch.optim.Adam(self.velocity.parameters(), LR, fused=True)
        steps = epochs * math.ceil(len(rest) / size)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, steps, pct_start=0.05)
        best = math.inf, self.velocity.state_dict()
        for epoch in range(epochs):
            if epoch % math.ceil(epochs / 4) == 0:
                log.info("Fitting the flow: epoch %d of %d", epoch + 1, epochs)
            for batch in rest[torch.randperm(len(rest), device=rest.device)].split(size):
                optimizer.zero_grad()
                self.loss(levels[batch], index[batch]).backward()
                optimizer.step()
                schedule.step()
            with torch.no_grad(), seeded(0):  # the same noise in every epoch
                loss = self.loss(levels[held_out], index[held_out]).item()
            if loss < best[0]:
                best = loss, deepcopy(self.velocity.state_dict())
        if not math.isfinite(best[0]):
            raise FloatingPointError("the fit of the flow diverged; take sample_from='learned'")
        self.velocity.load_state_dict(best[1])

    def draw_scores(self, levels: Tensor) -> Tensor:
        """Normal scores ``[n, d]`` of ranks, uniform among those that have the levels."""
        upper = self.cumulative.gather(1, levels.t()).t()
        lower = self.cumulative.gather(1, (levels - 1).clamp(min=0).t()).t() * (levels > 0)
        rank = lower + (upper - lower) * torch.rand_like(upper)
        return torch.special.ndtri(rank.clamp(1e-6, 1 - 1e-6))

    def loss(self, levels: Tensor, index: Tensor) -> Tensor:
        """The mean squared error of the velocity, at times that cover [0, 1] evenly."""
        n = len(levels)
        x = self.draw_scores(levels)
        noise, time = torch.randn_like(x), (torch.randperm(n) + torch.rand(n)).to(x)[:, None] / n
        return F.mse_loss(self.velocity(torch.lerp(noise, x, time), time, index), x - noise)

    def draw(self, n: int, labels: Tensor | None = None) -> Tensor:
        """Draw ``n`` normal scores ``[n, d]``."""
        x = torch.randn(n, len(self.cumulative)).to(self.cumulative)
        shares = self.shares.float().expand(n, -1)
        if labels is not None:
            shares = shares * (self.labels == labels.to(self.labels)[:, None])
        index = torch.multinomial(shares, 1).squeeze(1)
        step = 1 / DRAW_STEPS
        for number in range(DRAW_STEPS):
            time = x.new_full((n, 1), number * step)
            middle = x + step / 2 * self.velocity(x, time, index)
            x = x + step * self.velocity(middle, time + step / 2, index)
        return x

    def forward(self, n: int, labels: Tensor | None = None) -> Tensor:
        """Draw ``n`` rates ``[n, d]``, of the classes ``labels`` ``[n]`` if they are given."""
        if not self.fitted:
            raise ValueError(
                "the flow is not fitted, which is done after training: resume the run, or call "
                "model.fit_prior(images)"
            )
        if n == 0:
            return self.cumulative.new_zeros(0, len(self.cumulative))
        rank = torch.special.ndtr(self.draw(n, labels).float())  # in half precision 0 has a share
        cumulative = self.cumulative.float()
        level = torch.searchsorted(cumulative, rank.t().contiguous()).clamp(max=self.levels)
        return level.t().to(self.cumulative.dtype) / self.levels


def check_rates(rate: Tensor) -> None:
    """Refuse rates that are no probabilities; compiled code is not checked."""
    if not torch.compiler.is_compiling() and not ((rate >= 0) & (rate <= 1)).all():
        raise ValueError(
            f"rates must be probabilities in [0, 1], but these are from {rate.min().item():.4g} to "
            f"{rate.max().item():.4g}"
        )


def check_enough(n: int) -> None:
    """Refuse to fit a flow to the rates of ``n`` images, if they are too few."""
    if n < 10:
        raise ValueError(f"a flow needs the rates of at least 10 images, but got {n}")


class Velocity(nn.Module):
    """The velocity ``[n, d]`` at ``x``, ``time`` ``[n, 1]`` and the classes' ``index`` ``[n]``."""

    frequencies: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.arange(1, FREQUENCIES + 1) * math.pi / 2)
        self.first = nn.Linear(channels + 2 * FREQUENCIES + CLASSES, WIDTH)
        self.blocks = nn.ModuleList()
        for _ in range(BLOCKS):
            first, last = (nn.Linear(WIDTH, WIDTH) for _ in range(2))
            nn.init.zeros_(last.weight)  # nearly the identity at the start
            self.blocks.append(nn.Sequential(nn.LayerNorm(WIDTH), first, nn.SiLU(), last))
        self.last = nn.Linear(WIDTH, channels)

    def forward(self, x: Tensor, time: Tensor, index: Tensor) -> Tensor:
        angle = time * self.frequencies
        one_hot = F.one_hot(index, CLASSES).to(x)
        x = self.first(torch.cat([x, angle.sin(), angle.cos(), one_hot], 1))
        for block in self.blocks:
            x = x + block(x)
        return self.last(x)
