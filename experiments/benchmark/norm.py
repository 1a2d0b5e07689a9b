"""Bytes saved for backward and time of a training step: norm and neuron apart, and accelerated.

    python experiments/benchmark/norm.py

writes ``norm.csv``. ``norm + neuron`` is that pair alone, on [T, 32, 128, 14, 14];
``2 x [conv, norm, neuron]`` takes [T, 8, 32, 16, 16], ``3 x [conv, norm, neuron]``
[T, N, 3, 32, 32]. With ``--compile`` torch.compile rivals them. bfloat16 is autocast. Bytes are
counted from what autograd saves, each storage once, without parameters. ``frontier.py`` and
``zoo.py`` measure whole nets.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Callable, Sequence
from functools import partial

import pandas as pd
import torch
from common import DTYPES, autocast, interleave, parser, saved_bytes, write_csv
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import Tensor, nn

from sj_taid import ALIFNode, accelerate, swap_neurons
from sj_taid.training.process import reuse_freed_memory

PAIR, SMALL = "norm + neuron", "2 x [conv, norm, neuron]"
LAYERS = "3 x [conv, norm, neuron]"
NETS = (PAIR, SMALL, LAYERS)
RIVAL = "SpikingJelly PLIF"


def make(name: str, spiking_neuron: Callable[..., nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    options = {"surrogate_function": surrogate.ATan()}
    if name == PAIR:
        net = nn.Sequential(layer.BatchNorm2d(128), spiking_neuron(**options))
    else:
        layers: list[nn.Module] = []
        widths = (32, 32, 32) if name == SMALL else (3, 64, 64, 64)
        for before, width in itertools.pairwise(widths):
            layers.append(layer.Conv2d(before, width, 3, padding=1, bias=False))
            layers += [layer.BatchNorm2d(width), spiking_neuron(**options)]
        net = nn.Sequential(*layers)
    functional.set_step_mode(net, "m")
    return net


def variants(name: str, compile_too: bool) -> dict[str, nn.Module]:
    """The net with each neuron, and ours in each form."""
    two = make(name, neuron.LIFNode)
    swap_neurons(two)
    one = copy.deepcopy(two)
    accelerate(one)
    nets = {"SpikingJelly LIF": make(name, neuron.LIFNode)}
    nets[RIVAL] = make(name, neuron.ParametricLIFNode)
    nets |= {"ALIF, two operators": two, "ALIF, one operator": one}
    if compile_too:
        nets["ALIF torch, compiled"] = compiled = copy.deepcopy(two)
        for module in compiled.modules():
            if isinstance(module, ALIFNode):
                module.backend = "torch"
        compiled.compile(dynamic=False)
    return nets


def forward(net: nn.Module, x_seq: Tensor, dtype: str) -> Tensor:
    """A forward pass from rest."""
    functional.reset_net(net)
    with autocast(x_seq.device, dtype):
        return net(x_seq)


def train_step(net: nn.Module, x_seq: Tensor, dtype: str, gradient: Tensor) -> None:
    forward(net, x_seq, dtype).backward(gradient)
    net.zero_grad()
    functional.reset_net(net)


def main(arguments: Sequence[str] | None = None) -> None:
    options_parser = parser(
        __doc__, repeats=7, dtypes=["float32", "bfloat16"], steps=[4, 8, 16], nets=NETS
    )
    add = options_parser.add_argument
    add("--batch", type=int, default=8)
    add("--compile", action="store_true", help="also torch.compile of the torch backend")
    options = options_parser.parse_args(arguments)
    reuse_freed_memory()
    grid = itertools.product(options.nets, options.dtypes, options.steps)
    tables = {case: measure(*case, options) for case in grid}
    table = pd.concat(tables, names=["net", "dtype", "T", "variant"])
    write_csv(table.reset_index(), options.out / "norm.csv", options.device)


def measure(name: str, dtype: str, T: int, options: argparse.Namespace) -> pd.DataFrame:
    """Count the bytes of a net's variants and time them; a row for each."""
    sizes = {PAIR: (32, 128, 14, 14), SMALL: (8, 32, 16, 16)}
    size = sizes.get(name, (options.batch, 3, 32, 32))
    x_seq = torch.rand(T, *size, device=options.device)
    if name == PAIR:  # as a convolution under autocast leaves it
        x_seq = x_seq.to(DTYPES[dtype])
    nets = {key: net.to(options.device) for key, net in variants(name, options.compile).items()}
    with autocast(options.device, dtype):
        saved = {variant: saved_bytes(net, x_seq) for variant, net in nets.items()}
    with torch.no_grad():
        gradient = torch.randn_like(forward(nets[RIVAL], x_seq, dtype))
    steps = {key: partial(train_step, net, x_seq, dtype, gradient) for key, net in nets.items()}
    table = interleave(steps, options.repeats, options.device, warm_up=2)
    return table.assign(
        step=str(list(size)),
        saved_mb=pd.Series(saved) / 1e6,
        saved_ratio=pd.Series(saved) / saved[RIVAL],
        time_ratio=table["median_ms"] / table["median_ms"][RIVAL],
    )


if __name__ == "__main__":
    main()
