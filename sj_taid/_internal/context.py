"""Context managers: random numbers that leave the random state alone, and eval mode."""

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@contextmanager
def eval_mode(net: nn.Module) -> Iterator[None]:
    """Put ``net`` in eval mode inside; after, every module is back in its own mode."""
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw random numbers from ``seed`` inside; the global random state is left alone."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):  # all are seeded
        torch.manual_seed(seed)
        yield


@contextmanager
def forked(tensors: Iterable[Any]) -> Iterator[None]:
    """Restore the random states after: Python's, numpy's, and torch's.

    Torch's are those of the CPU and of the GPUs that these tensors are on.
    """
    devices = {t.device for t in tensors if isinstance(t, Tensor) and t.is_cuda}
    plain, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(plain)
        np.random.set_state(of_numpy)  # noqa: NPY002
