"""FSVAE: a spiking VAE whose latent are Bernoulli spike trains from autoregressive networks.

Sequences are ``[T, N, C]``; each network outputs ``k`` candidate spikes per channel,
``[T, N, C, k]``, of which one is picked uniformly, so that the mean over ``k`` is the probability
of a spike. Source: Kamata et al. 2022, arXiv 2110.00375, sections 4.2-4.4.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .._internal import graph
from .._internal.checks import check_sizes
from .._internal.context import eval_mode
from .block import Neuron, reset, spiking_block
from .spiking_vae import SpikingVAE, SpikingVAEOutput

#: The prior's scheduled sampling at the start and at the end of training.
OWN_SAMPLE_PROBABILITY = 0.1, 0.3


class LatentNetwork(nn.Module):
    """Three spiking linear layers, each with tdBN at twice the threshold, to ``k`` candidates."""

    def __init__(self, in_channels: int, channels: int, k: int, neuron: Neuron) -> None:
        super().__init__()
        self.candidates = channels, k
        widths = (in_channels, 2 * channels, 4 * channels, k * channels)
        self.net = nn.Sequential(
            *(spiking_block(nn.Linear(a, b), neuron, alpha=2.0) for a, b in pairwise(widths))
        )

    def run(self, x_seq: Tensor) -> Tensor:
        """Run a whole sequence from rest: ``[T, N, in_channels]`` -> ``[T, N, C, k]``."""
        reset(self.net)
        output = self.net(x_seq)
        reset(self.net)
        return output.unflatten(2, self.candidates)

    @torch.no_grad()
    def draw(
        self, z_previous: Tensor, choose: Callable[[int, Tensor], Tensor], *x_seq: Tensor
    ) -> None:
        """Fill ``z_previous`` ``[T, N, C]`` from its second step on, one step after the other.

        ``choose(t, candidates)`` is the spikes of step t for the candidates ``[N, C, k]`` on
        ``[x_t ; z_(t-1)]``. From rest and with the running statistics of batch norm the network is
        causal: T steps equal running every prefix, at O(T), not O(T^2).
        """
        reset(self.net)
        with eval_mode(self.net):
            for t in range(len(z_previous) - 1):
                inputs = torch.cat([*(x[t] for x in x_seq), z_previous[t]], 1)
                candidates = self.net(inputs.unsqueeze(0))[0].unflatten(1, self.candidates)
                z_previous[t + 1] = choose(t, candidates)
        reset(self.net)
        # Autocast's casts of a pass without gradient have no graph, and older torch reuses them in
        # the pass with gradient.
        if not torch.compiler.is_compiling():
            torch.clear_autocast_cache()


class Posterior(LatentNetwork):
    """``q(z_t | x_<=t, z_<t)`` on ``[x_t ; z_(t-1)]``, ``z_0 = 0``.

    The samples ``z`` are drawn without gradient before the pass with gradient, step by step with
    the running statistics of batch norm, as at test time. The original code reruns every prefix,
    with batch statistics.
    """

    def forward(self, x_seq: Tensor, picks: Tensor) -> tuple[Tensor, Tensor]:
        """Sample ``z`` ``[T, N, C]`` at ``picks`` ``[T, N, C]``.

        Returns ``z`` and the candidates ``q`` ``[T, N, C, k]``.
        """
        z_previous = torch.zeros_like(x_seq)
        self.draw(z_previous, lambda t, q: pick(q, picks[t]), x_seq)
        q = self.run(torch.cat([x_seq, z_previous], 2))
        return pick(q, picks), q


class Prior(LatentNetwork):
    """``p(z_t | z_<t)`` on ``z_(t-1)``, ``z_0 = 0``."""

    #: The steps before it always take the posterior's sample: the prior has seen too little.
    FIRST_OWN_SAMPLE = 5

    def forward(self, z_seq: Tensor, own_sample_probability: float | Tensor = 0.0) -> Tensor:
        """``p`` ``[T, N, C, k]`` for the posterior's ``z_seq`` ``[T, N, C]``, taken as constants.

        With ``own_sample_probability`` (scheduled sampling) a step's input is replaced, with that
        probability, by the prior's own sample ``1[mean_k p + 1e-3 noise > 0.5]``.
        """
        z_previous = torch.cat([torch.zeros_like(z_seq[:1]), z_seq[:-1]]).detach()
        self._take_own_samples(z_previous, own_sample_probability)
        return self.run(z_previous)

    @graph.outside_graphs  # which steps are replaced differs in each call: no single graph
    def _take_own_samples(self, z_previous: Tensor, probability: float | Tensor) -> None:
        own = torch.rand(len(z_previous) - 1) < probability
        own[: self.FIRST_OWN_SAMPLE] = False

        def choose(t: int, p: Tensor) -> Tensor:
            if not own[t]:
                return z_previous[t + 1]
            rate = p.mean(-1)
            return (rate + 1e-3 * torch.randn_like(rate) > 0.5).to(rate.dtype)

        if own.any():
            last = int(own.nonzero().max())
            self.draw(z_previous[: last + 2], choose)

    def sample(self, picks: Tensor) -> Tensor:
        """Draw ``z`` ``[T, N, C]`` step by step at ``picks`` ``[T, N, C]``."""
        zeros = next(self.parameters()).new_zeros(len(picks) + 1, *picks.shape[1:])
        self.draw(zeros, lambda t, p: pick(p, picks[t]))
        return zeros[1:]


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


class FSVAE(SpikingVAE):
    r"""Fully Spiking VAE: a latent of Bernoulli spike trains from autoregressive networks.

    .. math::
        L = \mathrm{mean}\,(\hat x - x)^2 + \mathrm{MMD}(q, p)

    Posterior, prior and their distance: :class:`Posterior`, :class:`Prior`, ``mmd_loss``.

    All other arguments are the arguments of :class:`~sj_taid.model.spiking_vae.SpikingVAE`.

    Args:
        k: candidate spikes of each latent channel.

    Source: Kamata et al. 2022, arXiv 2110.00375; the image decoder from Qiu et al. 2023,
    arXiv 2406.03046.

    >>> model = FSVAE(image_size=8, T=4, hidden_channels=4, latent_channels=6, k=3)
    >>> output = model(torch.rand(2, 1, 8, 8))
    >>> output.image.shape, output.q.shape, model.sample(5).shape
    (torch.Size([2, 1, 8, 8]), torch.Size([4, 2, 6, 3]), torch.Size([5, 1, 8, 8]))
    """

    def __init__(
        self,
        *args: Any,
        k: int = 20,
        **kwargs: Any,
    ) -> None:
        check_sizes(k=k)
        self.k = k
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
        return self.posterior(self.encode(image), self._picks(len(image)))[0]

    def sample_latent(self, n: int, labels: Tensor | None = None) -> Tensor:
        return self.prior.sample(self._picks(n))

    def training_loss(self, image: Tensor, progress: float = 0.0) -> dict[str, Tensor]:
        """``loss`` and its terms; ``progress`` of the training, 0 to 1, sets the own samples.

        Their probability rises from 0.1 to 0.3. The first steps are never replaced: below T = 7
        none is.
        """
        first, last = OWN_SAMPLE_PROBABILITY
        # A tensor: compiled, each float would be a constant of a graph of its own.
        output = self(image, torch.tensor(first + (last - first) * progress))
        return self.sum_losses(output.image, image, mmd_loss(output.q, output.p))

    def _picks(self, n: int) -> Tensor:
        device = next(self.parameters()).device
        return torch.randint(self.k, (self.T, n, self.latent_channels), device=device)
