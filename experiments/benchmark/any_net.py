"""What ``accelerate`` gains in any net: bytes, time, and the largest batch that fits.

    python experiments/benchmark/any_net.py my_nets:make --shape 4 16 3 32 32

adds to ``any_net-make.csv`` a row for the plain net and one for the accelerated net that
``my_nets.make()`` gives, in place of equal ones; ``--compile`` adds ``torch.compile`` of both. The
shape is that of the input, ``[T, N, ...]``; of a net that repeats an image itself, ``[N, ...]``,
say ``--batch-axis 0``. A step is forward, a loss of all outputs, and backward, from rest; bfloat16
is autocast.

``held_mb`` is what torch's allocator holds after a forward, beyond what it held before, and
``peak_mb`` the most during a step. ``largest_batch`` is what fits into the budget, in GB, with the
net's weights and no optimizer: the peak grows in proportion to the batch, as half the batch shows.
``difference`` is the largest between outputs or gradients, relative to that tensor's largest value.
"""

import argparse
import copy
import math
import pkgutil
import sys
from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from common import (
    DTYPES,
    autocast,
    held_bytes,
    measure_steps,
    parser,
    train_step,
    write_csv,
)
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import Tensor, nn

from sj_taid import accelerate
from sj_taid.training.process import reuse_freed_memory

#: What tells a row from others.
KEYS = ["net", "dtype", "shape", "system"]


def sew_resnet18() -> nn.Module:
    """SpikingJelly's, for ImageNet, with IF neurons.

    Its issue 740 has, on an RTX 4090 in bfloat16 at 4 x 112 x 3 x 224 x 224, eager 232 ms and 10.1
    GiB, compiled 145 ms and 6.9 GiB, with Triton neurons 129 ms and 8.0 GiB.
    """
    return zoo("sew_resnet:sew_resnet18", spiking_neuron=neuron.IFNode, cnf="ADD")


def spikformer() -> nn.Module:
    """SpikingJelly's, for CIFAR10."""
    return zoo("spikformer:spikformer_cifar10", spiking_neuron=neuron.LIFNode)


def norm_and_neuron() -> nn.Module:
    """That pair alone, on ``[T, N, 128, H, W]``."""
    net = nn.Sequential(layer.BatchNorm2d(128), neuron.LIFNode(surrogate_function=surrogate.ATan()))
    functional.set_step_mode(net, "m")
    return net


def zoo(path: str, **options: Any) -> nn.Module:
    make = pkgutil.resolve_name(f"spikingjelly.activation_based.model.{path}")
    net = make(surrogate_function=surrogate.ATan(), detach_reset=True, **options)
    functional.set_step_mode(net, "m")
    return net


def main(arguments: Sequence[str] | None = None) -> None:
    options_parser = parser(__doc__, repeats=5)
    add = options_parser.add_argument
    add("net", help="package.module:factory, a function without arguments")
    add("--shape", nargs="+", type=int, required=True, help="of the input")
    add("--batch-axis", type=int, default=1, help="the axis of the shape that is the batch")
    add("--dtype", choices=DTYPES, default="float32")
    add("--budget", type=float, default=24.0, help="memory in GB")
    add("--compile", action="store_true", help="torch.compile too")
    options = options_parser.parse_args(arguments)
    torch.manual_seed(0)
    reuse_freed_memory()
    sys.path.append(".")  # Python looks in the script's folder, not where the user is
    try:
        factory = pkgutil.resolve_name(options.net)
    except (ImportError, AttributeError, ValueError) as error:
        raise SystemExit(f"{options.net}: {error}; expected package.module:factory") from error
    table = measure(factory(), options)
    name = f"any_net-{options.net.rpartition(':')[2]}.csv"
    write_csv(table, options.out / name, options.device, KEYS)


def measure(net: nn.Module, options: argparse.Namespace) -> pd.DataFrame:
    """A row for each system."""
    net = net.to(options.device)
    x, batch = torch.rand(options.shape, device=options.device), options.shape[options.batch_axis]
    systems: dict[str, Any] = {"plain": net, "accelerate": copy.deepcopy(net)}
    report = accelerate(systems["accelerate"])
    if options.compile:
        for name, one in [*systems.items()]:
            compiled = torch.compile(copy.deepcopy(one), dynamic=False)
            systems[f"{name} + torch.compile"] = compiled
    results = {name: train_step(one, x, options.dtype) for name, one in systems.items()}
    print(report)
    table = measure_steps(systems, x, options.batch_axis, options.dtype, options.repeats)
    for name, one in systems.items():
        with autocast(options.device, options.dtype):
            table.loc[name, "held_mb"] = held_bytes(one, x) / 1e6
        differs_most, difference = compare(results[name], results["plain"])
        table.loc[name, "differs_most"] = differs_most
        table.loc[name, "difference"] = difference
    weights = sum(t.nbytes for t in (*net.parameters(), *net.buffers())) / 1e6
    per_sample = table["mb_per_sample"]
    left = 1e3 * options.budget - weights - (table["peak_mb"] - per_sample * batch)
    table["largest_batch"] = left // per_sample.clip(lower=1e-6)
    facts = {"net": options.net, "dtype": options.dtype, "shape": str(options.shape)}
    table = table.assign(**facts, batch=batch, budget_gb=options.budget)
    return table.rename_axis("system").reset_index()


def compare(ours: dict[str, Tensor], plain: dict[str, Tensor]) -> tuple[str, float]:
    """The tensor that differs most, and by how much of its largest value."""
    largest = pd.Series({name: tensor.abs().max().item() for name, tensor in plain.items()})
    # The gradient of a bias in front of a norm is zero but for rounding.
    largest = largest.clip(lower=0.01 * largest.max())
    difference = pd.Series({name: (ours[name] - t).abs().max().item() for name, t in plain.items()})
    difference = (difference / largest).fillna(math.inf)  # NaN differs most
    return str(difference.idxmax()), difference.max()


if __name__ == "__main__":
    main()
