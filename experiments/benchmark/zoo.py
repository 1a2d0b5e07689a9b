"""What ``accelerate`` fuses in spiking nets, and the bytes that it saves.

    python experiments/benchmark/zoo.py

writes ``zoo.csv``: of each net, SpikingJelly's own with LIF neurons and small ones in the idioms of
published nets, the norms that are fused and why others are not, and the bytes that torch's
allocator holds after a forward, beyond what it held before, without and with ``accelerate``.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import published_nets
import torch
from common import held_bytes, parser, write_csv
from spikingjelly.activation_based import functional, neuron, surrogate
from spikingjelly.activation_based.model import (
    masnn,
    maxformer,
    ms_resnet,
    parametric_lif_net,
    qkformer,
    sew_resnet,
    spike_driven_transformer,
    spikformer,
    spiking_resnet,
)
from spikingjelly.activation_based.model.spiking_vgg import spiking_vgg11_bn
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sj_taid import accelerate
from sj_taid.nets.summary import NO_GRADIENT

#: How to make a net of SpikingJelly; those of spikformer_cifar10 and below are for 32 x 32 pixels.
NETS: dict[str, Callable[..., nn.Module]] = {
    "sew_resnet18": lambda **options: sew_resnet.sew_resnet18(cnf="ADD", **options),
    "spiking_resnet18": spiking_resnet.spiking_resnet18,
    "spiking_resnet50": spiking_resnet.spiking_resnet50,
    "spiking_vgg11_bn": lambda **options: spiking_vgg11_bn(**options).features,
    "CIFAR10Net": parametric_lif_net.CIFAR10Net,
    "spikformer_cifar10": spikformer.spikformer_cifar10,
    "qkformer_10_384": qkformer.qkformer_10_384,
    "sdt_8_384": spike_driven_transformer.sdt_8_384,
    "maxformer_cifar": maxformer.maxformer_cifar,
    "ms_resnet18": ms_resnet.ms_resnet18,
    "max_resnet18": ms_resnet.max_resnet18,
    "att_ms_resnet18": masnn.att_ms_resnet18,
}
APART = "computed apart: "


def main(arguments: Sequence[str] | None = None) -> None:
    options_parser = parser(__doc__, nets=[*NETS, *published_nets.NETS])
    options_parser.add_argument("--steps", type=int, default=4, metavar="T")
    options_parser.add_argument("--size", type=int, default=32, help="height and width of an image")
    options = options_parser.parse_args(arguments)
    table = pd.DataFrame([measure(name, options) for name in options.nets])
    write_csv(table, options.out / "zoo.csv", options.device)


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name in published_nets.NETS:
        return published_nets.build(name, width=16)
    net = NETS[name](spiking_neuron=neuron.LIFNode, surrogate_function=surrogate.ATan())
    functional.set_step_mode(net, "m")
    return net


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The row of a net."""
    net = build(name).to(options.device)
    shape = (options.steps, 2, 3, options.size, options.size)
    x_seq = torch.rand(shape, device=options.device)
    before = held_bytes(net, x_seq)
    report = accelerate(net, x_seq)
    after = held_bytes(net, x_seq)
    kinds = dict(net.named_modules())
    norms = [row for row in report.rows if isinstance(kinds[row.layer], _BatchNorm)]
    readers = Counter(
        row.note.rpartition(APART)[2]
        .removeprefix("read by ")
        .replace(NO_GRADIENT, "no one")
        .partition(",")[0]
        .removesuffix("_with_indices")
        .rstrip("_")
        for row in norms
        if row.state != "fused"
    )
    return {
        "net": name,
        "written": "as published" if name in published_nets.NETS else "by SpikingJelly",
        "T": options.steps,
        "shape": list(shape),
        "neurons": len(report.rows) - len(norms),
        "norms": len(norms),
        "fused": sum(row.state == "fused" for row in norms),
        "left": ", ".join(f"{count} {reader}" for reader, count in readers.most_common()),
        "before_mb": before / 1e6,
        "after_mb": after / 1e6,
        "ratio": after / before,
    }


if __name__ == "__main__":
    main()
