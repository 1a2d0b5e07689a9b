"""Shared by the models' tests: neurons, images, and gradients of every parameter."""

from functools import partial

import torch
from spikingjelly.activation_based import neuron

from sj_taid.model.spiking_vae import original_neuron
from sj_taid.ops.surrogate import Rect

lif = partial(
    neuron.LIFNode,
    tau=4 / 3,
    decay_input=False,
    v_threshold=0.2,
    v_reset=0.0,
    surrogate_function=Rect(alpha=1.0),
    step_mode="m",
)
plif = partial(neuron.ParametricLIFNode, **original_neuron.keywords)
frozen_alif = partial(original_neuron, learn_tau=False, learn_threshold=False)


def images(n=3, channels=1, size=8):
    return torch.rand(n, channels, size, size) * 2 - 1


def assert_every_parameter_learns(model, loss):
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        # A norm right after it takes away what a bias adds.
        if not name.endswith(("stem.0.bias", ".0.0.bias")):
            assert parameter.grad.abs().sum() > 0, name
