"""Torch's private names whose change no other test would show mean what they are taken for."""

import torch
from torch.utils.checkpoint import checkpoint

from sj_taid._internal import graph


def test_saved_tensor_hooks_are_pushed_seen_and_popped():
    assert graph.saving_hooks() is None and graph.allows_hooks()
    seen, x = [], torch.rand(3, requires_grad=True)
    graph.push_hooks(lambda t: seen.append(t) or t, lambda t: t)
    try:
        assert graph.saving_hooks() is not None
        x.sin()
    finally:
        graph.pop_hooks()
    assert len(seen) == 1 and graph.saving_hooks() is None
    torch.func.vjp(lambda t: (seen.append(graph.allows_hooks()), t)[1], x)
    assert seen[1] is False
    assert not graph.are_checkpoints(None)
    assert not graph.are_others(None)

    def look(t):
        hooks = graph.saving_hooks()
        seen.append((graph.are_checkpoints(hooks), graph.are_others(hooks)))

    checkpoint(look, x, use_reentrant=False)
    graph.record_saved(lambda: look(x), [])
    assert seen[2:] == [(True, True), (False, False)]


def test_what_watches_or_transforms_is_seen():
    seen = [graph.is_eager()]

    def look(t):
        seen.append(graph.is_eager())
        return t + 1

    torch.func.vmap(look)(torch.rand(2, 3))
    torch.jit.trace(look, torch.rand(2), check_trace=False)
    torch.func.jvp(look, (torch.ones(2),), (torch.ones(2),))
    assert seen[0] is True and not any(seen[1:])
    assert not graph.is_dynamo_near() and not graph.is_watched()


def test_views_of_one_storage_on_meta_are_known():
    x = torch.empty(4, 6, device="meta")
    assert graph.is_one_storage(x, x.t()) and graph.is_one_storage(x, x[1:])
    assert not graph.is_one_storage(x, x.clone())
    assert not graph.shares_memory(x, x) and graph.address_of(x) == 0
