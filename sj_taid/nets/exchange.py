"""``accelerate`` and ``unaccelerate``: whose class is exchanged, and why others' is not."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from .._internal import compat
from ..fused_neuron import Accelerated, FusedNeuron, note_for_graphs, read_again, restore
from ..neuron import ALIFNode
from ..ops.step.program import Reading
from ..ops.step.readings import forget, read_neuron
from .loops import AcceleratedLoop, accelerate_loop, find_loops, may_loop, read_loop
from .modules import (
    AcceleratedALIF,
    AcceleratedNeuron,
    AcceleratedNorm,
    accelerate_module,
    why_not_fused,
    why_not_own,
)
from .neurons import (
    Site,
    as_inputs,
    as_read,
    check_net,
    copy_net,
    describe_equality,
    describe_single_steps,
    find_neurons,
    need_neurons,
)
from .report import Row, State
from .summary import Acceleration, find_engine, measure, norms_of, report_of


def accelerate(net: nn.Module, example: Any = None) -> Acceleration:
    """Train ``net`` in less memory and time with equal outputs; changes it in place.

    Neurons whose step is pointwise, SpikingJelly's and yours, modules that loop over time included,
    run on the fused operator and learn what they learned before. One behind a batch norm takes the
    norm's input and computes both as one operation, so the norm's output is not saved for backward.
    Spikes, counts and their sums are saved as bits, and some sums of a norm's output are computed
    again.

    Outputs are equal as the report says, and to rounding behind a norm. Every module
    stays the same object, with its parameters, ``state_dict`` keys, hooks and voltages, so
    optimizers and checkpoints made before go on working; the class of a norm or neuron becomes a
    subclass of its own, and no other module is touched. A neuron's attributes are read at each
    call. Its code, and all else that the code reads, is read at ``accelerate``, ``train()`` and
    ``eval()``; an edit between two of these is not seen. In half precision these neurons compute,
    and keep voltages, in float32.

    Args:
        net: any module with SpikingJelly neurons, ALIF included, in step mode ``"m"``, or with
            modules that loop over time by themselves.
        example: an input of ``net`` (a tuple for several), to measure a training step before
            and after, on a copy. The report then says what read each norm.

    Raises:
        ValueError: ``net`` has no neuron.
        TypeError: ``example`` is neither a tensor nor a tuple.

    >>> from spikingjelly.activation_based import layer, neuron
    >>> net = nn.Sequential(layer.BatchNorm1d(3, step_mode="m"), neuron.LIFNode(step_mode="m"))
    >>> report = accelerate(net)
    >>> print(report)
    1 of 1 neurons on the fused operator, 1 of 1 norms ready to be fused
    layer  kind         done            note
    0      BatchNorm1d  ready           fused into a neuron that reads it; example= says where
    1      LIFNode      fused operator  equal outputs
    >>> spikes = net(torch.rand(4, 2, 3, 5, requires_grad=True))
    """
    check_net(net)
    sites = find_neurons(net)
    if not sites and not find_loops(net):
        need_neurons(net, "accelerate")
    if steps := describe_single_steps(sites):
        warnings.warn(steps, stacklevel=2)
    if example is None:
        return Acceleration(*report_of(net, _exchange_classes(net), None))
    inputs = as_inputs(example)
    with torch.inference_mode(False):
        plain, fast = copy_net(net), copy_net(net)
        restore(plain)  # of an earlier call
        _exchange_classes(fast)
        found, figures = measure(plain, fast, inputs)
    return Acceleration(*report_of(net, _exchange_classes(net), found), **figures)


def unaccelerate(net: nn.Module) -> None:
    """Undo :func:`.accelerate` in place: every norm and neuron gets its class back.

    Raises:
        ValueError: a norm or neuron was parametrized since; the net stays.

    >>> from spikingjelly.activation_based import neuron
    >>> net = nn.Sequential(nn.Linear(4, 3), neuron.LIFNode(step_mode="m"))
    >>> report = accelerate(net)
    >>> unaccelerate(net)
    >>> type(net[1]) is neuron.LIFNode
    True
    """
    check_net(net)
    restore(net)


def _exchange_classes(net: nn.Module) -> dict[str, Row]:
    """Give neurons and norms their accelerated classes; a row for each neuron."""
    rows: dict[str, Row] = {}
    sites = find_neurons(net), find_loops(net)
    _read_again(net, [*sites[0], *sites[1]])
    for site in sites[0]:
        found = _why_not_fused(site) or _read(site)
        if isinstance(found, str):
            state: State = "fused" if isinstance(site.node, Accelerated) else "left alone"
            row = {site.path: site.row("", found, state)}
            rows |= _exchange_loop(site) if _runs_own_loop(site.node) else row
            continue
        note = _describe_equality(site, found)
        rows[site.path] = site.row("fused operator", note, "fused")
        accelerate_module(site.node)._taid_name = site.path
        if not isinstance(site.node, ALIFNode):
            note_for_graphs(site.node, found, as_read(site.node)[1], site.device)
    for site in sites[1]:
        rows |= _exchange_loop(site)
    fused = AcceleratedALIF | AcceleratedNeuron | AcceleratedLoop
    if any(isinstance(m, fused) for m in net.modules()):
        for _, norm in norms_of(net):
            if not isinstance(norm, AcceleratedNorm) and not why_not_fused(norm):
                accelerate_module(norm)
    return rows


def _read_again(net: nn.Module, sites: list[Site]) -> None:
    """Forget what was read of the code of these neurons."""
    for kind in {type(site.node) for site in sites}:
        forget(kind)
    for module in net.modules():
        if isinstance(module, FusedNeuron):
            read_again(module)


def _runs_own_loop(node: Any) -> bool:
    """Whether a neuron's class runs a sequence by a loop of its own."""
    is_plain = not isinstance(node, Accelerated) and node.step_mode == "m" and may_loop(node)
    return is_plain and compat.why_not_stepwise(type(node)) is not None


def _exchange_loop(site: Site) -> dict[str, Row]:
    """The same for a module with a loop over time; no row if it is no neuron."""
    engine = find_engine(site.dtype, site.device)
    if isinstance(site.node, Accelerated):
        return {site.path: site.row("", "on the fused operator already", "fused")}
    found = engine if isinstance(engine, str) else read_loop(site, engine)
    if isinstance(found, str):
        return {} if found.endswith("has no state") else {site.path: site.row("", found)}
    layout, readings = found
    reading = next(iter(readings.values()))
    accelerate_loop(site.node, layout, reading)._taid_name = site.path
    note = "equal outputs" if reading.exact else "equal outputs to rounding"
    return {site.path: site.row("fused operator", f"{note}; its loop over time", "fused")}


def _why_not_fused(site: Site) -> str | None:
    """Why a neuron is left as it is, whatever its step computes, or ``None``."""
    node: Any = site.node
    if isinstance(node, Accelerated):
        return "on the fused operator already"
    if is_parametrized(node):
        return "it is parametrized"
    if isinstance(node, ALIFNode) and node.backend == "torch":
        return "its backend is torch"
    reason = None if isinstance(node, ALIFNode) else compat.why_not_stepwise(node.__class__)
    successor = f"swap_neurons(net, replace={{{node.__class__.__name__}: ...}})"
    reason = reason and f"{reason}; {successor} gives it a successor"
    if reason:
        return reason
    if node.step_mode != "m":
        return (
            "it runs step by step: functional.set_step_mode(net, 'm') first, but only if the net's "
            "forward takes the whole sequence [T, N, *] and does not loop over time"
        )
    return why_not_own(node)


def _read(site: Site) -> dict[int, Reading] | str:
    """A neuron's step as it is read for the inputs that its parameters fit, or why it is not.

    By the number of axes of a step.
    """
    engine = find_engine(site.dtype, site.device)
    if isinstance(engine, str):
        return engine
    neuron, shapes = as_read(site.node)
    about = neuron.run, engine, site.device
    found = {len(shape): read_neuron(site.node, shape, *about) for shape in shapes}
    read = {axes: one for axes, one in found.items() if isinstance(one, Reading)}
    return read or str(found[4])


def _describe_equality(site: Site, found: dict[int, Reading]) -> str:
    """How equal the outputs of an accelerated neuron are to the plain one's."""
    if isinstance(site.node, ALIFNode):  # whose voltages are float32 in any case
        return "equal outputs"
    if site.dtype.itemsize < 4:
        return describe_equality(site)
    is_exact = all(reading.exact for reading in found.values())
    note = f"equal outputs{'' if is_exact else ' to rounding'}"
    if len(found) < len(as_read(site.node)[1]):
        note += f"; fused for inputs of {' or '.join(str(n + 1) for n in sorted(found))} axes alone"
    return note
