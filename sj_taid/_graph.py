"""Whether a tensor's autograd graph can still be walked backward."""

from __future__ import annotations

import torch
from torch import Tensor

# How many nodes to look at. The voltage's own node was not part of the loss, so it keeps its
# tensors; those of the charge and the spike, a few nodes up, are freed by the loss's backward.
_NODES = 12

# Reading any of these from a freed node raises; a node without it, or that saved nothing, does not.
_SAVED = ("saved_tensors", "_saved_self", "_saved_other", "_saved_result")


def graph_is_freed(tensor: Tensor) -> bool:
    """Whether a backward has freed what ``tensor``'s graph saved, so that another must fail.

    Always ``False`` without gradients, and under ``torch.compile`` and ``torch.func``, where the
    graph is out of sight: there PyTorch's own error comes, at the backward.

    >>> w = torch.ones(1, requires_grad=True)
    >>> v = w * w
    >>> graph_is_freed(v), v.sum().backward(), graph_is_freed(v)
    (False, None, True)
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or tensor.grad_fn is None:
        return False
    seen = [tensor.grad_fn]
    for node in seen:
        try:
            for name in _SAVED:
                getattr(node, name, None)
        except RuntimeError:
            return True
        seen += [parent for parent, _ in node.next_functions if parent is not None]
        del seen[_NODES:]
    return False
