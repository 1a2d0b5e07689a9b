"""What neurons on the fused operator share, and the mark of modules that ``accelerate`` changed."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from . import _compat, _graph, functional


class FusedNeuron:
    """The multi-step forward of a neuron by :func:`.functional.alif_multi_step`."""

    v: Any
    v_seq: Any
    v_reset: float | None
    store_v_seq: Any
    surrogate_function: Any
    detach_reset: bool
    extra_repr: Any
    _name = ""  # its path in the net, which errors say

    def _operands(self, x_seq: Tensor) -> dict[str, Any]:
        """The arguments of the operator that differ between neurons."""
        raise NotImplementedError

    def _start(self, x_seq: Tensor) -> Tensor | float:
        """The voltage that a sequence starts from."""
        raise NotImplementedError

    def multi_step_forward(self, x_seq: Tensor) -> Tensor:
        """A sequence ``[T, N, *]`` from the state ``v``, which is updated."""
        v = self._start(x_seq)
        spike_seq, self.v, v_seq = self._multi_step(x_seq, v, self.store_v_seq)
        if self.store_v_seq:
            self.v_seq = v_seq
        return spike_seq

    def _multi_step(
        self, x_seq: Tensor, v: Tensor | float, store_v_seq: bool, **options: Any
    ) -> tuple[Any, ...]:
        spike_seq, v_last, v_seq, *bits = functional.alif_multi_step(
            x_seq,
            v,
            **self._operands(x_seq),
            v_reset=self.v_reset,
            surrogate_function=self.surrogate_function,
            detach_reset=self.detach_reset,
            store_v_seq=store_v_seq,
            **options,
        )
        _graph.follow(v_last, spike_seq, v_seq, name=self._name)
        return spike_seq, v_last, v_seq, *bits

    def _label(self) -> str:
        kind = type(self).__name__
        return f"the neuron {self._name!r}" if self._name else f"{kind}({self.extra_repr()})"

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a pickle takes the voltages along, not the graph that made them.
        state: Any = super().__getstate__()
        return _compat.detach_state(state)


class Accelerated:
    """A module whose class :mod:`.acceleration` has exchanged for a subclass, of the same name."""

    #: the class that it had
    kind: type


def restore(net: nn.Module) -> None:
    """Give every accelerated module of ``net`` its class back, or raise before the first."""
    modules: Any = {p: m for p, m in net.named_modules() if isinstance(m, Accelerated)}
    if changed := [p or "net" for p, m in modules.items() if "kind" not in vars(type(m))]:
        raise ValueError(
            f"the class of {', '.join(changed)} was changed after accelerate, so its own cannot be "
            "given back: torch.nn.utils.parametrize.remove_parametrizations first, if that did it"
        )
    for module in modules.values():
        module.__class__ = module.kind
        for name in ("readers", "_name"):
            vars(module).pop(name, None)
