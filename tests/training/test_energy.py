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


class Attention(nn.Module):
    def forward(self, x):
        return (x @ x.transpose(-1, -2)) @ x


def test_products_of_counts_by_hand():
    counts = torch.tensor([[[2.0, 0.0], [1.0, 3.0]]])
    # x x^T = [[4, 2], [2, 10]] by 18 additions; times x = [[10, 6], [14, 30]] by 60.
    assert estimate_energy(Attention(), counts) == pytest.approx(78 * ADDITION)
    spikes = torch.tensor([[[1.0, 0.0], [1.0, 1.0]]])
    # [[1, 1], [1, 2]] by 5, then [[2, 1], [3, 2]] by 8.
    assert estimate_energy(Attention(), spikes) == pytest.approx(13 * ADDITION)


@pytest.mark.parametrize("value", [2.0, 3.0])
def test_whole_weights_and_biases_are_no_counts(value):
    net, x = nn.Linear(3, 2), torch.randint(0, 2, (4, 3)).float()
    for parameter in net.parameters():
        nn.init.constant_(parameter, value)
    for inputs in (x, x + 0.5, x * 255):  # spikes, real numbers, pixels
        assert estimate_energy(net, inputs) == pytest.approx(energy_by_spikingjelly(net, inputs))


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
