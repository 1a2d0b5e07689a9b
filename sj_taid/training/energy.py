"""Energy of a pass: SpikingJelly's estimate, where a spike count adds as that many spikes do."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

#: whole numbers up to this one are spike counts; a byte holds them
LARGEST_COUNT = 255


@torch.no_grad()
def estimate_energy(model: nn.Module, x: Tensor) -> float:
    """Energy of ``model(x)`` in µJ, by SpikingJelly's ``SimpleEnergyProfiler``.

    Additions where a layer's input is spikes (0.9 pJ), multiply-accumulates elsewhere (4.6 pJ),
    and 24.96 pJ for each byte of weights and states that is moved. SpikingJelly takes counts, as
    an integer neuron's, for real numbers; here a count c is c spikes, c additions for each weight,
    as on hardware that unrolls it into steps (Luo et al., arXiv 2407.20708).

    Raises:
        ImportError: SpikingJelly 0.0.0.0.14, which has no counters of energy.
    """
    from spikingjelly.activation_based.op_counter.simple_energy import SimpleEnergyProfiler

    profiler = SimpleEnergyProfiler()
    for counter in (profiler.mac_counter, profiler.ac_counter):
        for operation in profiler.synop_counter.rules:
            counter.rules[operation] = _sum_over_steps(counter.rules[operation])
    memory: Any = profiler.memory_counter
    for event, rule in memory.rules.items():
        if event[1] in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d):
            memory.rules[event] = _read_weights_each_step(memory, rule)
    profiler.bind_model(model)
    with profiler:
        model(x)
    return profiler.get_report().energy_total_pj / 1e6


def _sum_over_steps(rule: Callable[..., int]) -> Callable[..., int]:
    """The rule of an operation's cost, summed over the binary steps of its counts."""

    def count(args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> int:
        return sum(rule(step, kwargs, out) for step in _unroll(args))

    return count


def _read_weights_each_step(counter: Any, rule: Callable[..., int]) -> Callable[..., int]:
    """The rule of a layer's memory: of counts, each binary step reads its weights."""

    def count(module: nn.Module, args: Any, kwargs: dict[str, Any], out: Tensor) -> int:
        read = 0
        for step in _unroll(args):
            rule(module, step, kwargs, out)
            read += counter._pending_metrics["weight_read_bytes"]
        counter._pending_metrics["weight_read_bytes"] = read
        return sum(counter._pending_metrics.values())

    return count


def _unroll(args: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """The arguments with their first counts c as binary steps 1 <= c, 2 <= c, ... of spikes."""
    for i, x in enumerate(args):
        if isinstance(x, Tensor) and (levels := _levels(x)) > 1:
            return (
                (*args[:i], (x >= level).to(x.dtype), *args[i + 1 :])
                for level in range(1, levels + 1)
            )
    return iter((args,))


def _levels(x: Tensor) -> int:
    """The largest of counts; 0 of anything else."""
    if not (x.numel() and x.is_floating_point()):
        return 0
    least, most = x.aminmax()
    is_whole = least >= 0 and most <= LARGEST_COUNT and bool(x.eq(x.round()).all())
    return int(most) if is_whole else 0
