"""The invariant: a kept tensor's recipe makes that tensor's values, or it has none.

And its place says where its values lie in the norm's input, or it has none.
"""

import copy
import weakref
from contextlib import contextmanager

import torch
from torch.utils._pytree import tree_leaves

from sj_taid._internal import graph
from sj_taid.kept import kept
from sj_taid.kept.kept import Kept


def assert_made_again(tensor):
    """A recipe makes these values to the bit, and backward refuses what has changed since."""
    recipe = tensor.recipe()
    recipe = copy.copy(recipe).of(tensor) if recipe else None  # which packs nothing in advance
    if recipe is None:
        return
    if recipe.reference and graph.version_of(recipe.reference[0]) != recipe.reference[1]:
        return
    try:
        made = recipe.make(*recipe.saved)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
        return
    torch.testing.assert_close(made, tensor.detach(), rtol=0, atol=0, equal_nan=True)


def assert_in_place(tensor):
    """A norm's output, or a view or copy of it, is the norm of what its place points at."""
    source, place = tensor._source, tensor._place
    is_known = tensor._memory.is_known and tensor._version == tensor._known_version
    if place is None or not (is_known and tensor.requires_grad) or source.why_not_fused():
        return
    x, weight, bias, mean, rstd = source.tensors()
    # As a kernel finds channels.
    channel = torch.arange(x.numel()) // place.inner % place.channels
    y = x.detach().double().as_strided((x.numel(),), (1,), x.storage_offset())
    y = (y - mean[channel]) * rstd[channel]
    y = y if weight is None else y * weight[channel]
    y = y if bias is None else y + bias[channel]
    y = y.as_strided(place.at.shape, place.at.stride(), place.at.storage_offset())
    # Another place would be far off, whatever the rounding.
    close = {"rtol": 0.02, "atol": 0.02, "equal_nan": True}
    torch.testing.assert_close(y.detach(), tensor.detach().double(), **close)


@contextmanager
def asked_after_each_function():
    """Ask every kept tensor that a function of torch has met and that is alive."""
    handle, met = kept._handle, {}

    def ask(func, types, args, kwargs):
        result = handle(func, types, args, kwargs)
        with graph.plain_functions(), torch.no_grad():
            for tensor in tree_leaves((args, kwargs, result)):
                if type(tensor) is Kept:
                    met[id(tensor)] = weakref.ref(tensor)
            for tensor in [reference() for reference in met.values()]:
                if type(tensor) is Kept:
                    assert_made_again(tensor)
                    assert_in_place(tensor)
        return result

    kept._handle = ask
    try:
        yield
    finally:
        kept._handle = handle
