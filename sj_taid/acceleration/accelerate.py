"""``accelerate(net)``, its report, and ``unaccelerate(net)``."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from spikingjelly.activation_based import functional, layer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._pytree import tree_leaves, tree_map_only

from .. import _compat, _graph, neurons
from .._checks import check_net
from .._fused_neuron import Accelerated, restore
from ..neuron import ALIFNode
from ..ops import backends, surrogate
from ..report import Row, table_of
from .modules import AcceleratedALIF, AcceleratedNorm, accelerate_module, why_no_norm

_FUSED, _ALREADY = "fused operator", "on the fused operator already"
#: times of a step that differ by less are called equal
_NOISE = 0.05


def accelerate(net: nn.Module, example_input: Any = None) -> Acceleration:
    """Train ``net`` in less memory and time with equal outputs; changes it in place.

    Its LIF, PLIF, IF and ALIF neurons run on the fused operator and learn what they learned before.
    A batch norm waits for whoever reads its output: such a neuron computes both as one operation,
    anything else the norm alone. Spikes, their sums, and sums of a norm's output are saved for
    backward as bits and bytes, or computed again.

    Outputs are equal as :func:`.swap_neurons` promises, and to rounding behind a norm. Every module
    stays the same object, with its parameters, ``state_dict`` keys, hooks and voltages, so
    optimizers and checkpoints made before go on working; the class of a norm or neuron becomes a
    subclass of its own, and no other module is touched. In half precision these neurons compute,
    and keep voltages, in float32.

    Args:
        net: any module with SpikingJelly neurons, ALIF included, in step mode ``"m"``.
        example_input: an input of ``net`` (a tuple for several), to measure a training step before
            and after, on a copy. The report then says what read each norm.

    Raises:
        ValueError: ``net`` has no neuron.
        TypeError: ``net`` is no module, or ``example_input`` neither a tensor nor a tuple.

    >>> from spikingjelly.activation_based import neuron
    >>> net = nn.Sequential(layer.BatchNorm1d(3, step_mode="m"), neuron.LIFNode(step_mode="m"))
    >>> report = accelerate(net)
    >>> spikes = net(torch.rand(4, 2, 3, 5))
    >>> print(report)
    1 of 1 neurons on the fused operator, 1 of 1 norms fused
    layer  kind         done            note
    0      BatchNorm1d  fused into 1    equal outputs to rounding
    1      LIFNode      fused operator  equal outputs
    """
    check_net(net, "accelerate")
    neurons.need_neurons(net, "accelerate")
    if example_input is None:
        return Acceleration(net, _exchange_classes(net, {}))
    if not isinstance(example_input, Tensor | tuple):
        raise TypeError(
            "example_input must be a tensor, or a tuple for several inputs, but it is a "
            f"{type(example_input).__name__}"
        )
    readers, saved_bytes, step_ms = _measure(net, example_input)
    return Acceleration(net, _exchange_classes(net, readers), saved_bytes, step_ms)


def unaccelerate(net: nn.Module) -> None:
    """Undo :func:`.accelerate` in place: every norm and neuron gets its class back.

    >>> from spikingjelly.activation_based import neuron
    >>> net = nn.Sequential(nn.Linear(4, 3), neuron.LIFNode(step_mode="m"))
    >>> report = accelerate(net)
    >>> unaccelerate(net)
    >>> type(net[1]) is neuron.LIFNode
    True
    """
    check_net(net, "unaccelerate")
    restore(net)


class Acceleration:
    """The report of :func:`.accelerate`: ``print`` it, after a step for what read each norm.

    Attributes:
        saved_bytes: bytes saved for backward, before and after, if there was an example input.
        step_ms: milliseconds of a training step, before and after: the least of turns.
    """

    def __init__(
        self,
        net: nn.Module,
        neurons: dict[str, Row],
        saved_bytes: tuple[int, int] | None = None,
        step_ms: tuple[float, float] | None = None,
    ) -> None:
        self._net, self._neurons = net, neurons
        self.saved_bytes, self.step_ms = saved_bytes, step_ms

    @property
    def rows(self) -> tuple[Row, ...]:
        """A :class:`~sj_taid.report.Row` for each neuron and norm."""
        rows = self._neurons | {path: _norm_row(path, norm) for path, norm in _norms(self._net)}
        return tuple(rows[path] for path, _ in self._net.named_modules() if path in rows)

    def __str__(self) -> str:
        neurons = self._neurons.values()
        fused = sum((row.done or row.note) in (_FUSED, _ALREADY) for row in neurons)
        norms = _count_norms(self._net)
        lines = [f"{fused} of {len(neurons)} neurons on the fused operator, {norms}"]
        if self.saved_bytes and self.step_ms:
            (old_bytes, new_bytes), (old, new) = self.saved_bytes, self.step_ms
            equal = abs(new - old) <= _NOISE * old
            step = "no difference measurable" if equal else f"{old:.4g} -> {new:.4g} ms"
            saved = f"{old_bytes / 1e6:.3g} -> {new_bytes / 1e6:.3g} MB"
            lines.append(f"saved for backward {saved}, step {step}")
        return "\n".join([*lines, table_of(_merge(self.rows))])


def _exchange_classes(net: nn.Module, readers: dict[str, dict[str, bool]]) -> dict[str, Row]:
    """Give neurons and norms their accelerated classes; a row for each neuron.

    ``readers``: what has read each norm of a copy of ``net``, which its report starts with.
    """
    rows = {}
    for site in neurons.find_neurons(net, _compat.NEURONS):
        reason = _why_not(site, net)
        note = reason or neurons.describe_equality(site)
        rows[site.path] = site.row("" if reason else _FUSED, note)
        if not reason:
            accelerate_module(site.node)._name = site.path
    if any(isinstance(module, AcceleratedALIF) for module in net.modules()):
        for path, norm in _norms(net):
            if not isinstance(norm, AcceleratedNorm) and not why_no_norm(norm):
                accelerate_module(norm).readers = readers.get(path, {})
    return rows


@torch.inference_mode(False)
def _measure(
    net: nn.Module, inputs: Any
) -> tuple[dict[str, dict[str, bool]], tuple[int, int], tuple[float, float]]:
    """Run training steps of a copy before and after, in turns: readers, saved bytes and ms."""
    trial, turns = neurons.copy_net(net), []
    inputs = tree_map_only(Tensor, lambda t: t.detach().requires_grad_(t.requires_grad), inputs)
    with torch.random.fork_rng({p.device for p in trial.parameters() if p.is_cuda}):
        for _ in range(6):  # the first compiles the kernels
            before = _run_step(trial, inputs)
            _exchange_classes(trial, {})
            turns.append((before, _run_step(trial, inputs)))
            norms = _norms(trial)
            readers = {path: n.readers for path, n in norms if isinstance(n, AcceleratedNorm)}
            unaccelerate(trial)
    (old_bytes, _), (new_bytes, _) = turns[0]
    old, new = (min(ms for _, ms in steps) for steps in zip(*turns, strict=True))
    return readers, (old_bytes, new_bytes), (old, new)


def _norms(net: nn.Module) -> list[tuple[str, _BatchNorm]]:
    return [(path, m) for path, m in net.named_modules() if isinstance(m, _BatchNorm)]


def _count_norms(net: nn.Module) -> str:
    """How many norms are fused, and what has read the rest."""
    norms, states = _norms(net), Counter[str]()
    for _, norm in norms:
        if isinstance(norm, AcceleratedNorm):
            first = next((f"read by {reader}" for reader in norm.readers), "not run yet")
            states["fused" if any(norm.readers.values()) else first] += 1
    fused = states.pop("fused", 0)
    rest = ", ".join(f"{count} {state}" for state, count in states.most_common())
    return f"{fused} of {len(norms)} norms fused" + (f" ({rest})" if rest else "")


def _norm_row(path: str, norm: nn.Module) -> Row:
    """What has been done with a norm, or with its output."""
    kind = type(norm).__name__
    if not isinstance(norm, AcceleratedNorm):
        return Row(path, kind, "", why_no_norm(norm) or "no neuron is on the fused operator")
    fused = [f"fused into {reader}" for reader, is_fused in norm.readers.items() if is_fused]
    others = ", ".join(reader for reader, is_fused in norm.readers.items() if not is_fused)
    if fused:
        also = f"; also read by {others}" if others else ""
        return Row(path, kind, ", ".join(fused), f"equal outputs to rounding{also}")
    if others:
        return Row(path, kind, "", f"computed apart: read by {others}")
    return Row(path, kind, "waits", "not run yet")


def _merge(rows: Iterable[Row]) -> list[Row]:
    """The rows, equal ones as one."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.kind, row.done.partition(" into ")[0], row.note), []).append(row)
    merged = []
    for (_, done, _), (first, *rest) in groups.items():
        if rest:
            done += " each" * (done != first.done)
            first = first._replace(layer=f"{first.layer} and {len(rest)} more", done=done)
        merged.append(first)
    return merged


def _why_not(site: neurons.Site, net: nn.Module) -> str | None:
    """Why a neuron is left as it is, or ``None``."""
    node = site.node
    if isinstance(node, Accelerated):
        return _ALREADY
    if is_parametrized(node):
        return "it is parametrized"
    if isinstance(node, ALIFNode):
        reason = "its backend is torch" if node.backend == "torch" else None
    else:
        reason = neurons.why_no_alif(node)
    if reason or (reason := surrogate.unsupported(node.surrogate_function)):
        return reason
    if node.step_mode != "m":
        parent = net.get_submodule(site.path.rpartition(".")[0])
        container = type(parent).__name__
        if isinstance(parent, layer.MultiStepContainer | layer.StepModeContainer):
            return f"its {container} steps: put the neuron, in step mode 'm', in its place"
        if "Recurrent" in container:
            return "recurrent: each step reads the one before"
        return (
            "it runs step by step: functional.set_step_mode(net, 'm') first, but only if the net's "
            "forward takes the whole sequence [T, N, *] and does not loop over time"
        )
    function = node.surrogate_function
    hooks = function._forward_hooks or function._forward_pre_hooks or function._backward_hooks
    if hooks or any(map(callable, vars(node).values())):
        return "a function of its own or a hook in it, which the fused operator would not call"
    x = torch.empty(1, 1, dtype=site.dtype, device=site.device)
    backend = backends.resolve(backends.AUTO, x, node.surrogate_function)
    if backend.statistics is None:
        return f"no fused operator for {x.dtype} on {x.device.type}"
    return None


@torch.enable_grad()
def _run_step(net: nn.Module, inputs: Any) -> tuple[int, float]:
    """Forward from rest and, if something requires a gradient, backward: saved bytes and ms."""
    functional.reset_net(net)
    start = time.perf_counter()

    def forward() -> list[Tensor]:
        outputs = tree_leaves(net(*inputs) if isinstance(inputs, tuple) else net(inputs))
        return [t.float().sum() for t in outputs if isinstance(t, Tensor) and t.requires_grad]

    losses, saved = _graph.record_saved(net, forward)
    saved_bytes = sum(tensor.untyped_storage().nbytes() for tensor in saved)
    del saved
    if losses:
        torch.stack(losses).sum().backward()
    tensors = [t for t in (*net.parameters(), *tree_leaves(inputs)) if isinstance(t, Tensor)]
    for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
        torch.cuda.synchronize(device)
    return saved_bytes, 1e3 * (time.perf_counter() - start)
