"""Energy of a pass: SpikingJelly's estimate, where a spike count adds as that many spikes do."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.bits import LARGEST_HALF

Rule = Callable[..., int]

_aten = torch.ops.aten
#: which arguments of an operation may be spikes or counts
_ACTIVATIONS: dict[Any, tuple[int, ...]] = {
    _aten.mm.default: (0, 1),
    _aten.addmm.default: (1,),
    _aten.bmm.default: (0, 1),
    _aten.baddbmm.default: (1, 2),
    _aten.convolution.default: (0,),
}


@torch.no_grad()
def estimate_energy(model: nn.Module, x: Tensor) -> float:
    """Energy of ``model(x)`` in µJ, by SpikingJelly's ``SimpleEnergyProfiler``.

    Additions where a layer's input is spikes (0.9 pJ), multiply-accumulates elsewhere (4.6 pJ),
    and 24.96 pJ for each byte of weights and states that is moved. SpikingJelly takes an integer
    neuron's counts for real numbers; here a count c is c spikes, c additions for each weight, as on
    hardware that unrolls it into steps (Luo et al., arXiv 2407.20708). Counts are whole numbers up
    to 15; divided ones are real numbers.

    Raises:
        ImportError: SpikingJelly 0.0.0.0.14, which has no counters of energy.
    """
    from spikingjelly.activation_based.op_counter.simple_energy import SimpleEnergyProfiler

    profiler = SimpleEnergyProfiler()
    macs, additions = profiler.mac_counter.rules, profiler.ac_counter.rules
    memory: Any = profiler.memory_counter
    for operation, activations in _ACTIVATIONS.items():
        macs[operation] = partial(_multiply, macs[operation], activations)
        additions[operation] = partial(_add, additions[operation], activations)
    for event, rule in memory.rules.items():
        if event[1] in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d):
            memory.rules[event] = partial(_read_weights, memory, rule)
    profiler.bind_model(model)
    with profiler:
        model(x)
    return profiler.get_report().energy_total_pj / 1e6


def _multiply(rule: Rule, activations: tuple[int, ...], args: Any, kwargs: Any, out: Any) -> int:
    """Multiply-accumulates of an operation, of which counts need none."""
    has_counts = any(_levels(args[i]) > 1 for i in activations)
    return 0 if has_counts else rule(args, kwargs, out)


def _add(rule: Rule, activations: tuple[int, ...], args: Any, kwargs: Any, out: Any) -> int:
    """Additions of an operation, for each step of counts."""
    levels = [_levels(args[i]) for i in activations]
    most = max(levels)
    if most <= 1:
        return rule(args, kwargs, out)
    if len(levels) == 2 and min(levels) > 0:  # a product of counts, or of counts and spikes
        x, y = (args[i].double() for i in activations)
        return int((x @ y).sum())
    i = activations[levels.index(most)]
    steps = _steps(args[i], most)
    return sum(rule((*args[:i], step, *args[i + 1 :]), kwargs, out) for step in steps)


def _read_weights(counter: Any, rule: Rule, module: nn.Module, args: Any, *others: Any) -> int:
    """Bytes of a layer's memory: each binary step of counts reads its weights.

    The counter keeps the parts of what a rule gives, in a private attribute.
    """
    read = 0
    for step in _steps(args[0], _levels(args[0])):
        rule(module, (step, *args[1:]), *others)
        read += counter._pending_metrics["weight_read_bytes"]
    counter._pending_metrics["weight_read_bytes"] = read
    return sum(counter._pending_metrics.values())


def _steps(x: Tensor, levels: int) -> list[Tensor]:
    """Counts c as steps of spikes, where 1 <= c, 2 <= c, ...; anything else as it is."""
    if levels <= 1:
        return [x]
    return [(x >= level).to(x.dtype) for level in range(1, levels + 1)]


def _levels(x: Tensor) -> int:
    """The largest of counts; 0 of anything else."""
    if not (x.numel() and x.is_floating_point()):
        return 0
    least, most = x.aminmax()
    is_whole = least >= 0 and most <= LARGEST_HALF and bool(x.eq(x.round()).all())
    return int(most) if is_whole else 0
