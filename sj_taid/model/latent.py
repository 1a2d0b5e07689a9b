"""FSVAE's latent space: Bernoulli spike trains from autoregressive spiking networks.

Sequences are ``[T, N, C]``; each network outputs ``k`` candidate spikes per channel,
``[T, N, C, k]``, of which one is picked uniformly, so that the mean over ``k`` is the probability
of a spike. Source: Kamata et al. 2022, arXiv 2110.00375, sections 4.2-4.4.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor, nn

from .._internal.context import eval_mode
from .block import Neuron, reset, spiking_block


class LatentNetwork(nn.Module):
    """Three spiking linear layers, each with tdBN at twice the threshold, to ``k`` candidates."""

    def __init__(self, in_channels: int, channels: int, k: int, neuron: Neuron) -> None:
        super().__init__()
        self.channels = channels
        self.k = k
        widths = (in_channels, 2 * channels, 4 * channels, k * channels)
        self.net = nn.Sequential(
            *(spiking_block(nn.Linear(a, b), neuron, alpha=2.0) for a, b in pairwise(widths))
        )

    def run(self, x_seq: Tensor) -> Tensor:
        """Run a whole sequence from rest: ``[T, N, in_channels]`` -> ``[T, N, C, k]``."""
        reset(self.net)
        output = self.net(x_seq)
        reset(self.net)
        return output.unflatten(2, (self.channels, self.k))

    def step(self, x: Tensor) -> Tensor:
        """Run one more time step from the neurons' state: ``[N, in_channels]`` -> ``[N, C, k]``."""
        return self.net(x.unsqueeze(0))[0].unflatten(1, (self.channels, self.k))

    @contextmanager
    def from_rest(self) -> Iterator[None]:
        """Start :meth:`step` from rest inside, with the running statistics of batch norm.

        The network is causal then: T steps equal running every prefix, at O(T), not O(T^2).
        """
        reset(self.net)
        with eval_mode(self.net):
            yield
        reset(self.net)


class Posterior(LatentNetwork):
    """``q(z_t | x_<=t, z_<t)`` on ``[x_t ; z_(t-1)]``, ``z_0 = 0``.

    The samples ``z`` are drawn without gradient before the pass with gradient, step by step with
    the running statistics of batch norm, as at test time. The original code reruns every prefix,
    with batch statistics.
    """

    def __init__(self, channels: int, k: int, neuron: Neuron) -> None:
        super().__init__(2 * channels, channels, k, neuron)

    def forward(self, x_seq: Tensor, picks: Tensor) -> tuple[Tensor, Tensor]:
        """Sample ``z`` ``[T, N, C]`` at ``picks`` ``[T, N, C]``.

        Returns ``z`` and the candidates ``q`` ``[T, N, C, k]``.
        """
        z_previous = torch.zeros_like(x_seq)
        with torch.no_grad(), self.from_rest():
            for t in range(len(x_seq) - 1):
                q = self.step(torch.cat([x_seq[t], z_previous[t]], 1))
                z_previous[t + 1] = pick(q, picks[t])
        _clear_cast_cache()
        q = self.run(torch.cat([x_seq, z_previous], 2))
        return pick(q, picks), q


class Prior(LatentNetwork):
    """``p(z_t | z_<t)`` on ``z_(t-1)``, ``z_0 = 0``."""

    #: The steps before it always take the posterior's sample: the prior has seen too little.
    FIRST_OWN_SAMPLE = 5

    def __init__(self, channels: int, k: int, neuron: Neuron) -> None:
        super().__init__(channels, channels, k, neuron)

    def forward(self, z_seq: Tensor, own_sample_probability: float | Tensor = 0.0) -> Tensor:
        """``p`` ``[T, N, C, k]`` for the posterior's ``z_seq`` ``[T, N, C]``, taken as constants.

        With ``own_sample_probability`` (scheduled sampling) a step's input is replaced, with that
        probability, by the prior's own sample ``1[mean_k p + 1e-3 noise > 0.5]``.
        """
        z_previous = torch.cat([torch.zeros_like(z_seq[:1]), z_seq[:-1]]).detach()
        self._take_own_samples(z_previous, own_sample_probability)
        return self.run(z_previous)

    @torch.compiler.disable  # which steps are replaced differs in each call: no single graph
    def _take_own_samples(self, z_previous: Tensor, probability: float | Tensor) -> None:
        own = torch.rand(len(z_previous) - 1) < probability
        own[: self.FIRST_OWN_SAMPLE] = False
        if own.any():
            self._insert_own_samples(z_previous, own.tolist())

    @torch.no_grad()
    def _insert_own_samples(self, z_previous: Tensor, own: list[bool]) -> None:
        last = max(t for t, replace in enumerate(own) if replace)
        with self.from_rest():
            for t in range(last + 1):
                p = self.step(z_previous[t])
                if own[t]:
                    rate = p.mean(-1)
                    rate = rate + 1e-3 * torch.randn_like(rate)
                    z_previous[t + 1] = (rate > 0.5).to(z_previous.dtype)
        _clear_cast_cache()

    @torch.no_grad()
    def sample(self, picks: Tensor) -> Tensor:
        """Draw ``z`` ``[T, N, C]`` step by step at ``picks`` ``[T, N, C]``."""
        parameter = next(self.parameters())
        z = torch.zeros(picks.shape[1:], dtype=parameter.dtype, device=parameter.device)
        z_seq = []
        with self.from_rest():
            for index in picks:
                z = pick(self.step(z), index)
                z_seq.append(z)
        return torch.stack(z_seq)


def _clear_cast_cache() -> None:
    """Drop autocast's casts of a pass without gradient.

    They have no graph, and older torch reuses them in the pass with gradient.
    """
    if not torch.compiler.is_compiling():
        torch.clear_autocast_cache()


def pick(candidates: Tensor, picks: Tensor) -> Tensor:
    """Pick one of each channel's ``k`` candidates: ``[*, C, k]`` at ``[*, C]`` -> ``[*, C]``."""
    return candidates.gather(-1, picks.unsqueeze(-1)).squeeze(-1)


def postsynaptic_potential(x_seq: Tensor) -> Tensor:
    """Postsynaptic potential ``PSP[t] = PSP[t-1] + (x[t] - PSP[t-1]) / 2`` along axis 0.

    >>> postsynaptic_potential(torch.tensor([1.0, 0.0, 1.0]))
    tensor([0.5000, 0.2500, 0.6250])
    """
    t = torch.arange(len(x_seq), device=x_seq.device)
    age = t.unsqueeze(1) - t
    kernel = torch.where(age >= 0, 0.5 ** (age + 1.0), 0.0).to(x_seq.dtype)
    return torch.tensordot(kernel, x_seq, dims=1)


def mmd_loss(q: Tensor, p: Tensor) -> Tensor:
    """Maximum mean discrepancy of the spike trains, kernel PSP: ``mean (PSP(q) - PSP(p))^2``.

    ``q`` and ``p`` are ``[T, N, C, k]``, averaged over ``k`` first (arXiv 2110.00375, eq. 16).
    """
    return postsynaptic_potential(q.mean(-1) - p.mean(-1)).square().mean()
