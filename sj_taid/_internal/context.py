"""Context managers: random numbers from a seed, and eval mode."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


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
