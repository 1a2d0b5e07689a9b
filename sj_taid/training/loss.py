"""Losses that torch does not have: a classifier's, and one that joins a generator's."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._internal.checks import SHARE, check, check_not_negative, check_sizes, expand_home
from ..data import ImageData
from .cache import fit_once

#: of the feature loss's classifier
WIDTH = 16


class TET(nn.Module):
    r"""Temporal efficient training: the loss of each time step, not the loss of their mean.

    .. math::
        L = \frac{1}{T} \sum_t \left[ (1 - \lambda) \mathrm{CE}(O[t], y)
            + \lambda \mathrm{MSE}(O[t], \phi) \right]

    The cross entropy asks every step for the right answer; the squared error to ``phi`` keeps
    outputs from growing. The outputs O are currents, not spikes: a classifier with
    ``output_neuron=False``.

    Args:
        mse_share: of the squared error, :math:`\lambda` in [0, 1]; the cross entropy has the rest.
        phi: where the squared error pulls every output; the paper takes the threshold, 1.
        label_smoothing: of the cross entropy, in [0, 1].

    Raises:
        ValueError: ``mse_share`` out of its range.

    Shapes: outputs ``[T, N, classes]``, and the classes' probabilities as target
    ``[N, classes]``, to a scalar.

    Source: Deng, Li, Zhang and Gu, ICLR 2022, arXiv 2202.11946.

    >>> import torch
    >>> outputs = torch.zeros(4, 2, 10)
    >>> loss = TET()(outputs, torch.eye(10)[:2])  # 0.95 log(10) + 0.05
    >>> round(loss.item(), 4)
    2.2375
    """

    #: takes the outputs of each time step, not their mean
    each_step = True

    def __init__(
        self, mse_share: float = 0.05, phi: float = 1.0, label_smoothing: float = 0.0
    ) -> None:
        super().__init__()
        check(SHARE, mse_share=mse_share)
        self.mse_share = mse_share
        self.phi = phi
        self.label_smoothing = label_smoothing

    def forward(self, outputs: Tensor, target: Tensor) -> Tensor:
        T = len(outputs)
        cross_entropy = F.cross_entropy(
            outputs.flatten(0, 1), target.repeat(T, 1), label_smoothing=self.label_smoothing
        )
        distance = (outputs - self.phi).square().mean()
        return (1 - self.mse_share) * cross_entropy + self.mse_share * distance


class FeatureLoss(nn.Module):
    r"""Mean absolute error of features of images, next to a generator's other losses.

    .. math::
        \mathrm{weight} \sum_l \mathrm{mean}\, |f_l(\hat x) - f_l(x)|

    over the outputs :math:`f_l` of the three blocks, of convolution, batch norm, ReLU and average
    pooling (max pooling makes stripes), of a small plain classifier of the same training images. It
    is trained once and cached.

    Args:
        channels, classes: of the data set.
        weight: of the loss.
        cache_dir: folder of the trained classifier.

    Raises:
        ValueError: a weight below 0, or a data set without classes.

    Source: Johnson et al. 2016, arXiv 1603.08155.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        weight: float = 0.3,
        cache_dir: str | Path = "~/.cache/sj-taid",
    ) -> None:
        super().__init__()
        check_sizes(channels=channels, classes=classes)  # a data set without labels has None
        check_not_negative(weight=weight)
        self.channels, self.classes, self.weight = channels, classes, weight
        self.cache_dir = expand_home(cache_dir)
        self.blocks = _blocks(channels).requires_grad_(False)

    def prepare(self, data: ImageData) -> None:
        """Train the classifier, or load the one that was trained in an earlier run."""

        def make() -> nn.Sequential:
            head = (nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64 * WIDTH, self.classes))
            return nn.Sequential(_blocks(self.channels), *head)

        def loss(network: Any, images: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(network(images), labels)

        training: dict[str, Any] = {"lr": 2e-3, "epochs": 3, "batch_size": 64, "seed": 0}
        classifier = fit_once(self.cache_dir, "classifier", make, loss, data, **training)
        self.blocks.load_state_dict(classifier[0].state_dict())

    def forward(self, output: Tensor, image: Tensor) -> Tensor:
        """The loss of reconstructions ``output`` of ``image``, ``[N, C, H, W]`` in [-1, 1]."""
        self.blocks.eval()  # Lightning puts all in training mode
        errors = []
        for block in self.blocks:
            output, image = block(output), block(image)
            errors.append(F.l1_loss(output, image))
        return self.weight * torch.stack(errors).sum()


def _blocks(channels: int) -> nn.Sequential:
    def block(a: int, b: int) -> nn.Sequential:
        conv = nn.Conv2d(a, b, 3, padding=1)
        return nn.Sequential(conv, nn.BatchNorm2d(b), nn.ReLU(), nn.AvgPool2d(2))

    widths = (channels, WIDTH, 2 * WIDTH, 4 * WIDTH)
    return nn.Sequential(*(block(a, b) for a, b in pairwise(widths)))
