"""What Python and small operations cost: CPU time of accelerated norms and neurons, and of nets.

    python experiments/benchmark/host.py

writes ``host.csv``: forward and backward of a norm and a LIF, and of a LIF alone, in layers of
several sizes; of other neurons of SpikingJelly's; and training steps and forwards without gradients
of small nets in the idioms of published ones. Each system takes turns with its rival, ``plain``
first; times are medians of the process's CPU time and of wall time, and ratios are of CPU time.
Layers below a million values run on one thread.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import pandas as pd
import published_nets
import torch
from common import WARM_UP, parser, train_step, write_csv
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn

from sj_taid import ALIFNode, accelerate
from sj_taid.training.process import reuse_freed_memory

#: sequences, and how many turns they are measured for
LAYERS = {
    (4, 2, 8, 4, 4): 400,
    (8, 2, 8, 4, 4): 400,
    (4, 2, 64, 16, 16): 200,
    (8, 32, 128, 14, 14): 20,
}
#: neurons that are known by their steps alone, and a sequence below a million values
NEURONS = (
    *("KLIFNode", "RAFNode", "TernaryIFNode", "TernaryLIFNode", "QIFNode", "EIFNode"),
    *("ComplementaryLIFNode", "CUBALIFNode", "IzhikevichNode"),
)
SEQUENCE = (8, 20, 32, 14, 14)
#: values from which all threads compute
LARGE = 1 << 20
OPTIONS = {"step_mode": "m", "surrogate_function": surrogate.ATan(), "detach_reset": True}

Systems = Mapping[str, Callable[[], object]]


def main(arguments: Sequence[str] | None = None) -> None:
    options_parser = parser(__doc__, device=False, nets=published_nets.NETS)
    options_parser.add_argument("--turns", type=float, default=1.0, help="of the usual number")
    options = options_parser.parse_args(arguments)
    reuse_freed_memory()
    tables, threads = [], torch.get_num_threads()
    for what, shape, systems, turns in cases(options.nets):
        torch.set_num_threads(1 if torch.Size(shape).numel() < LARGE else threads)
        table = take_turns(systems, max(3, int(turns * options.turns)))
        table.insert(0, "what", what)
        table.insert(1, "shape", str([*shape]))
        tables.append(table)
    torch.set_num_threads(threads)  # which the CSV names
    write_csv(pd.concat(tables), options.out / "host.csv")


def cases(nets: Sequence[str]) -> Iterator[tuple[str, Sequence[int], Systems, int]]:
    """What is measured, for which input and how many turns."""
    for shape, turns in LAYERS.items():
        yield "norm and LIF", shape, norm_and_neuron(shape), turns
        yield "LIF", shape, neuron_alone(shape), turns
    for name in NEURONS:
        yield name, SEQUENCE, neuron_alone(SEQUENCE, getattr(neuron, name)), 10
    images = (4, 2, 3, 32, 32)
    for name in nets:
        steps, forwards = whole_nets(name, images)
        yield f"{name}: training step", images, steps, 40
        yield f"{name}: without gradients", images, forwards, 40


def take_turns(systems: Systems, turns: int) -> pd.DataFrame:
    """Microseconds of each system, medians, and the ratio to the first."""
    rows = [(name, *times(call)) for _ in range(WARM_UP + turns) for name, call in systems.items()]
    table = pd.DataFrame(rows[WARM_UP * len(systems) :], columns=["system", "cpu_us", "wall_us"])
    medians = table.groupby("system", sort=False).median()
    return medians.assign(cpu_ratio=medians["cpu_us"] / medians["cpu_us"].iloc[0]).reset_index()


def times(call: Callable[[], object]) -> tuple[float, float]:
    """Microseconds of this process, and those that pass."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return 1e6 * (time.process_time() - cpu), 1e6 * (time.perf_counter() - wall)


def training_steps(nets: Mapping[str, nn.Module], shape: Sequence[int]) -> Systems:
    x, grad = torch.randn(*shape).requires_grad_(), torch.randn(*shape)

    def step(net: nn.Module) -> None:
        functional.reset_net(net)
        net(x).backward(grad)

    return {name: partial(step, net) for name, net in nets.items()}


def norm_and_neuron(shape: Sequence[int]) -> Systems:
    """A norm and a LIF: plain, accelerated, torch's norm with ALIF, and with PLIF."""

    def pair(node: nn.Module) -> nn.Module:
        return nn.Sequential(layer.BatchNorm2d(shape[2], step_mode="m"), node)

    nets = {
        "plain": pair(neuron.LIFNode(**OPTIONS)),
        "accelerate": pair(neuron.LIFNode(**OPTIONS)),
        "plain PLIF": pair(neuron.ParametricLIFNode(**OPTIONS)),
        "norm, then ALIF": pair(ALIFNode(**OPTIONS)),
        "accelerate ALIF": pair(ALIFNode(**OPTIONS)),
    }
    accelerate(nets["accelerate"])
    accelerate(nets["accelerate ALIF"])
    return training_steps(nets, shape)


def neuron_alone(shape: Sequence[int], kind: type[nn.Module] | None = None) -> Systems:
    def make() -> nn.Sequential:
        node = kind(surrogate_function=surrogate.ATan()) if kind else neuron.LIFNode(**OPTIONS)
        net = nn.Sequential(node)
        functional.set_step_mode(net, "m")
        return net

    nets = {name: make() for name in ("plain", "accelerate")}
    accelerate(nets["accelerate"])
    return training_steps(nets, shape)


def whole_nets(name: str, shape: Sequence[int]) -> tuple[Systems, Systems]:
    """Training steps of a net, and forwards without gradients."""
    torch.manual_seed(0)
    plain, fast = (published_nets.build(name, width=16) for _ in range(2))
    fast.load_state_dict(plain.state_dict())
    accelerate(fast)
    x = torch.rand(*shape)

    def forward(net: nn.Module) -> None:
        functional.reset_net(net)
        with torch.no_grad():
            net(x)

    nets = {"plain": plain, "accelerate": fast}
    steps = {kind: partial(train_step, net, x, "float32") for kind, net in nets.items()}
    return steps, {kind: partial(forward, net) for kind, net in nets.items()}


if __name__ == "__main__":
    main()
