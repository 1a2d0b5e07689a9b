"""The report of ``accelerate``: which norms it names, and what counts as saved for backward."""

import copy
import time

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn

from sj_taid import ALIFNode, accelerate
from sj_taid.nets.summary import Acceleration, run_step
from sj_taid.ops.step.plan import Plans
from tests.nets.test_accelerate import images, make_net


@pytest.mark.parametrize(
    ("net", "inputs"),
    [
        (nn.BatchNorm1d(6).eval(), torch.rand(5, 6, requires_grad=True)),
        (nn.Bilinear(6, 6, 3), (torch.rand(100, 6)[:35:7], torch.rand(1, 6).expand(5, 6))),
    ],
)
def test_inputs_parameters_and_buffers_do_not_count_as_saved(net, inputs):
    assert run_step(net, inputs, True)[0] == 0


class LN(nn.LayerNorm):
    pass


class Normalize(nn.Module):
    def forward(self, x):
        return x - 0.5


@pytest.mark.parametrize("norm", [layer.SeqToANNContainer(nn.GroupNorm(2, 4)), LN(6)])
def test_norms_that_are_no_batch_norms_are_named_and_stay(norm):
    net = make_net()
    net.insert(5, norm)
    net.insert(0, Normalize())
    net.append(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))
    report = accelerate(net, images())
    (left,) = (row for row in report.rows if not row.done)
    assert left.note == "no batch norm: no mean and variance per channel of the batch"
    assert left.kind == type(net.get_submodule(left.layer)).__name__ and left.layer[0] == "6"
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


def test_a_norm_of_inputs_without_gradient_or_that_does_not_run_is_said_to_be_left():
    net = nn.Sequential(layer.BatchNorm1d(6, step_mode="m"), neuron.LIFNode(step_mode="m"))
    net[1].unused = layer.BatchNorm2d(4)
    report = accelerate(net, torch.rand(4, 5, 6, 7))
    notes = {row.layer: row.note for row in report.rows}
    assert notes["0"] == "computed apart: its input requires no gradient"
    assert notes["1.unused"] == "not run" and "0 of 2 norms fused" in str(report)


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


def test_a_neuron_may_be_called_by_keyword():
    net = nn.Sequential(layer.BatchNorm2d(2), ByKeyword(neuron.LIFNode()))
    functional.set_step_mode(net, "m")
    report = accelerate(net, images().requires_grad_())
    assert [row.done for row in report.rows] == ["fused into 1.node", "fused operator"]


@pytest.mark.filterwarnings("ignore:backend 'numba' cannot take this call")
@pytest.mark.parametrize("node", [ALIFNode, neuron.ParametricLIFNode])
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [
        *((torch.float16, False), (torch.bfloat16, False), (torch.float64, False)),
        *((torch.float16, True), (torch.bfloat16, True)),
    ],
)
def test_a_neuron_is_said_to_be_fused_where_a_plan_runs_it(node, dtype, autocast):
    net = nn.Sequential(layer.Conv2d(2, 4, 3), layer.BatchNorm2d(4), node())
    functional.set_step_mode(net, "m")
    net = As(net if autocast else net.to(dtype), dtype, autocast)
    blind, report = accelerate(copy.deepcopy(net)), accelerate(net, images())
    net(images())
    calls = Plans.of(net.net[2]).values()
    fused = dtype == torch.bfloat16
    assert fused == any(call.plan for call in calls) == report.rows[1].done.startswith("fused ")
    note = f"no fused operator for {dtype} on cpu"
    assert report.rows[1].note == note or fused
    assert (fused or autocast) != blind.rows[1].note.startswith(note)
    assert "not run" not in str(report)
    one = f"{int(fused)} of 1"
    assert str(report).startswith(f"{one} neurons on the fused operator, {one} norms fused")


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


class PlainStep(nn.Module):
    def forward(self, x):
        return surrogate.heaviside(x) + (x - x.detach())


class Step(PlainStep, surrogate.SurrogateFunctionBase):
    """A surrogate of a net's own, derived from SpikingJelly's."""

    def __init__(self):
        super().__init__(alpha=1.0)


@pytest.mark.parametrize("step", [Step, PlainStep])
def test_a_surrogate_of_ones_own_is_a_part_of_its_neuron(step):
    net = nn.Sequential(nn.Linear(6, 6), neuron.LIFNode(surrogate_function=step(), step_mode="m"))
    assert not accelerate(net, torch.randn(4, 5, 6) * 9).counting
    net.append(nn.Sequential(nn.Linear(6, 6), Block(Step())))  # a neuron of a net's own
    assert accelerate(net, torch.randn(4, 5, 6) * 9).counting == {"2.1": "Block"}


def test_a_step_is_timed_by_the_processor_where_there_is_no_gpu(monkeypatch):
    net = nn.Sequential(nn.Linear(6, 6), neuron.LIFNode(step_mode="m"))
    seconds = iter((1.0, 1.25))
    monkeypatch.setattr(time, "process_time", lambda: next(seconds))
    assert run_step(net, torch.rand(4, 5, 6))[1] == 250
    report = Acceleration((), "", (2, 1), (2.0, 1.0))
    assert "step 2 -> 1 ms of processor time" in str(report)
