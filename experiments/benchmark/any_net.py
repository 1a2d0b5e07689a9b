"""What ``accelerate`` gains in any net: bytes, time, and the largest batch that fits.

    python experiments/benchmark/any_net.py my_nets:make --shape 4 16 3 32 32

adds to ``any_net-make.csv`` a row for the plain net and one for the accelerated net that
``my_nets.make()`` gives, in place of equal ones; ``--compile`` adds ``torch.compile`` of both. Each
is timed in turns with the plain net, and its row is written before the next one is measured. The
shape is that of the input, ``[T, N, ...]``; of a net that repeats an image itself, ``[N, ...]``,
say ``--batch-axis 0``. A step is forward, a loss of all outputs, and backward, from rest; bfloat16
is autocast.

``held_mb`` is what torch's allocator holds after a forward, beyond what it held before, and
``peak_mb`` the most during a step. ``largest_batch`` is what fits into the budget, in GB, with the
net's weights and no optimizer: the peak grows in proportion to the batch, as half the batch shows.
``difference`` is the largest between outputs or gradients, relative to that tensor's largest value.
Gradients that are zero but for rounding, as that of a bias in front of a norm, are left out: those
whose largest value in float64, on a CPU, is below 1e-10 of the largest gradient.
"""

import argparse
import copy
import math
import pkgutil
import sys
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from typing import Any

import pandas as pd
import torch
from common import DTYPES, held_bytes, measure_steps, parser, train_step, write_csv
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import Tensor, nn

from sj_taid import accelerate
from sj_taid.training.process import reuse_freed_memory

#: of the largest gradient, what is rounding in float64 and a value in no net that learns
ZERO = 1e-10
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


def norm_and_neuron(kind: str = "LIFNode") -> nn.Module:
    """That pair alone, on ``[T, N, 128, H, W]``."""
    node = getattr(neuron, kind)(surrogate_function=surrogate.ATan())
    net = nn.Sequential(layer.BatchNorm2d(128), node)
    functional.set_step_mode(net, "m")
    return net


#: the same of neurons that are no LIF
klif, qif = partial(norm_and_neuron, "KLIFNode"), partial(norm_and_neuron, "QIFNode")
clif = partial(norm_and_neuron, "ComplementaryLIFNode")
izhikevich = partial(norm_and_neuron, "IzhikevichNode")
ternary = partial(norm_and_neuron, "TernaryLIFNode")


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
    path = options.out / f"any_net-{options.net.rpartition(':')[2]}.csv"
    for row in measure(factory(), options):
        write_csv(row, path, options.device, KEYS)


def measure(net: nn.Module, options: argparse.Namespace) -> Iterator[pd.DataFrame]:
    """A row for each system, as soon as it is measured, in turns with the plain net."""
    net = net.to(options.device)
    x, batch = torch.rand(options.shape, device=options.device), options.shape[options.batch_axis]
    systems: dict[str, Any] = {"plain": net, "accelerate": copy.deepcopy(net)}
    report = accelerate(systems["accelerate"], x)
    if options.compile:
        for name, one in [*systems.items()]:
            compiled = torch.compile(copy.deepcopy(one), dynamic=False)
            systems[f"{name} + torch.compile"] = compiled
    zero = zero_gradients(net, x.narrow(options.batch_axis, 0, min(batch, 2)))
    weights = sum(t.nbytes for t in (*net.parameters(), *net.buffers())) / 1e6
    facts = {"net": options.net, "dtype": options.dtype, "shape": str(options.shape)}
    plain: dict[str, Tensor] = {}
    for name, one in systems.items():
        result = train_step(one, x, options.dtype)
        plain = plain or result
        if name == "accelerate":
            print(report)
        differs_most, difference = compare(result, plain, zero)
        pair = {"plain": net, name: one}
        table = measure_steps(pair, x, options.batch_axis, options.dtype, options.repeats)
        row = table.loc[[name]].assign(
            held_mb=held_bytes(one, x, options.dtype) / 1e6,
            differs_most=differs_most,
            difference=difference,
        )
        per_sample = row["mb_per_sample"]
        left = 1e3 * options.budget - weights - (row["peak_mb"] - per_sample * batch)
        row["largest_batch"] = left // per_sample.clip(lower=1e-6)
        row = row.assign(**facts, batch=batch, budget_gb=options.budget)
        yield row.rename_axis("system").reset_index()


def zero_gradients(net: nn.Module, x: Tensor) -> set[str]:
    """The parameters whose gradient is zero but for rounding."""
    found = train_step(copy.deepcopy(net).cpu().double(), x.cpu().double(), "float32")
    largest = {n: float(t.abs().max()) for n, t in found.items() if not n.startswith("output ")}
    bound = ZERO * max(largest.values(), default=0.0)
    return {name for name, value in largest.items() if value < bound}


def compare(
    ours: dict[str, Tensor], plain: dict[str, Tensor], zero: Collection[str]
) -> tuple[str, float]:
    """The tensor that differs most, but for those of ``zero``, and by how much of its largest."""
    differences = {}
    for name, tensor in plain.items():
        if name not in zero and not torch.equal(ours[name], tensor):
            difference = float((ours[name] - tensor).abs().max() / tensor.abs().max())
            differences[name] = math.inf if math.isnan(difference) else difference
    return max(differences.items(), key=lambda item: item[1], default=("", 0.0))


if __name__ == "__main__":
    main()
