"""What became of a voltage after the forward that made it, without a look into its graph.

To read what a graph saved would run the hooks of gradient checkpointing and offloading.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class Past:
    """What became of one voltage."""

    def __init__(self) -> None:
        self.made_in = recomputation()
        self.freed = False  # a backward went through the forward that made it, and kept no graph
        self.resumed = False  # a later forward started from it

    def is_lost_start(self) -> bool:
        """Whether a backward is recomputing a forward that cannot have started from here."""
        return recomputation() not in (None, self.made_in) and not self.resumed


#: by the tensor itself, for an attribute of it would be saved along with it
past_of = WeakTensorKeyDictionary()


def recomputation() -> int | None:
    """The number of the node whose backward calls this forward (checkpointing), if one does."""
    node = torch._C._current_autograd_node()
    return None if node is None else node._sequence_nr()


def follow(v: Tensor, *others: Tensor | None, name: str) -> None:
    """Keep the :class:`Past` of a forward's last voltage; ``others`` are its other outputs.

    Nothing under ``torch.compile`` and ``torch.func``, where the graph is out of sight: there
    PyTorch's own error comes, at the backward.

    >>> w = torch.ones(1, requires_grad=True)
    >>> v = w * w
    >>> follow(v, name="hidden")
    >>> past_of[v].freed, v.sum().backward(), past_of[v].freed
    (False, None, True)
    """
    if torch.compiler.is_compiling():
        return
    past_of[v] = past = Past()

    def passed(*_: Any) -> None:
        past.freed |= not torch._C._autograd._get_current_graph_task_keep_graph()

    for node in {t.grad_fn for t in (v, *others) if t is not None and t.grad_fn is not None}:
        node.metadata["neuron"] = name  # type: ignore[index]  # a property, stubbed as a method
        node.register_hook(passed)


def saving_hooks() -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None:
    """The innermost ``saved_tensors_hooks`` that are open: their pack and unpack functions."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)
