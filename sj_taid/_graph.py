"""What torch's private state says: of a voltage's past, memory, hooks on what is saved, and modes.

No function reads what a graph saved, which would run the hooks of checkpointing and offloading.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import _python_dispatch
from torch.utils.weak import WeakTensorKeyDictionary


class Past:
    """What happened to one voltage."""

    def __init__(self) -> None:
        self.made_in = recomputation()
        self.freed = False  # a backward went through its forward and freed the graph
        self.resumed = False  # a later forward started from it

    def is_lost_start(self) -> bool:
        """Whether checkpointing recomputes a forward from another voltage, which is gone."""
        return recomputation() not in (None, self.made_in) and not self.resumed


#: keyed by the tensor: an attribute of it would be saved by torch.save
past_of = WeakTensorKeyDictionary()


def recomputation() -> int | None:
    """The number of the node whose backward calls this forward (checkpointing), or ``None``."""
    node = torch._C._current_autograd_node()
    return None if node is None else node._sequence_nr()


def follow(v: Tensor, *others: Tensor | None, name: str) -> None:
    """Record the :class:`Past` of a forward's last voltage; ``others`` are its other outputs.

    Does nothing under ``torch.compile`` and ``torch.func``, which hide the graph: there PyTorch's
    own error comes at the backward.

    >>> w = torch.ones(1, requires_grad=True)
    >>> v = w * w
    >>> follow(v, name="hidden")
    >>> past_of[v].freed, v.sum().backward(), past_of[v].freed
    (False, None, True)
    """
    if torch.compiler.is_compiling():
        return
    past_of[v] = past = Past()

    def mark_freed(*_: Any) -> None:
        past.freed |= not torch._C._autograd._get_current_graph_task_keep_graph()

    for node in {t.grad_fn for t in (v, *others) if t is not None and t.grad_fn is not None}:
        node.metadata["neuron"] = name  # type: ignore[index]  # a property, stubbed as a method
        node.register_hook(mark_freed)


def is_transformed() -> bool:
    """Whether a transform of ``torch.func`` runs, such as ``vmap`` or ``grad``."""
    return torch._C._are_functorch_transforms_active()


def is_watched() -> bool:
    """Whether a dispatch mode, such as SpikingJelly's counters, sees each operation of torch.

    To it a fused call would be one operator that it knows nothing of. The modes of torch.compile
    and of selective checkpointing take such operators as they are.
    """
    return _python_dispatch.is_in_torch_dispatch_mode(include_infra_modes=False) and any(
        not mode.is_infra_mode() and type(mode).__module__ != "torch.utils.checkpoint"
        for mode in _python_dispatch._get_current_dispatch_mode_stack()
    )


#: the context in which modes do not count operations, those that SpikingJelly's neurons do not have
hide_from_modes = _python_dispatch._disable_current_modes


def address_of(tensor: Tensor) -> int:
    """Where the tensor's memory is; 0 if it has none, as a wrapper."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):
        return 0


def version_of(tensor: Tensor) -> int:
    """How often the tensor has changed in place; 0 of an inference tensor, which does not count."""
    return 0 if tensor.is_inference() else tensor._version


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured: its replays change memory without a version."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def allows_hooks() -> bool:
    """Whether ``saved_tensors_hooks`` may be opened; ``torch.func`` forbids them."""
    return torch._C._autograd._saved_tensors_hooks_is_enabled()  # type: ignore[attr-defined]


def saving_hooks() -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None:
    """The innermost open ``saved_tensors_hooks``: their pack and unpack functions."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def has_other_hooks() -> bool:
    """Whether ``saved_tensors_hooks`` are open that are not those of :func:`record_saved`."""
    hooks = saving_hooks()
    return hooks is not None and getattr(hooks[0], "__module__", None) != __name__


def record_saved(net: nn.Module, forward: Callable[[], Any]) -> tuple[Any, list[Tensor]]:
    """What ``forward`` gives, and what it saves for backward: each storage once, no parameters."""
    saved: dict[int, Tensor] = {}  # tensors, so that they live and no address comes twice

    def note(tensor: Tensor) -> Tensor:
        if address := address_of(tensor):
            saved[address] = tensor
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        output = forward()
    for parameter in net.parameters():
        saved.pop(parameter.untyped_storage().data_ptr(), None)
    return output, [*saved.values()]


def is_checkpointed() -> bool:
    """Whether gradient checkpointing decides what is saved."""
    hooks = saving_hooks()
    return getattr(hooks and hooks[0], "__module__", None) == "torch.utils.checkpoint"
