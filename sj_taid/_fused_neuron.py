"""What every neuron shares that runs on the fused operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import _compat, _graph, _spikes, functional
from ._forward import Forward, PackingForward
from ._norm_input import NormInput, PassOn, not_normalised
from .ops.alif.norm import Norm

#: the classes that apply norms; a subclass may do something else
KINDS: set[type] = set()


def restore(net: nn.Module) -> None:
    """Let the net be what it was before ``accelerate``, ``fuse_norm`` and ``packed_spikes``."""
    for module in net.modules():
        if isinstance(module, FusedNeuron):
            module.restore()
        if isinstance(vars(module).get("forward"), Forward):
            del module.forward


class FusedNeuron(_compat.BaseNode):
    """The forward of a neuron by :func:`.functional.alif_multi_step`.

    It applies the batch norm before it (:mod:`.fusion`) and gives its spikes as bits
    (:mod:`.packing`).
    """

    v: Tensor | float
    _name = ""  # its path in the net, which errors say
    # A tuple, so that torch does not take it for a child: it is one of the net's.
    _norm: tuple[nn.Module, ...] = ()

    def _operands(self, x_seq: Tensor) -> dict[str, Any]:
        """The arguments of the operator that differ between neurons."""
        raise NotImplementedError

    @property
    def norm(self) -> nn.Module | None:
        """The batch norm that this neuron applies to its input: :func:`sj_taid.fuse_norm`."""
        return self._norm[0] if self._norm else None

    def apply_norm(self, norm: nn.Module | None) -> None:
        """Apply this batch norm, which from now on passes its input on; ``None`` undoes it.

        Raises:
            ValueError: another neuron applies the norm.
        """
        if norm is self.norm:
            return
        if norm is not None and isinstance(vars(norm).get("forward"), PassOn):
            raise ValueError("another neuron applies that norm already; sj_taid.unfuse_norm(net)")
        if self.norm is not None:
            vars(self.norm).pop("forward", None)
        self.__dict__.pop("_norm", None)
        if norm is not None:
            self._norm = (norm,)
            norm.forward = PassOn(norm)

    def restore(self) -> None:
        """Be the neuron that it was before :func:`.fuse_norm` and :func:`.accelerate`."""
        self.apply_norm(None)

    def single_step_functional_forward(
        self, inputs: tuple[Tensor, ...], states: tuple[Any, ...], **kwargs: Any
    ) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        """One step ``[N, *]`` with explicit state; nothing on the module changes."""
        x_seq = functional.as_sequence(inputs[0])
        spike_seq, v, _ = self._multi_step(x_seq, states[0], store_v_seq=False)
        return (spike_seq[0],), (v,)

    def multi_step_functional_forward(
        self, inputs: tuple[Tensor, ...], states: tuple[Any, ...], **kwargs: Any
    ) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        """A sequence ``[T, N, *]`` with explicit state; nothing on the module changes."""
        spike_seq, v, _ = self._multi_step(inputs[0], states[0], store_v_seq=False)
        return (spike_seq,), (v,)

    def multi_step_forward(self, x_seq: Tensor) -> Tensor:
        """A sequence ``[T, N, *]`` from the state ``v``, which is updated."""
        (v,) = self.materialize_states((x_seq,), (self.v,), "m")
        spike_seq, self.v, v_seq = self._multi_step(x_seq, v, self.store_v_seq)
        if self.store_v_seq:
            self.v_seq = v_seq
        return spike_seq

    def _multi_step(
        self, x_seq: Tensor, v: Tensor | float, store_v_seq: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        x_seq, norm = self._input_and_norm(x_seq)
        forward = vars(self).get("forward")
        packs = isinstance(forward, PackingForward) and forward.is_on()
        spike_seq, v_last, v_seq, *bits = functional.alif_multi_step(
            x_seq,
            v,
            **self._operands(x_seq),
            v_reset=self.v_reset,
            surrogate_function=self.surrogate_function,
            detach_reset=self.detach_reset,
            store_v_seq=store_v_seq,
            norm=norm,
            return_bits=packs,
        )
        if packs and _spikes.are_spikes(spike_seq, self.surrogate_function):
            _spikes.register(spike_seq, spike_seq, *bits)
        _graph.follow(v_last, spike_seq, v_seq, name=self._name)
        return spike_seq, v_last, v_seq

    def _label(self) -> str:
        kind = type(self).__name__
        return f"the neuron {self._name!r}" if self._name else f"{kind}({self.extra_repr()})"

    def _input_and_norm(self, x: Tensor) -> tuple[Tensor, Norm | None]:
        """The input, and the batch norm to apply to it, which has to have passed it on."""
        norm, call = self.norm, None
        passed: Any = x
        if isinstance(x, NormInput):
            call, x = x.call, x.x
            if norm is None:
                raise not_normalised(self._label())
        if norm is None:
            return x, None
        # A checkpoint's recomputation repeats a call that was checked.
        recomputes = not torch.compiler.is_compiling() and _graph.recomputation() is not None
        forward = call.forward if call else None
        if forward is not vars(norm).get("forward") and not recomputes:
            raise RuntimeError(
                f"{self._label()} expected its input straight from the batch norm that it applies "
                "(sj_taid.fuse_norm), but the norm was replaced, a forward branched on a flag or "
                "on chance, or a hook stands between: sj_taid.unfuse_norm(net) keeps the two apart"
            )
        frozen = call is not None and not call.with_grad
        if frozen and passed.learns():
            raise RuntimeError(
                f"{self._label()} applies a batch norm that gradient checkpointing recomputes "
                "without it: checkpoint both together"
            )
        applied = Norm.of(norm, call.training if call else norm.training)
        return x, applied.detach() if frozen else applied

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a pickle takes the voltages along, not the graph that made them.
        return _compat.detach_state(self.__dict__)
