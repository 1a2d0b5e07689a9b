"""What ``accelerate`` gains in any net: bytes, time, and the largest batch that fits.

    PYTHONPATH=. python experiments/benchmark/any_net.py my_nets:make --shape 4 16 3 32 32

writes ``any_net-make.csv`` with a row for the plain net and one for the accelerated net that
``my_nets.make()`` gives; ``--compile`` adds ``torch.compile`` of both. The shape is that of the
input, ``[T, N, ...]``; of a net that repeats an image itself, ``[N, ...]``, say ``--batch-axis 0``.
A step is forward, a loss of all outputs, and backward, from rest; bfloat16 is autocast.

``held_mb`` is what torch's allocator holds after a forward, beyond what it held before, and
``peak_mb`` the most during a step. ``largest_batch`` is what fits into the budget, in GB, with the
net's weights and no optimizer: the peak grows in proportion to the batch, as half the batch shows.
``difference`` is the largest between outputs or gradients, relative to that tensor's largest value.
"""

import argparse
import copy
import math
import pkgutil
from collections.abc import Sequence
from functools import partial
from typing import Any

import pandas as pd
import torch
from common import (
    DTYPES,
    autocast,
    held_bytes,
    interleave,
    parser,
    peak_bytes,
    train_step,
    write_csv,
)
from spikingjelly.activation_based import functional, neuron, surrogate
from torch import Tensor, nn

from sj_taid import accelerate
from sj_taid.training.allocator import reuse_freed_memory


def sew_resnet18() -> nn.Module:
    """SpikingJelly's, for ImageNet, with IF neurons, as in its issue 740."""
    return zoo("sew_resnet:sew_resnet18", spiking_neuron=neuron.IFNode, cnf="ADD")


def spikformer() -> nn.Module:
    """SpikingJelly's, for CIFAR10."""
    return zoo("spikformer:spikformer_cifar10", spiking_neuron=neuron.LIFNode)


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
    if options.shape[options.batch_axis] < 2:
        raise SystemExit(f"--shape {options.shape}: expected a batch of 2 or more, for its half")
    torch.manual_seed(0)
    reuse_freed_memory()
    try:
        factory = pkgutil.resolve_name(options.net)
    except (ImportError, AttributeError, ValueError) as error:
        raise SystemExit(f"{options.net}: {error}; expected package.module:factory") from error
    table = measure(factory(), options)
    name = f"any_net-{options.net.rpartition(':')[2]}.csv"
    write_csv(table, options.out / name, options.device)


def measure(net: nn.Module, options: argparse.Namespace) -> pd.DataFrame:
    """A row for each system."""
    net = net.to(options.device)
    x, batch = torch.rand(options.shape, device=options.device), options.shape[options.batch_axis]
    half_x = x.narrow(options.batch_axis, 0, batch // 2).clone()
    systems: dict[str, Any] = {"plain": net, "accelerate": copy.deepcopy(net)}
    report = accelerate(systems["accelerate"])
    if options.compile:
        for name, one in [*systems.items()]:
            compiled = torch.compile(copy.deepcopy(one), dynamic=False)
            systems[f"{name} + torch.compile"] = compiled
    weights = sum(t.nbytes for t in (*net.parameters(), *net.buffers()))
    steps = {name: partial(train_step, one, x, options.dtype) for name, one in systems.items()}
    results = {name: step() for name, step in steps.items()}
    print(report)
    table = interleave(steps, options.repeats, options.device)
    table["time_ratio"] = table["median_ms"] / table["median_ms"]["plain"]
    rows: dict[str, dict[str, Any]] = {}
    for name, one in systems.items():
        peak = peak_bytes(steps[name], options.device)
        half_peak = peak_bytes(partial(train_step, one, half_x, options.dtype), options.device)
        per_sample = (peak - half_peak) / (batch - batch // 2)
        left = 1e9 * options.budget - weights - (peak - per_sample * batch)
        with autocast(options.device, options.dtype):
            held = held_bytes(one, x)
        differs_most, difference = compare(results[name], results["plain"])
        rows[name] = {
            "dtype": options.dtype,
            "shape": options.shape,
            "batch": batch,
            "held_mb": held / 1e6,
            "peak_mb": peak / 1e6,
            "mb_per_sample": per_sample / 1e6,
            "budget_gb": options.budget,
            "largest_batch": math.floor(left / max(per_sample, 1)),
            "difference": difference,
            "differs_most": differs_most,
        }
    table = pd.DataFrame.from_dict(rows, orient="index").join(table).rename_axis("system")
    return table.reset_index().assign(net=options.net)


def compare(ours: dict[str, Tensor], plain: dict[str, Tensor]) -> tuple[str, float]:
    """The tensor that differs most, and by how much of its largest value."""
    largest = {name: tensor.abs().max().item() for name, tensor in plain.items()}
    # The gradient of a bias in front of a norm is zero but for rounding.
    least = 0.01 * max(largest.values())
    differences = {
        name: (ours[name] - tensor).abs().max().item() / max(largest[name], least)
        for name, tensor in plain.items()
    }
    name = max(differences, key=lambda name: differences[name])
    return name, differences[name]


if __name__ == "__main__":
    main()
