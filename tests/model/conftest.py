"""Shared by the models' tests: images, and gradients of every parameter."""

import torch


def images(n=3, channels=1, size=8):
    return torch.rand(n, channels, size, size) * 2 - 1


def assert_every_parameter_learns(model, loss):
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        # A norm right after it takes away what a bias adds.
        if not name.endswith(("stem.0.bias", ".0.0.bias")):
            assert parameter.grad.abs().sum() > 0, name
