"""Peak memory and time of a training step: SpikingJelly, memopt, accelerate, torch.compile.

    python experiments/benchmark/frontier.py --nets sew_resnet18 --steps 4

adds its rows to ``frontier.csv``, in place of equal ones, so it can run in pieces.
``--compile`` adds ``torch.compile`` of each system, which takes minutes. A step is forward, loss
and backward from rest on ``[T, N, 3, H, W]``; bfloat16 is autocast.

``peak_mb`` is the most that torch's allocator held during a step, beyond what it held before:
activations, temporary tensors, gradients of parameters. On a GPU that is ``max_memory_allocated``.
On a CPU it is counted from the allocations that the profiler records, those inside of fused
operators and oneDNN's reordered copies too. ``mb_per_sample`` is what each sample adds to the peak
of half the batch, so gradients of parameters are not in it.

Nets have SpikingJelly's width, but VGG one linear layer behind its convolutions: the gradient of
the three for ImageNet takes 500 MB. Lists of layers are cut into blocks, since ``memopt``
recomputes whole modules. Its levels 2 to 4 search by a GPU's allocator, so a CPU has level 1.
"""

import argparse
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pandas as pd
import torch
from common import measure_steps, parser, write_csv
from spikingjelly.activation_based import functional, layer, memopt, neuron, surrogate
from spikingjelly.activation_based.model import parametric_lif_net, sew_resnet, spikformer
from spikingjelly.activation_based.model.spiking_vgg import spiking_vgg11_bn
from torch import Tensor, nn

from sj_taid import accelerate
from sj_taid.training.process import reuse_freed_memory


class Block(nn.Sequential):
    """Layers up to a neuron."""


def in_blocks(layers: nn.Sequential) -> nn.Sequential:
    """The layers, those up to each neuron in a :class:`Block`."""
    blocks: list[nn.Module] = []
    block: list[nn.Module] = []
    for module in layers:
        block.append(module)
        if isinstance(module, neuron.BaseNode):
            blocks.append(Block(*block))
            block = []
    return nn.Sequential(*blocks, *block)


def sew(**options: Any) -> nn.Module:
    net = sew_resnet.sew_resnet18(num_classes=10, cnf="ADD", **options)
    net.conv1 = Block(net.conv1, net.bn1, net.sn1)
    net.bn1, net.sn1 = nn.Identity(), nn.Identity()
    return net


def vgg(**options: Any) -> nn.Module:
    net = spiking_vgg11_bn(num_classes=10, **options)
    net.features = in_blocks(net.features)
    net.avgpool, net.classifier = layer.AdaptiveAvgPool2d(1), layer.Linear(512, 10)
    return net


def cifar10(**options: Any) -> nn.Module:
    return in_blocks(parametric_lif_net.CIFAR10Net(**options).conv_fc)


class Net(NamedTuple):
    """How to make a net with a kind of neuron, samples per step and their height and width."""

    make: Callable[..., nn.Module]
    batch: int
    size: int


NETS = {
    "sew_resnet18": Net(sew, 8, 64),
    "spiking_vgg11_bn": Net(vgg, 8, 32),
    "spikformer": Net(spikformer.spikformer_cifar10, 2, 32),
    "CIFAR10Net": Net(cifar10, 2, 32),
}
NEURONS = {"LIF": neuron.LIFNode, "PLIF": neuron.ParametricLIFNode}
#: What memopt recomputes.
TARGETS = (
    *(Block, sew_resnet.BasicBlock),
    *(spikformer.SpikformerConv2dBNLIF, spikformer.SpikformerBlock),
)


class System(NamedTuple):
    """How a net is trained; ``level`` is memopt's."""

    neuron: str = "PLIF"
    accelerated: bool = False
    level: int = 0
    compiled: bool = False

    def __str__(self) -> str:
        parts = {"accelerate": self.accelerated, f"memopt {self.level}": self.level}
        parts["torch.compile"] = self.compiled
        return " + ".join(name for name, used in parts.items() if used) or "SpikingJelly"


RIVAL = System()
#: What tells a row from others.
KEYS = ["net", "dtype", "T", "batch", "neuron", "system"]


def main(arguments: Sequence[str] | None = None) -> None:
    options_parser = parser(
        __doc__, repeats=5, dtypes=["float32", "bfloat16"], steps=[4, 8, 16], nets=NETS
    )
    add = options_parser.add_argument
    add("--neurons", nargs="+", choices=NEURONS, default=list(NEURONS))
    add("--batch", type=int, help="without it each net has its own")
    levels = [0, 1, 2, 3, 4] if torch.cuda.is_available() else [0, 1]
    add("--levels", nargs="+", type=int, choices=range(5), default=levels, help="of memopt")
    add("--compile", action="store_true", help="torch.compile too, without memopt")
    options = options_parser.parse_args(arguments)
    reuse_freed_memory()
    choices = itertools.product(options.neurons, (False, True), options.levels)
    systems = [System(*choice) for choice in choices]
    if options.compile:
        systems += [system._replace(compiled=True) for system in systems if not system.level]
    for name, dtype, T in itertools.product(options.nets, options.dtypes, options.steps):
        case = (name, dtype, T, options.batch or NETS[name].batch)
        table = measure(case, systems, options)
        write_csv(table.reset_index(), options.out / "frontier.csv", options.device, KEYS)


def measure(
    case: tuple[str, str, int, int], systems: Sequence[System], options: argparse.Namespace
) -> pd.DataFrame:
    """Measure systems, and time them in turns with PLIF; a row for each."""
    name, dtype, T, batch = case
    size = NETS[name].size
    x_seq = torch.rand(T, batch, 3, size, size, device=options.device)
    all_systems = [*dict.fromkeys([RIVAL, *systems])]
    nets = {f"{s.neuron} {s}": make(name, s, x_seq) for s in all_systems}
    table = measure_steps(nets, x_seq, 1, dtype, options.repeats).assign(size=size)
    rows = [(*case, system.neuron, str(system)) for system in all_systems]
    table.index = pd.MultiIndex.from_tuples(rows, names=KEYS)
    return table[[system in systems for system in all_systems]]


def make(name: str, system: System, x_seq: Tensor) -> Any:
    """A net that trains as ``system`` does."""
    torch.manual_seed(0)
    options = {"surrogate_function": surrogate.ATan()}
    net = NETS[name].make(spiking_neuron=NEURONS[system.neuron], **options).to(x_seq.device)
    functional.set_step_mode(net, "m")
    if system.level:
        memopt.optimize_memory(
            net,
            TARGETS,
            lambda net: net(x_seq),
            level=system.level,
            split_fn=lambda module: tuple(module.children()),
            can_chunk=lambda module: isinstance(module, nn.Conv2d | nn.Conv1d | neuron.BaseNode),
        )
        functional.reset_net(net)
    if system.accelerated:
        accelerate(net)
    return torch.compile(net, dynamic=False) if system.compiled else net


if __name__ == "__main__":
    main()
