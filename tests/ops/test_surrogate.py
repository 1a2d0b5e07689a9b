"""The table of derivatives: which surrogates it takes, and why not others."""

import re

import pytest
import torch
from spikingjelly.activation_based import surrogate
from torch import nn

from sj_taid.ops.surrogate import (
    DERIVATIVES,
    MultiLevelSpikeCount,
    by_name,
    unsupported,
)


def test_derivatives_have_names_of_their_own(monkeypatch):
    monkeypatch.setitem(DERIVATIVES, type("ATan", (Steeper,), {}), DERIVATIVES[surrogate.ATan])
    with pytest.raises(ValueError, match="2 classes of DERIVATIVES have the name 'ATan'"):
        by_name("ATan")


class Steeper(surrogate.ATan):
    """A subclass, whose backward may be anything."""


def hooked(register):
    getattr(function := surrogate.ATan(), register)(lambda *_: None)
    return function


@pytest.mark.parametrize(
    ("surrogate_function", "reason"),
    [
        (Steeper(), "the surrogate Steeper is not in"),
        (surrogate.SquarewaveFourierSeries(), "the surrogate SquarewaveFourierSeries is not in"),
        (torch.relu, "is not in"),
        (surrogate.Sigmoid(spiking=False), "spiking=False"),
        (MultiLevelSpikeCount(4, spiking=False), "spiking=False"),
        (hooked("register_forward_hook"), "hooks, which no kernel"),
        (hooked("register_forward_pre_hook"), "hooks, which no kernel"),
        (hooked("register_full_backward_hook"), "hooks, which no kernel"),
        (hooked("register_full_backward_pre_hook"), "hooks, which no kernel"),
        (surrogate.Sigmoid(alpha=nn.Parameter(torch.tensor(4.0))), "alpha .* Parameter"),
        (surrogate.Sigmoid(alpha=torch.tensor(4.0)), "alpha .* Tensor"),
    ],
)
def test_unsupported_says_why_not(surrogate_function, reason):
    assert re.search(reason, unsupported(surrogate_function))
