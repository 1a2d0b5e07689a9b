"""The energy of a pass: worked by hand, of counts step by step, of spikes SpikingJelly's own."""

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

from sj_taid.training.energy import estimate_energy

counters = pytest.importorskip("spikingjelly.activation_based.op_counter")  # not in 0.0.0.0.14

ADDITION, MULTIPLICATION, BYTE = 0.9e-6, 4.6e-6, 24.96e-6  # µJ


def test_by_hand():
    net = nn.Linear(3, 2)
    read = 4 * BYTE  # a weight
    biases = 2 * read
    counts = torch.tensor([[0.0, 3.0, 1.0]])  # four spikes, each added to two outputs
    assert estimate_energy(net, counts) == pytest.approx(8 * (ADDITION + read) + biases)
    numbers = torch.tensor([[0.0, 3.5, 1.0]])
    assert estimate_energy(net, numbers) == pytest.approx(6 * (MULTIPLICATION + read) + biases)


LAYERS = {
    "linear": lambda: nn.Linear(6, 5, bias=False),
    "convolution": lambda: layer.Conv2d(4, 6, 3, stride=2, bias=False, step_mode="m"),
    "padded": lambda: layer.Conv2d(4, 6, 3, padding=1, bias=False, step_mode="m"),
    "grouped": lambda: layer.Conv2d(4, 6, 3, groups=2, bias=False, step_mode="m"),
    "transposed": lambda: layer.ConvTranspose2d(4, 6, 3, bias=False, step_mode="m"),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("largest", [2, 4, 15])
def test_counts_cost_what_their_binary_steps_do(name, largest):
    net = LAYERS[name]()
    counts = torch.randint(0, largest + 1, (2, 1, 4, 6, 6)).float()
    counts[0, 0, 0, 0, 0] = largest
    steps = [(counts >= level).float() for level in range(1, largest + 1)]
    unrolled = sum(energy_by_spikingjelly(net, step) for step in steps)
    assert estimate_energy(net, counts) == pytest.approx(unrolled)


def test_of_spikes_it_is_that_of_spikingjelly():
    net = nn.Sequential(
        layer.Conv2d(3, 4, 3), layer.BatchNorm2d(4), neuron.LIFNode(), layer.Conv2d(4, 2, 3)
    )
    functional.set_step_mode(net, "m")
    x = torch.rand(4, 1, 3, 8, 8)
    plain = energy_by_spikingjelly(net, x)
    functional.reset_net(net)
    assert estimate_energy(net, x) == pytest.approx(plain)


def energy_by_spikingjelly(net, x):
    return counters.estimate_simple_energy(net, (x,)).energy_total_pj / 1e6
