"""Residual sums that ``accelerate`` lets backward compute again, equal to saved ones to the bit."""

import copy
import pickle
import weakref
from functools import partial

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn
from torch.utils.checkpoint import checkpoint

import sj_taid
from sj_taid import ALIFNode, _graph, _sums
from tests.helpers import assert_equal, trained_norm

ATAN = surrogate.ATan()
CHANNELS = 4


class Block(nn.Module):
    """Spikes, and what a layer makes of them, summed in front of a neuron."""

    def __init__(self, add="in place", kind=neuron.ParametricLIFNode, **options):
        super().__init__()
        options = {"surrogate_function": ATAN, "v_threshold": 0.3} | options
        torch.manual_seed(0)
        self.stem = kind(**options)
        self.conv, self.bn = layer.Conv2d(CHANNELS, CHANNELS, 1), trained_norm()
        self.shortcut = nn.Sequential(layer.Conv2d(CHANNELS, CHANNELS, 1), trained_norm())
        self.sn, self.out = kind(**options), layer.Conv2d(CHANNELS, 2, 1)
        self.add = add
        functional.set_step_mode(self, "m")

    def forward(self, x_seq):
        identity = self.stem(x_seq)
        y = self.conv(identity)
        y = self.bn(x=y) if self.add == "by name" else self.bn(y)
        if self.add == "in place":
            y += identity
        elif self.add in ("right", "by name"):
            y = y + identity
        elif self.add == "left":
            y = identity + y
        elif self.add == "norms":
            y = y + self.shortcut(identity)
        elif self.add == "to spikes":  # whose bits are no longer right
            identity += y
            y = identity
        elif self.add == "twice":
            y = y + identity
            y += y * 0.5
        elif self.add == "returned":
            return self.out(self.sn(y + identity)), y
        return self.out(self.sn(y))


def images():
    return torch.randn(4, 2, CHANNELS, 5, 5, generator=torch.Generator().manual_seed(1))


def results(net, x_seq=None, run=None):
    """Output, state and every gradient by name, and the bytes saved for backward."""
    x_seq = (images() if x_seq is None else x_seq).clone().requires_grad_()
    functional.reset_net(net)
    net.zero_grad()
    output, saved = _graph.record_saved(net, lambda: (run or net)(x_seq))
    size = sum(tensor.untyped_storage().nbytes() for tensor in saved)
    saved.clear()
    output.square().sum().backward()
    grads = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    return {"output": output, "v": net.sn.v, "x_seq": x_seq.grad, **grads, **buffers}, size


def pair(net, monkeypatch):
    """The net accelerated, and the same with its sums saved."""
    saving = copy.deepcopy(net)
    with monkeypatch.context() as patch:
        patch.setattr(_sums, "recompute_sums", lambda net: {})
        sj_taid.accelerate(saving)
    return sj_taid.accelerate(net), saving


@pytest.mark.parametrize(
    ("add", "kind", "options"),
    [
        ("in place", neuron.LIFNode, {}),
        ("right", neuron.IFNode, {"v_reset": None}),
        ("by name", neuron.IFNode, {}),
        ("left", neuron.ParametricLIFNode, {"detach_reset": True}),
        ("norms", neuron.ParametricLIFNode, {"decay_input": False, "v_reset": -0.25}),
        ("norms", ALIFNode, {}),
    ],
)
def test_recomputed_sum_is_equal_to_a_saved_one(add, kind, options, monkeypatch):
    net = Block(add, kind, **options)
    plain = copy.deepcopy(net)
    report, saving = pair(net, monkeypatch)
    rows = {row.layer: row.done for row in report.rows}
    norms = ["bn", "shortcut.1"] if add == "norms" else ["bn"]
    assert [name for name in rows if rows[name] == "recomputed for sn"] == norms
    for mode in (True, False):
        (got, less), (expected, size) = results(net.train(mode)), results(saving.train(mode))
        assert_equal(got, expected)
        assert size - less == images().nbytes
        if mode:  # 0.0.0.0.14's neurons give no gradients in eval mode
            for name, want in results(plain)[0].items():
                assert torch.allclose(got[name], want, rtol=1e-3, atol=1e-4), name
    again = {row.layer: row.note for row in sj_taid.accelerate(net).rows}
    assert {again[name] for name in norms} == {"recomputed already"}


@pytest.mark.parametrize("add", ["to spikes", "twice"])
def test_sum_that_was_changed_is_saved(add, monkeypatch):
    net = Block(add)
    _, saving = pair(net, monkeypatch)
    net.bn.forward = _sums.NormForward(net.bn)  # which the trace leaves alone
    assert_equal(results(net)[0], results(saving)[0])


def test_sum_of_a_norm_on_folded_time_is_saved():
    net = Block()
    net.bn = layer.SeqToANNContainer(nn.BatchNorm2d(CHANNELS))
    assert not any("recomputed" in row.done for row in sj_taid.accelerate(net).rows)


def test_sum_of_a_norm_that_is_read_elsewhere_is_saved():
    net = Block("returned")
    assert not any("recomputed" in row.done for row in sj_taid.accelerate(net).rows)
    assert type(net(images())[1]) is torch.Tensor


FORMS = {
    "bfloat16": lambda net: net.bfloat16(),
    "channels-last": lambda net: net.to(memory_format=torch.channels_last),
    "frozen": lambda net: net.bn.requires_grad_(False),
    "packed": sj_taid.packed_spikes,
    "no parameters": lambda net: setattr(
        net, "bn", layer.BatchNorm2d(4, affine=False, step_mode="m")
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_recomputed_sum_in_other_forms(form, monkeypatch):
    net = Block()
    FORMS[form](net)
    x_seq = images().to(net.conv.weight.dtype)
    if form == "channels-last":
        x_seq = x_seq.movedim(2, -1).contiguous().movedim(-1, 2)
    _, saving = pair(net, monkeypatch)
    (got, less), (expected, size) = results(net, x_seq), results(saving, x_seq)
    assert_equal(got, expected)
    assert size - less == x_seq.nbytes


def test_recomputed_sum_of_a_copy_and_after_undo():
    net = Block()
    plain = copy.deepcopy(net)
    before = [set(vars(module)) for module in net.modules()]
    report = sj_taid.accelerate(net)
    copies = copy.deepcopy(net), pickle.loads(pickle.dumps(net))
    again = sj_taid.accelerate(net)
    assert not any(row.done for row in again.rows)
    again.undo()
    expected, size = results(net)
    for other in copies:
        assert other.bn.forward.module is other.bn
        got, less = results(other)
        assert_equal(got, expected)
        assert less == size
    report.undo()
    for other in copies:
        sj_taid.unaccelerate(other)
    for other in (*copies, net):
        assert [set(vars(module)) for module in other.modules()] == before
    net.load_state_dict(plain.state_dict())
    assert_equal(results(net)[0], results(plain)[0])


def test_recomputed_sum_raises_where_a_saved_one_does():
    net, x_seq = Block(), images().requires_grad_()
    sj_taid.accelerate(net)
    (grad,) = torch.autograd.grad(net(x_seq).sum(), x_seq, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        grad.square().sum().backward()
    functional.reset_net(net)
    output = net(x_seq)
    with torch.no_grad():
        net.bn.bias.mul_(2.0)
    with pytest.raises(RuntimeError, match="changed in place since"):
        output.sum().backward()


def test_recomputed_sum_under_torch_func():
    net = Block().eval()
    sj_taid.accelerate(net)
    expected, _ = results(net)
    functional.reset_net(net)
    call = partial(torch.func.functional_call, net, args=(images(),))
    output, vjp = torch.func.vjp(lambda values: call(values), dict(net.named_parameters()))
    (grads,) = vjp(2 * expected["output"].detach())
    assert torch.equal(output, expected["output"])
    for name in grads.keys() & expected.keys():
        assert torch.allclose(grads[name], expected[name], rtol=1e-4), name


def run_autocast(net, x_seq):
    with torch.autocast("cpu", torch.bfloat16):
        return net(x_seq).float()


def run_checkpointed(net, x_seq):
    def start(x_seq):
        functional.reset_net(net)
        return net(x_seq)

    return checkpoint(start, x_seq, use_reentrant=False)


def run_with(net, forward, x_seq):
    """Run the net with another forward of the neuron behind the sum."""
    net.sn.forward = forward
    try:
        return net(x_seq)
    finally:
        del net.sn.forward


def run_checkpointed_neuron(net, x_seq):
    forward = net.sn.forward

    def start(x_seq):
        net.sn.reset()
        return forward(x_seq)

    return run_with(net, lambda x_seq: checkpoint(start, x_seq, use_reentrant=False), x_seq)


def run_compiled_neuron(net, x_seq):
    torch._dynamo.reset()
    forward = torch.compile(net.sn.forward, fullgraph=True, backend="aot_eager")
    return run_with(net, forward, x_seq)


def run_compiled(net, x_seq):
    torch._dynamo.reset()
    return torch.compile(net, fullgraph=True, backend="aot_eager")(x_seq)


RUNS = [run_autocast, run_checkpointed, run_checkpointed_neuron, run_compiled, run_compiled_neuron]


@pytest.mark.parametrize("run", RUNS)
def test_recomputed_sum_inside(run, monkeypatch):
    net = Block()
    _, saving = pair(net, monkeypatch)
    got, _ = results(net, run=lambda x_seq: run(net, x_seq))
    expected, _ = results(saving, run=lambda x_seq: run(saving, x_seq))
    del got["v"], expected["v"]  # a recomputation may stop before it
    assert_equal(got, expected)


def test_nothing_lives_longer_than_backward(monkeypatch):
    net = Block()
    pair(net, monkeypatch)
    inputs = []
    net.conv.register_forward_hook(lambda *call: inputs.append(weakref.ref(call[2])))
    loss = net(images()).sum()
    assert inputs[0]() is not None
    loss.backward()
    assert inputs[0]() is None


class Kind(neuron.LIFNode):
    """A neuron that is not accelerated, so its spikes are not saved as bits."""


def test_sum_with_spikes_that_are_no_bits_is_left(monkeypatch):
    net = Block()
    net.stem = Kind(step_mode="m", surrogate_function=ATAN)
    (row,) = (row for row in sj_taid.accelerate(net).rows if row.layer == "bn")
    assert not row.done
