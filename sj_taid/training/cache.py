"""What is made once: the helper networks of metrics and losses, and statistics of test images."""

import hashlib
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from pydantic import PositiveInt
from torch import Tensor, nn

from .._internal.context import seeded
from .._internal.kinds import Seed
from ..data import ImageData
from .callbacks import show_progress
from .files import atomic_save

log = logging.getLogger(__name__)


def fit_once(
    folder: Path,
    kind: str,
    make: Callable[[], nn.Module],
    loss: Callable[[Any, Tensor, Tensor], Tensor],
    data: ImageData,
    *,
    lr: float,
    epochs: PositiveInt,
    batch_size: PositiveInt,
    seed: Seed,
    device: torch.device | str = "cpu",
) -> Any:
    """A network, in eval mode: cached in ``folder``, or first trained on the training images.

    ``loss`` takes the network, a batch of images as they are, and its labels.
    """

    def train() -> dict[str, Any]:
        # Of a distributed run each process has all images.
        drop_last = len(data.train_set) >= batch_size
        loader = data.loader(
            data.train_set, batch_size=batch_size, shuffle=True, drop_last=drop_last
        )
        adam = torch.optim.AdamW(network.parameters(), lr=lr)
        for epoch in range(1, epochs + 1):
            errors = []
            title = f"Training the {kind} of {data.name}, once: epoch {epoch} of {epochs}"
            for images, labels in show_progress(loader, title):
                adam.zero_grad()
                error = loss(network, images.to(device), labels.to(device))
                error.backward()
                adam.step()
                errors.append(error.detach())
        log.info("The %s is in %s; its error is %.4f", kind, folder, torch.stack(errors).mean())
        return network.state_dict()

    with seeded(seed):  # its own, so that every run has the same network
        network = make().to(device)
        how = repr(network), lr, epochs, batch_size, seed, data.fingerprint(data.train_set)
        network.load_state_dict(cached(cache_path(folder, kind, data, *how), train))
    return network.eval()


def cache_path(folder: Path, kind: str, data: ImageData, *how: Any) -> Path:
    """The file of what is made once for this data set, and told apart by ``how`` it is made."""
    digest = hashlib.sha256(json.dumps(how).encode()).hexdigest()[:16]
    name = re.sub(r"[^\w.-]", "-", data.name)  # a config's, which may be from elsewhere
    return folder / f"{kind}-{name}-{digest}.pt"


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
