"""A norm's output, whatever is done to it before it is read."""

import copy
import itertools

import pytest
import torch
from spikingjelly.activation_based import neuron, surrogate
from torch import nn

import sj_taid
from sj_taid.acceleration.norm_output import NormOutput

LAST = {"memory_format": torch.channels_last}


def transposed(x, *axes):
    return x.transpose(*axes).contiguous().transpose(*axes)


#: inputs of a norm in every memory order, of images [8, 6, 5, 7]
LAYOUTS = {
    "rows": lambda x: x[..., 0, 0],
    "columns": lambda x: transposed(x[..., 0, 0], 0, 1),
    "tokens": lambda x: x.flatten(2).contiguous(),
    "transposed tokens": lambda x: transposed(x.flatten(2), 1, 2),
    "some transposed tokens": lambda x: transposed(torch.cat([x, x], 1).flatten(2), 1, 2)[:, 3:9],
    "windows": lambda x: x.flatten(2).unfold(2, 4, 2)[:, :, 0:3],
    "images": lambda x: x,
    "channels last": lambda x: x.contiguous(**LAST),
    "batch innermost": lambda x: transposed(x, 0, 3),
    "repeated": lambda x: x[:1].expand(x.shape),
    "repeated, channels last": lambda x: x[:1].contiguous(**LAST).expand(x.shape),
    "some channels": lambda x: torch.cat([x, x], 1)[:, :6],
    "some channels last": lambda x: torch.cat([x, x], 1).contiguous(**LAST)[:, :6],
    "every third pixel, channels last": lambda x: x.contiguous(**LAST)[::2, :, :, ::3],
    "pixels": lambda x: x[..., :1, :1].contiguous(**LAST),
    "videos, channels last": lambda x: (
        x.unsqueeze(2).repeat(1, 1, 3, 1, 1).contiguous(memory_format=torch.channels_last_3d)
    ),
}
SETTINGS = [*itertools.product((True, False), repeat=3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_norm_apart_is_torchs_bit_for_bit(layout, dtype):
    for training, affine, tracked in SETTINGS:
        x = LAYOUTS[layout](torch.randn(8, 6, 5, 7).mul(3).add(1).to(dtype))
        kind = {4: nn.BatchNorm2d, 5: nn.BatchNorm3d}.get(x.dim(), nn.BatchNorm1d)
        norm = kind(6, affine=affine, track_running_stats=tracked).train(training)
        for tensor in (*norm.parameters(), norm.running_mean, norm.running_var):
            if tensor is not None:
                nn.init.uniform_(tensor, 0.5, 2.0)
        fast, found, penalties = copy.deepcopy(norm), [], []
        sj_taid.accelerate(nn.ModuleList([fast, neuron.LIFNode(step_mode="m")]))
        factors = torch.randn(x.shape).to(dtype).requires_grad_()
        for module in (norm, fast):
            leaf = x.detach().requires_grad_()
            inputs, y = [leaf, *module.parameters()], module(leaf.view_as(leaf))
            gradients = torch.autograd.grad(loss := y * factors, inputs, factors, retain_graph=True)
            unread = torch.autograd.grad(module(leaf.view_as(leaf)), inputs, factors)
            found.append([y * 1, *gradients, *unread])
            strides = [t.stride() for t in (y, *found[-1])]
            found[-1].append(torch.tensor([n for axes in strides for n in axes]))
            graph = torch.autograd.grad(loss.sum(), leaf, create_graph=True)[0].square().sum()
            penalties.append(torch.autograd.grad(graph, factors)[0])
        assert type(y) is NormOutput
        assert all(map(torch.equal, *found)), (training, affine, tracked)
        torch.testing.assert_close(*penalties, rtol=1e-2, atol=1e-2)
