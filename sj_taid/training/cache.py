"""Helper networks of metrics and losses: trained once, then read from cached files."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor, nn

from ..data import ImageData
from .callbacks import show_progress
from .files import atomic_save

log = logging.getLogger(__name__)


def fit(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: ImageData,
    epochs: int,
    batch_size: int,
    loss: Callable[[Tensor, Tensor], Tensor],
) -> float:
    """Train a network, left in eval mode, on the training images as they are.

    ``loss`` takes a batch of images and its labels; returned is its mean in the last epoch.
    """
    device = next(network.parameters()).device
    # Of a distributed run each process has all images.
    drop_last = len(data.train_set) >= batch_size
    loader = data.loader(data.train_set, batch_size=batch_size, shuffle=True, drop_last=drop_last)
    network.train()
    losses: list[Tensor] = []
    for epoch in range(1, epochs + 1):
        losses = []
        title = f"Training, once: epoch {epoch} of {epochs}"
        for images, labels in show_progress(loader, title):
            optimizer.zero_grad()
            value = loss(images.to(device), labels.to(device))
            value.backward()
            optimizer.step()
            losses.append(value.detach())
    network.eval()
    return float(torch.stack(losses).mean())


def cached(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What is cached at ``path``; one of several processes makes it.

    It is made again if the file is damaged or another one, which its name inside tells.
    """
    with FileLock(f"{path}.lock"):
        if path.is_file():
            try:
                saved = torch.load(path, map_location="cpu", weights_only=True)
                if saved["name"] == path.name:
                    return saved["content"]
                log.warning("%s is a renamed file; it is made again", path)
            except Exception as error:  # whatever the damage leads to
                kind = type(error).__name__
                log.warning("%s is damaged or an older one (%s); it is made again", path, kind)
        made = make()
        atomic_save(path, {"name": path.name, "content": made})
        return made
