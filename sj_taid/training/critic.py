"""A critic of generated images: a plain network that is used in training only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from .._checks import check, check_sizes, check_weights, integer

#: mean hinge loss above which the critic has lost, once its warmup is over
LOST = 1.95


class PatchCritic(nn.Module):
    r"""Tells generated from real images, patch by patch, for a generator that learns to deceive it.

    .. math::
        L_D = \mathrm{mean} \max(0, 1 - D(x)) + \mathrm{mean} \max(0, 1 + D(\hat x)), \qquad
        L_G = -\mathrm{mean}\, D(\hat x), \\
        L = L_0 + w L_G, \quad
        w = \mathrm{share} \left| \frac{\partial L_0}{\partial \hat x} \right| /
            \left| \frac{\partial L_G}{\partial \hat x} \right|

    for images x, generated images :math:`\hat x`, half reconstructions and half samples, and the
    loss :math:`L_0` without critic. Both gradients are at the image, by their norms over a batch.
    :math:`L_D` is 2 where the critic cannot tell them apart. D has four convolutions with spectral
    norm.

    Args:
        channels: image channels.
        epochs: the critic takes part in so many epochs, the last ones.
        share: of the gradient, see above.
        trains: what learns in these epochs, the ``"decoder"`` alone or ``"all"``.
        warmup: for so many steps the critic learns and the generator does not hear it.
        updates: of the critic in each step.
        lr: the critic's learning rate, by Adam.
        width: channels of the first convolution.

    Raises:
        ValueError: a number out of its range, or another ``trains``.
        RuntimeError: in training, the critic has lost.

    Source: patches from Isola et al. 2017, arXiv 1611.07004; spectral norm and hinge from Miyato et
    al. 2018, arXiv 1802.05957; the weight as in Esser et al. 2021, arXiv 2012.09841.
    """

    hinge: Tensor  #: the running mean of the loss

    def __init__(
        self,
        channels: int,
        epochs: int = 2,
        share: float = 0.5,
        trains: str = "decoder",
        warmup: int = 300,
        updates: int = 2,
        lr: float = 3e-3,
        width: int = 16,
    ) -> None:
        super().__init__()
        check_sizes(channels=channels, epochs=epochs, updates=updates, width=width)
        check_weights(share=share, lr=lr)
        if trains not in ("decoder", "all"):
            raise ValueError(f"trains must be decoder or all, but it is {trains!r}")
        check(integer(0), warmup=warmup)
        self.epochs, self.share, self.trains = epochs, share, trains
        self.warmup, self.updates, self.steps = warmup, updates, 0
        self.net = nn.Sequential(
            spectral_norm(nn.Conv2d(channels, width, 4, stride=2, padding=1)),
            nn.LeakyReLU(0.2),
            spectral_norm(nn.Conv2d(width, 2 * width, 4, stride=2, padding=1)),
            nn.LeakyReLU(0.2),
            spectral_norm(nn.Conv2d(2 * width, 4 * width, 3, padding=1)),
            nn.LeakyReLU(0.2),
            spectral_norm(nn.Conv2d(4 * width, 1, 3, padding=1)),
        )
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr, betas=(0.5, 0.9))
        self.register_buffer("hinge", torch.ones(()))

    def restart(self) -> None:
        """Reset steps and running mean, at the start of the critic's epochs."""
        self.steps = 0
        self.hinge.fill_(1.0)

    def teach(self, real: Tensor, fake: Tensor) -> Tensor:
        """Update the critic on images and generated ones, ``[N, C, H, W]``; its loss."""
        for _ in range(self.updates):
            loss = F.relu(1 - self.net(real)).mean() + F.relu(1 + self.net(fake)).mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        self.steps += 1
        self.hinge.lerp_(loss.detach(), 0.01)
        if self.steps > self.warmup and self.steps % 100 == 0 and self.hinge > LOST:
            raise RuntimeError(
                f"the generator overruns its critic, whose loss is {self.hinge:.2f}, where 2 means "
                "that it cannot tell generated images from real ones; resume with a lower "
                "critic.share, or more critic.updates"
            )
        return loss.detach()

    def pull(self, fake: Tensor, gradient: Tensor) -> Tensor:
        """A term of the generator's loss whose gradient at ``fake`` is that of w times L_G.

        ``gradient`` is that of the loss without critic, at as many images.
        """
        image = fake.detach().requires_grad_()
        (own,) = torch.autograd.grad(-self.net(image).mean(), image)
        weight = self.share * gradient.norm() / own.norm().clamp(min=torch.finfo(own.dtype).tiny)
        return (fake * (weight * own)).sum()

    def get_extra_state(self) -> dict[str, Any]:
        return {"steps": self.steps, "optimizer": self.optimizer.state_dict()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        self.optimizer.load_state_dict(state["optimizer"])
