"""The error of images as a network's first layers see them, for sharper reconstructions."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._checks import check_not_negative, check_sizes
from .._context import seeded
from ..data import ImageData
from .cache import fit, load_or_make

log = logging.getLogger(__name__)

WIDTH = 16
EPOCHS = 3


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

    Raises:
        ValueError: a weight below 0, or a data set without classes.

    Source: Johnson et al. 2016, arXiv 1603.08155.
    """

    def __init__(self, channels: int, classes: int, weight: float = 0.3) -> None:
        super().__init__()
        check_sizes(channels=channels, classes=classes)  # a data set without labels has None
        check_not_negative(weight=weight)
        self.channels, self.classes, self.weight = channels, classes, weight
        self.blocks = _blocks(channels).requires_grad_(False)

    def prepare(self, data: ImageData, cache_dir: Path) -> None:
        """Train the classifier, or load the one that was trained in an earlier run."""

        def make() -> dict[str, Any]:
            log.info("Training the classifier of the feature loss for %d epochs, once", EPOCHS)
            with seeded(0):
                blocks = _blocks(self.channels)
                head = (nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64 * WIDTH, self.classes))
                network = nn.Sequential(blocks, *head)
                adam = torch.optim.Adam(network.parameters(), lr=2e-3)
                fit(network, adam, lambda x, y: F.cross_entropy(network(x), y), data, EPOCHS, 64)
            with torch.no_grad(), seeded(0):  # of the loader
                hits = [network(x).argmax(1) == label for x, label in data.test_dataloader()]
            accuracy = torch.cat(hits).float().mean()
            log.info("Its accuracy on the test images is %.2f %%", 100 * accuracy)
            return blocks.state_dict()

        made_by = f"{EPOCHS}x{WIDTH}-{data.fingerprint(data.train_set)}"
        name = f"features-{data.name}-{made_by}.pt"
        load_or_make(cache_dir / name, self.blocks.load_state_dict, make)

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

    return nn.Sequential(
        block(channels, WIDTH), block(WIDTH, 2 * WIDTH), block(2 * WIDTH, 4 * WIDTH)
    )
