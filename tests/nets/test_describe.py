"""What is printed of a neuron is what it computes."""

import inspect
import re

import pandas as pd
import pytest
import torch
from spikingjelly.activation_based import neuron, surrogate
from torch import nn

import sj_taid
from sj_taid import ALIFNode, describe
from sj_taid._internal import compat

NEEDED = {"LIAFNode": {"act": torch.relu, "threshold_related": True}}
NEEDED["SimpleLIFNode"] = {"tau": 2.0, "decay_input": True}
#: what no test here can build, or 0.0.0.0.14 itself cannot run
LEFT_OUT = ("MPBNBaseNode", "MPBNLIFNode", *(() if compat.FUNCTIONAL_STATES else ("LIAFNode",)))
KINDS = [
    kind
    for name, kind in sorted(vars(neuron).items())
    if inspect.isclass(kind) and issubclass(kind, compat.NEURONS) and name not in LEFT_OUT
]
NODES = [(kind.__name__, lambda kind=kind: kind(**NEEDED.get(kind.__name__, {}))) for kind in KINDS]
NODES += [
    ("LIF, soft", lambda: neuron.LIFNode(3.0, decay_input=False, v_reset=None)),
    ("PLIF, of other numbers", lambda: neuron.ParametricLIFNode(3.0, v_reset=-0.25)),
    ("ALIF of channels", lambda: ALIFNode(channels=3, v_threshold=0.3)),
    ("ALIF of counts", lambda: ALIFNode(levels=4, v_reset=None)),
    ("ALIF of shares", lambda: ALIFNode(init_tau=None, levels=4, normalize=True)),
]
FUNCTIONS = vars(torch) | {
    "max": lambda a, b: torch.maximum(a, torch.as_tensor(b)),
    "min": lambda a, b: torch.minimum(a, torch.as_tensor(b)),
}


def run(row, node, x, states):
    """Run the equation of a row as it is written, in Python."""
    names = FUNCTIONS | {name: p.detach().view(-1, 1) for name, p in node.named_parameters()}
    names |= {name: float(value) for name, value in re.findall(r"(\w+) = ([^,]+)", row.numbers)}
    names |= {"x": x} | states
    for line in row.equation.split("; "):
        name, _, text = line.replace("'", "_next").partition(" = ")
        value = eval(text, names)
        is_bool = isinstance(value, torch.Tensor) and value.dtype == torch.bool
        names[name] = value.float() if is_bool else value
    return names["s"], {
        name: names[f"{name}_next"] for name in states if f"{name}'" in row.equation
    }


@pytest.mark.parametrize(("name", "make"), NODES, ids=[name for name, _ in NODES])
def test_equation_computes_what_the_neuron_does(name, make):
    node = make()
    (row,) = describe(node).rows
    if row.equation.startswith("not read: "):
        assert len(row.equation) > 20 and not row.outputs
        return
    x = 3 * torch.rand(6, 2, 3, 5) - 0.5
    first = compat.states_of(node).items()
    states = {n: torch.full_like(x[0], v) for n, v in first if isinstance(v, float | int)}
    for x_t in x:
        expected = node(x_t)
        s, states = run(row, node, x_t, states)
        torch.testing.assert_close(s + torch.zeros(()), expected.detach())
        for key, value in states.items():
            now = torch.as_tensor(compat.states_of(node)[key]).expand_as(x_t).detach()
            torch.testing.assert_close(value + torch.zeros(()), now)


def test_whatever_differs_is_shown():
    nodes = [
        *(neuron.IFNode(), neuron.LIFNode(), neuron.LIFNode(3.0), neuron.LIFNode(v_threshold=1.5)),
        *(neuron.LIFNode(v_reset=1.5), neuron.LIFNode(detach_reset=True)),
        neuron.LIFNode(surrogate_function=surrogate.ATan()),
        neuron.LIFNode(surrogate_function=surrogate.ATan(alpha=3.0)),
        *(ALIFNode(), ALIFNode(init_tau=3.0)),
    ]
    texts = [describe(node) for node in nodes]
    for i, one in enumerate(texts):
        for j, other in enumerate(texts):
            assert (one == other) == (not one.differences(other)) == (i == j)
    (line,) = texts[1].differences(texts[2])
    assert line.startswith("net: numbers: ") and "tau = 2, " in line and "tau = 3, " in line


def test_parameters_that_do_not_learn_are_numbers():
    net = nn.Sequential(neuron.IFNode(), neuron.LIFNode())
    sj_taid.swap_neurons(net, learn_tau=False, learn_threshold=False)
    net[1].v_threshold.requires_grad_(True)
    rows = describe(net).rows
    assert rows[0].learned == () and "v_threshold = 1" in rows[0].numbers
    assert "w = -" in rows[0].numbers and "w = 0" in rows[1].numbers
    assert [str(learned) for learned in rows[1].learned] == ["v_threshold: 1"]


def test_accelerated_net_has_the_same_description():
    net = nn.Sequential(ALIFNode(step_mode="m"), neuron.LIFNode(step_mode="m"))
    before = describe(net)
    sj_taid.accelerate(net)
    assert describe(net) == before


def test_csv_and_print_fold_neurons_that_learned_other_numbers(tmp_path):
    net = nn.Sequential(*(ALIFNode(v_threshold=v) for v in (0.5, 1.0, 1.5)), neuron.LIFNode())
    found = describe(net)
    found.to_csv(tmp_path / "neurons.csv")
    table = pd.read_csv(tmp_path / "neurons.csv", keep_default_na=False)
    assert table["layer"].tolist() == ["0, 1, 2", "3"]
    assert "v_threshold: 3 values, 0.5 to 1.5" in table["learned"][0]
    assert "layer      0 and 2 more" in str(found) and "neurons: 4, kinds: 2" in str(found)


@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_example_counts_steps_and_changes_nothing(step_mode):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.node = ALIFNode(step_mode=step_mode)

        def forward(self, x_seq):
            if step_mode == "m":
                return self.node(x_seq)
            return torch.stack([self.node(x) for x in x_seq])

    net = Net()
    assert describe(net, torch.rand(5, 2, 3)).steps == (5,)
    assert net.node.v == 0.0 and not net.node._forward_pre_hooks


@pytest.mark.skipif(not compat.FUNCTIONAL_STATES, reason="0.0.0.0.14 has no PSN")
def test_a_neuron_that_is_no_base_node_is_not_read():
    (row,) = describe(neuron.PSN(4)).rows
    assert row.equation == "not read: it is no BaseNode"
