"""What the models' tests share: neurons, images, and norms that carry nothing over."""

from functools import partial

import torch
from spikingjelly.activation_based import neuron, surrogate
from torch import nn

from sj_taid.model.spiking_vae import original_neuron

lif = partial(
    neuron.LIFNode,
    tau=4 / 3,
    decay_input=False,
    v_threshold=0.2,
    v_reset=0.0,
    surrogate_function=surrogate.PiecewiseLeakyReLU(w=0.5, c=0.0),
    step_mode="m",
)
plif = partial(neuron.ParametricLIFNode, **original_neuron.keywords)


def images(n=3, channels=1, size=8):
    return torch.rand(n, channels, size, size) * 2 - 1


def without_running_statistics(model):
    """The model, whose norms learn none: the only state that training is meant to carry over."""
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            norm.momentum = 0.0
    return model


def assert_every_parameter_learns(model, losses):
    assert losses["loss"] == losses["reconstruction"] + losses["latent"]
    losses["loss"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        # A norm right after it takes away what a bias adds.
        if not name.endswith(("stem.0.bias", ".0.0.bias")):
            assert parameter.grad.abs().sum() > 0, name
