"""Each of torch's private names that the package takes means what it is taken for."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sj_taid._internal import graph


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_gives_mean_and_rstd_too(training):
    x = torch.randn(6, 3, 4, 5).requires_grad_()
    weight, bias = torch.rand(3), torch.rand(3)
    found = []
    for function in (graph.batch_norm, F.batch_norm):
        mean, var = torch.zeros(3), torch.ones(3)
        if function is F.batch_norm:
            y = function(x, mean, var, weight, bias, training, 0.1, 1e-5)
        else:
            y, batch_mean, rstd, *_ = function(
                x, weight, bias, mean, var, training, 0.1, 1e-5, torch.backends.cudnn.enabled
            )
        found.append((y, mean, var))
    assert all(map(torch.equal, *found))
    if training:
        var, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
        torch.testing.assert_close(batch_mean.double(), mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(rstd.double(), (var + 1e-5).rsqrt(), rtol=1e-5, atol=1e-6)
        assert not batch_mean.requires_grad and not rstd.requires_grad


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


def test_a_forward_in_backward_is_a_recomputation():
    numbers, x = [], torch.rand(3, requires_grad=True)

    def run(t):
        numbers.append(graph.recomputation())
        return t.sin()

    checkpoint(run, x, use_reentrant=False).sum().backward()
    assert numbers[0] is None and isinstance(numbers[1], int)


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


class Own(Tensor):
    seen = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen += 1
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_subclass_is_a_plain_tensor_within_plain_functions():
    own = torch.ones(2).as_subclass(Own)
    before = Own.seen
    with graph.plain_functions():
        assert type(own + 1) is Tensor and Own.seen == before
    assert type(own + 1) is Own and Own.seen > before
    assert vars(graph.TensorBase)["shape"].__get__(own) == (2,)


def test_autocast_of_any_device_is_seen():
    assert not graph.is_autocast_enabled()
    with torch.autocast("cpu", torch.bfloat16):
        assert graph.is_autocast_enabled()


def test_views_of_one_storage_on_meta_are_known():
    x = torch.empty(4, 6, device="meta")
    assert graph.is_one_storage(x, x.t()) and graph.is_one_storage(x, x[1:])
    assert not graph.is_one_storage(x, x.clone())
    assert not graph.shares_memory(x, x) and graph.address_of(x) == 0
