"""The report of ``accelerate``: which norms it names, and what counts as saved for backward."""

import copy
import time
import warnings
from dataclasses import replace

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn

from sj_taid import ALIFNode, accelerate, swap_neurons
from sj_taid._internal.compat import FUNCTIONAL_STATES
from sj_taid.nets.summary import Acceleration, run_step
from sj_taid.ops.step.plan import Plans
from tests.nets.test_accelerate import images, make_net


@pytest.mark.parametrize(
    ("net", "inputs"),
    [
        (nn.Linear(6, 3), torch.rand(5, 6)),
        (nn.Linear(6, 3), torch.rand(100, 6)[::7]),
        (nn.BatchNorm1d(6).eval(), torch.rand(5, 6, requires_grad=True)),
        (nn.Bilinear(6, 6, 3), (torch.rand(2, 5, 6)[0], torch.rand(1, 6).expand(5, 6))),
    ],
)
def test_inputs_parameters_and_buffers_do_not_count_as_saved(net, inputs):
    assert run_step(net, inputs, True)[0] == 0


def test_an_example_of_a_data_set_counts_as_its_copy():
    example = images(steps=40)[8:12]
    saved = [accelerate(make_net(), x).saved_bytes for x in (example, (example.clone(),))]
    assert saved[0] == saved[1]


class LN(nn.LayerNorm):
    pass


class RMSNorm(nn.Module):
    def forward(self, x):
        return x / x.square().mean(-1, keepdim=True).sqrt()


class Normalize(nn.Module):
    def forward(self, x):
        return x - 0.5


@pytest.mark.parametrize(
    "norm",
    [
        layer.SeqToANNContainer(nn.GroupNorm(2, 4)),
        layer.GroupNorm(2, 4, step_mode="m"),
        nn.Sequential(LN(6)),
        nn.Sequential(RMSNorm()),
    ],
)
def test_norms_that_are_no_batch_norms_are_named_and_stay(norm):
    net = make_net()
    net.insert(5, norm)
    net.insert(0, Normalize())
    net.append(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))
    report = accelerate(net, images())
    rows = {row.layer: row for row in report.rows if "on the fused operator" not in row.note}
    left = {path: row for path, row in rows.items() if not row.done}
    (path,) = left
    assert left[path].note == "no batch norm: no mean and variance per channel of the batch"
    assert left[path].kind == type(net.get_submodule(path)).__name__ and path.startswith("6")
    assert str(report).startswith("3 of 3 neurons on the fused operator, 2 of 3 norms fused\n")


@pytest.mark.filterwarnings("ignore:all neurons are in step mode 's'")
def test_an_error_of_a_net_in_single_steps_names_the_step_mode():
    net = nn.Sequential(layer.Conv2d(1, 4, 3), layer.BatchNorm2d(4), neuron.LIFNode())
    with pytest.raises(RuntimeError, match="conv2d") as caught:
        accelerate(net, torch.rand(4, 2, 1, 8, 8))
    assert "functional.set_step_mode(net, 'm')" in caught.value.__notes__[0]
    assert accelerate(net, torch.rand(2, 1, 8, 8)).saved_bytes  # steps, as in a loop over time
    functional.set_step_mode(net, "m")
    with pytest.raises(RuntimeError, match="channels") as caught:
        accelerate(net, torch.rand(4, 2, 3, 8, 8))
    assert not hasattr(caught.value, "__notes__")


def test_a_norm_of_inputs_without_gradient_is_said_to_be_apart():
    net = nn.Sequential(layer.BatchNorm1d(6, step_mode="m"), neuron.LIFNode(step_mode="m"))
    report = accelerate(net, torch.rand(4, 5, 6, 7))
    assert report.rows[0].note == "computed apart: its input requires no gradient"
    assert "0 of 1 norms fused" in str(report)


class As(nn.Module):
    """Runs a net on its input in another dtype, or under autocast."""

    def __init__(self, net, dtype, autocast):
        super().__init__()
        self.net, self.dtype, self.autocast = net, dtype, autocast

    def forward(self, x):
        with torch.autocast("cpu", self.dtype, self.autocast):
            return self.net(x if self.autocast else x.to(self.dtype))


class ByKeyword(nn.Module):
    """Gives a neuron its input by name."""

    def __init__(self, node):
        super().__init__()
        self.node = node

    def forward(self, x_seq):
        return self.node(x_seq=x_seq)


@pytest.mark.filterwarnings("ignore:backend 'numba' cannot take this call")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_neuron_may_be_called_by_keyword(dtype):
    net = nn.Sequential(layer.Conv2d(2, 4, 3), layer.BatchNorm2d(4), ByKeyword(neuron.LIFNode()))
    functional.set_step_mode(net, "m")
    report = accelerate(net.to(dtype), images().to(dtype))
    states = {row.layer: row.state for row in report.rows}
    assert states["2.node"] == ("fused" if dtype == torch.float32 else "left alone")


@pytest.mark.filterwarnings("ignore:backend 'numba' cannot take this call")
@pytest.mark.parametrize("node", [ALIFNode, neuron.LIFNode, neuron.ParametricLIFNode])
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [
        *((torch.float32, False), (torch.float16, False), (torch.bfloat16, False)),
        *((torch.float64, False), (torch.float16, True), (torch.bfloat16, True)),
    ],
)
def test_a_neuron_is_said_to_be_fused_where_a_plan_runs_it(node, dtype, autocast):
    net = nn.Sequential(layer.Conv2d(2, 4, 3), layer.BatchNorm2d(4), node())
    functional.set_step_mode(net, "m")
    net = As(net if autocast else net.to(dtype), dtype, autocast)
    blind, report = accelerate(copy.deepcopy(net)), accelerate(net, images())
    net(images())
    calls = Plans.of(net.net[2]).values()
    fused = dtype in (torch.float32, torch.bfloat16)
    assert fused == any(call.plan for call in calls) == report.rows[1].done.startswith("fused ")
    note = f"no fused operator for {dtype} on cpu"
    assert report.rows[1].note == note or fused
    assert (fused or autocast) != blind.rows[1].note.startswith(note)
    assert "not run" not in str(report)
    one = f"{int(fused)} of 1"
    assert str(report).startswith(f"{one} neurons on the fused operator, {one} norms fused")


def test_a_norm_that_does_not_run_is_said_not_to():
    net = As(make_net(), torch.float32, False)
    net.unused = layer.BatchNorm2d(4)
    report = accelerate(net, images())
    assert {row.layer: row.note for row in report.rows}["unused"] == "not run"


class Count(nn.Module):
    """Gives counts, divided by 4 in a net that divides them."""

    def __init__(self, factor=1.0):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        y = x.clamp(0, 4)
        return (y + (y.round() - y).detach()) * self.factor


class Block(nn.Sequential):
    """Of a net's own class."""


class Silent(nn.Module):
    def forward(self, x):
        return 0.0 * x


class Repeated(nn.Module):
    def forward(self, x):
        return x.repeat(1, 1, 2)  # counts of counts


def test_the_report_ends_with_what_gives_counts_and_is_no_neuron():
    node = neuron.LIFNode(step_mode="m")
    net = nn.Sequential(
        *(nn.Linear(6, 6), Count(), Repeated(), nn.Linear(12, 6)),
        *(Block(nn.Linear(6, 6), Count(0.25)), nn.Linear(6, 6), Silent()),
        *(nn.Linear(6, 6), Block(nn.Linear(6, 6), node)),
    )
    x = torch.randn(4, 5, 6) * 9
    report = accelerate(net, x)
    assert report.counting == {"1": "Count", "4.1": "Count"}
    last = "counts come from no neurons of SpikingJelly's too: 1 (Count) and 1 more; give them"
    assert str(report).splitlines()[-1].startswith(last)
    assert not accelerate(net).counting and "counts come" not in str(accelerate(net[-1:], x))
    with pytest.raises(ValueError, match=r"swap_neurons\(net, replace=.*docs/swap\.md"):
        accelerate(net[:-1], x)


class Step(surrogate.SurrogateFunctionBase):
    """A surrogate of a net's own, derived from SpikingJelly's or not."""

    def __init__(self):
        super().__init__(alpha=1.0)

    def forward(self, x):
        return surrogate.heaviside(x) + (x - x.detach())


class PlainStep(nn.Module):
    def forward(self, x):
        return surrogate.heaviside(x) + (x - x.detach())


class OwnLIF(nn.Module):
    def __init__(self):
        super().__init__()
        self.step = Step()

    def forward(self, x):
        return self.step(x)


@pytest.mark.parametrize("step", [Step, PlainStep])
def test_a_surrogate_of_ones_own_is_a_part_of_its_neuron(step):
    net = nn.Sequential(nn.Linear(6, 6), neuron.LIFNode(surrogate_function=step(), step_mode="m"))
    report = accelerate(net, torch.randn(4, 5, 6) * 9)
    assert not report.counting and "counts come" not in str(report)
    net.append(nn.Sequential(nn.Linear(6, 6), OwnLIF()))
    assert accelerate(net, torch.randn(4, 5, 6) * 9).counting == {"2.1": "OwnLIF"}


def test_a_step_is_timed_by_the_processor_where_there_is_no_gpu(monkeypatch):
    net = nn.Sequential(nn.Linear(6, 6), neuron.LIFNode(step_mode="m"))
    seconds = iter((1.0, 1.25))
    monkeypatch.setattr(time, "process_time", lambda: next(seconds))
    assert run_step(net, torch.rand(4, 5, 6))[1] == 250
    report = Acceleration((), "", (2, 1), (2.0, 1.0))
    assert "step 2 -> 1 ms of processor time" in str(report)
    assert "step 2 -> 1 ms\n" in str(replace(report, on_gpu=True))


class PLIFNode(neuron.BaseNode):
    """A neuron of a net's own."""

    def neuronal_charge(self, x):
        self.v = self.v + 0.5 * x


def test_a_neuron_of_another_class_is_named_with_the_remedy():
    net = nn.Sequential(nn.Linear(6, 6), neuron.LIFNode(step_mode="m"), PLIFNode(step_mode="m"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 2.x does not call neuronal_charge
        reports = accelerate(net), swap_neurons(net, filter=lambda *_: False)
    heads = "it has no step", f"not a LIF, PLIF or IF of SpikingJelly's, but {__name__}.PLIFNode"
    if not FUNCTIONAL_STATES:  # which calls neuronal_charge, so the class is read
        assert reports[0].rows[1].note == "equal outputs"
        return
    for report, head in zip(reports, heads, strict=True):
        note = report.rows[1].note
        assert note.startswith(f"{head}")
        assert note.endswith("swap_neurons(net, replace={PLIFNode: ...}) gives it a successor")
