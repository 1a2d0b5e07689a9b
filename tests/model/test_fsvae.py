"""FSVAE: its posterior, prior and latent loss, its neuron, and scheduled sampling."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from sj_taid.model import FSVAE
from sj_taid.model.fsvae import Posterior, Prior, mmd_loss, pick
from sj_taid.model.spiking_vae import original_neuron
from tests.helpers import TOLERANCE
from tests.model.conftest import images

SMALL = {"image_size": 8, "T": 8, "hidden_channels": 6, "latent_channels": 10, "k": 4}
T, N, C, K = 9, 4, 6, 5
F64 = torch.float64


@pytest.fixture
def posterior():
    return settle(Posterior(2 * C, C, K, original_neuron))


@pytest.fixture
def prior():
    return settle(Prior(C, C, K, original_neuron))


def settle(network: nn.Module) -> nn.Module:
    """Put it in float64 and eval mode, with batch-norm statistics that are not the initial ones."""
    network = network.double()
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator) * 0.2)
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.1)
    return network.eval()


def picks():
    return torch.randint(K, (T, N, C))


def spikes():
    return (torch.rand(T, N, C, dtype=F64) < 0.5).to(F64)


@pytest.mark.parametrize("network", ["posterior", "prior"])
def test_drawing_equals_rerunning_every_prefix(network, request):
    network = request.getfixturevalue(network)
    x_seq, index = spikes(), picks()
    is_posterior = isinstance(network, Posterior)
    z = network(x_seq, index)[0] if is_posterior else network.sample(index)
    previous = torch.zeros(1, N, C, dtype=F64)
    for t in range(T):
        inputs = torch.cat([x_seq[: t + 1], previous], 2) if is_posterior else previous
        assert torch.equal(pick(network.run(inputs)[-1], index[t]), z[t])
        previous = torch.cat([previous, z[t : t + 1]])
    assert 0.02 < z.mean() < 0.98


def test_under_autocast_all_weights_learn_by_the_pass_with_gradient_alone(posterior, prior):
    norm = posterior.train().net[0][0][1]
    before = norm.num_batches_tracked.clone()
    with torch.autocast("cpu", torch.bfloat16):
        z_seq, q = posterior(spikes(), picks())
        p = prior(z_seq, 1.0)
    assert norm.num_batches_tracked == before + 1
    (q.float().square().sum() + p.float().square().sum()).backward()
    for net in (posterior, prior):
        assert all(parameter.grad is not None for parameter in net.parameters())


def test_prior_own_samples_replace_inputs_from_the_sixth_step_on(prior):
    seen = []
    run = prior.run
    prior.run = lambda x_seq: seen.append(x_seq.clone()) or run(x_seq)
    z_seq = spikes().requires_grad_()
    prior(z_seq, own_sample_probability=1.0)
    prior(z_seq, own_sample_probability=0.0).sum().backward()
    assert z_seq.grad is None  # samples are constants
    replaced, untouched = seen
    assert torch.equal(untouched[1:], z_seq[:-1])
    assert torch.equal(replaced[:6], untouched[:6])
    assert all(not torch.equal(a, b) for a, b in zip(replaced[6:], untouched[6:], strict=True))
    assert set(replaced.unique().tolist()) <= {0.0, 1.0}


def test_prior_own_samples_are_its_thresholded_mean(prior, monkeypatch):
    z_previous = spikes()
    expected = z_previous.clone()
    own = torch.tensor([0.0, 0, 0, 0, 0, 1, 0, 1])
    monkeypatch.setattr(torch, "rand", lambda n: 1 - own)
    torch.manual_seed(3)
    prior._take_own_samples(z_previous, 0.5)
    torch.manual_seed(3)
    for t in (5, 7):
        rate = prior.run(expected[: t + 1])[-1].mean(-1)
        expected[t + 1] = (rate + 1e-3 * torch.randn_like(rate) > 0.5).to(F64)
    assert torch.equal(z_previous, expected)


def test_prior_compiled_takes_the_same_own_samples(prior):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(prior, backend=counter, dynamic=False)
    z_seq, graphs = spikes(), []
    for probability in (0.1, 0.5, 0.9):
        results = []
        for network in (prior, compiled):
            torch.manual_seed(1)
            results.append(network(z_seq, torch.tensor(probability)))
        assert torch.equal(*results)
        graphs.append(counter.frame_count)
    assert graphs[0] > 0 and graphs == graphs[:1] * 3


def test_mmd_loss_is_of_postsynaptic_potentials():
    q, p = torch.rand(2, T, N, C, K, dtype=F64)
    potential, squares = torch.zeros(N, C, dtype=F64), []
    for difference in (q - p).mean(3):
        potential = potential + (difference - potential) / 2
        squares.append(potential.square())
    error = (mmd_loss(q, p) - torch.stack(squares).mean()).abs()
    assert error <= TOLERANCE[F64]["value"]
    assert mmd_loss(q, q) == 0


def test_training_loss_scheduled_sampling_follows_the_progress(monkeypatch):
    model = FSVAE(**SMALL)
    used = []
    original = model.prior.forward
    monkeypatch.setattr(model.prior, "forward", lambda z, p: used.append(p) or original(z, p))
    for progress in (0.0, 0.5, 1.0):
        model.training_loss(images(), progress)
    assert used == pytest.approx([0.1, 0.2, 0.3])
    assert all(isinstance(p, torch.Tensor) for p in used), "a float makes a compiled graph each"
