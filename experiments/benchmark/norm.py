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
from typing import Any

import torch
from common import DTYPES, conditions, interleave, parser, saved_bytes, write_csv
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import Tensor, nn

from sj_taid import ALIFNode, accelerate, swap_neurons
from sj_taid.training.allocator import reuse_freed_memory

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


class Step(nn.Module):
    """A forward pass from rest, under autocast for a lower ``dtype``."""

    def __init__(self, net: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.net = net
        self.dtype = dtype

    def forward(self, x_seq: Tensor) -> Tensor:
        functional.reset_net(self.net)
        lower = self.dtype != torch.float32
        with torch.autocast(x_seq.device.type, self.dtype, enabled=lower):
            return self.net(x_seq)

    def train_step(self, x_seq: Tensor, gradient: Tensor) -> None:
        self(x_seq).backward(gradient)
        self.zero_grad()
        functional.reset_net(self.net)


def main(arguments: Sequence[str] | None = None) -> None:
    options_parser = parser(__doc__, repeats=7)
    add = options_parser.add_argument
    add("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    add("--steps", nargs="+", type=int, default=[4, 8, 16], metavar="T")
    add("--batch", type=int, default=8)
    add("--nets", nargs="+", choices=NETS, default=list(NETS))
    add("--compile", action="store_true", help="also torch.compile of the torch backend")
    options = options_parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    reuse_freed_memory()
    grid = itertools.product(options.nets, options.dtypes, options.steps)
    rows = [row for case in grid for row in measure(*case, options)]
    write_csv(rows, options.out / "norm.csv")


def measure(name: str, dtype: str, T: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Count the bytes of a net's variants and time them; a row for each."""
    sizes = {PAIR: (32, 128, 14, 14), SMALL: (8, 32, 16, 16)}
    size = sizes.get(name, (options.batch, 3, 32, 32))
    x_seq = torch.rand(T, *size, device=options.device)
    if name == PAIR:  # as a convolution under autocast leaves it
        x_seq = x_seq.to(DTYPES[dtype])
    calls = {
        variant: Step(net.to(options.device), DTYPES[dtype])
        for variant, net in variants(name, options.compile).items()
    }
    saved = {variant: saved_bytes(call, x_seq) for variant, call in calls.items()}
    with torch.no_grad():
        gradient = torch.randn_like(calls[RIVAL](x_seq))
    steps = {variant: partial(call.train_step, x_seq, gradient) for variant, call in calls.items()}
    times = interleave(steps, options.repeats, options.device, warm_up=2)
    rows = []
    for variant, count in saved.items():
        row = {"net": name, "variant": variant, "dtype": dtype, "T": T, "step": list(size)}
        row |= {"saved_mb": count / 1e6, "saved_ratio": count / saved[RIVAL]}
        row |= times[variant]._asdict()
        row["time_ratio"] = times[variant].median_ms / times[RIVAL].median_ms
        rows.append(row | conditions(options.device))
    return rows


if __name__ == "__main__":
    main()
