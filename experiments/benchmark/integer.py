"""Integer LIF in one time step against LIF in four: a training step of a classifier of CIFAR10.

    python experiments/benchmark/integer.py

writes ``integer.csv``: peak memory and time of the net of ``cifar10_classifier_cpu`` with
SpikingJelly's neurons, without and with ``accelerate``.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from common import measure_steps, parser, write_csv
from spikingjelly.activation_based import neuron, surrogate
from torch import nn

from sj_taid import accelerate
from sj_taid.model import Classifier
from sj_taid.ops.surrogate import MultiLevelSpikeCount
from sj_taid.training.process import reuse_freed_memory

#: each with its time steps
NEURONS: dict[str, tuple[Any, int]] = {
    "LIF": (partial(neuron.LIFNode, surrogate_function=surrogate.ATan()), 4),
    "integer LIF": (partial(neuron.ILIFNode, surrogate_function=MultiLevelSpikeCount(4)), 1),
}


def main(arguments: Sequence[str] | None = None) -> None:
    options_parser = parser(__doc__, repeats=15)
    options_parser.add_argument("--batch", type=int, default=64)
    options = options_parser.parse_args(arguments)
    reuse_freed_memory()
    nets = {name: make(name) for name in NEURONS}
    for name in NEURONS:
        accelerate(accelerated := make(name))
        nets[f"{name}, accelerate"] = accelerated
    nets = {name: net.to(options.device) for name, net in nets.items()}
    x = torch.rand(options.batch, 3, 16, 16, device=options.device)
    table = measure_steps(nets, x, 0, "float32", options.repeats)
    write_csv(table.rename_axis("system").reset_index(), options.out / "integer.csv", x.device)


def make(name: str) -> nn.Module:
    make_neuron, steps = NEURONS[name]
    torch.manual_seed(0)
    return Classifier(
        in_channels=3,
        image_size=16,
        T=steps,
        stages=[[16] * 3, [32] * 3],
        hidden=256,
        dropout=(0.2, 0.0),
        neuron=partial(make_neuron, detach_reset=True, step_mode="m"),
        output_neuron=False,
    )


if __name__ == "__main__":
    main()
