"""The error of images as a small classifier sees them, for sharper reconstructions."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from .._checks import check_sizes, check_weights
from ..data import ImageData
from .evaluation import load_or_make, seeded

log = logging.getLogger(__name__)

WIDTH = 16
EPOCHS = 3


class FeatureLoss(nn.Module):
    r"""Mean absolute error of features of images, next to a generator's other losses.

    .. math::
        \mathrm{weight} \sum_l \mathrm{mean}\, |f_l(\hat x) - f_l(x)|

    over the outputs :math:`f_l` of three blocks of convolution, batch norm, ReLU and pooling in a
    classifier of the same training images, which is trained once and cached. It measures nothing
    else.

    Args:
        channels: image channels.
        classes: of the data set.
        weight: of the loss.

    Raises:
        ValueError: a weight below 0, or a data set without classes.

    Source: Johnson et al. 2016, arXiv 1603.08155.
    """

    def __init__(self, channels: int, classes: int | None, weight: float = 0.1) -> None:
        super().__init__()
        if classes is None:
            raise ValueError(
                "feature_loss= needs a classifier of the images, but dataset.classes is null; "
                "leave it out"
            )
        check_sizes(channels=channels, classes=classes)
        check_weights(weight=weight)
        self.weight = weight
        self.sizes = channels, classes
        self.network = _classifier(*self.sizes)
        self.network.requires_grad_(False)

    def prepare(self, data: ImageData, cache_dir: Path) -> None:
        """Train the classifier, or load the one that was trained in an earlier run."""

        def make() -> dict[str, Any]:
            log.info("Training the classifier of the feature loss for %d epochs, once", EPOCHS)
            with seeded(0):
                network = _classifier(*self.sizes)
                accuracy = _train(network, data.without_augmentation())
            log.info("Its accuracy on the test images is %.2f %%", 100 * accuracy)
            return network.state_dict()

        name = f"classifier-{data.name}-{data.fingerprint(data.train_set)}.pt"
        load_or_make(cache_dir / name, self.network.load_state_dict, make)

    def forward(self, output: Tensor, image: Tensor) -> Tensor:
        """The loss of reconstructions ``output`` of ``image``, ``[N, C, H, W]``."""
        self.network.eval()  # Lightning puts all in training mode
        errors = []
        for block in [*self.network][:3]:
            output, image = block(output), block(image)
            errors.append(F.l1_loss(output, image))
        return self.weight * torch.stack(errors).sum()


def _classifier(channels: int, classes: int) -> nn.Sequential:
    def block(a: int, b: int) -> nn.Sequential:
        conv = nn.Conv2d(a, b, 3, padding=1)
        return nn.Sequential(conv, nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2))

    blocks = (block(channels, WIDTH), block(WIDTH, 2 * WIDTH), block(2 * WIDTH, 4 * WIDTH))
    head = (nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64 * WIDTH, classes))
    return nn.Sequential(*blocks, *head)


def _train(network: nn.Sequential, data: ImageData) -> float:
    """Train a classifier; its accuracy on the test images."""
    data.batch_size = 64
    loader = data.train_dataloader()
    optimizer = torch.optim.Adam(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, EPOCHS * len(loader))
    for _ in range(EPOCHS):
        for image, label in track(loader, "Classifier of the feature loss", transient=True):
            optimizer.zero_grad()
            F.cross_entropy(network(image), label).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        network.eval()
        batches = data.test_dataloader()
        hits = torch.cat([network(image).argmax(1) == label for image, label in batches])
    return hits.float().mean().item()
