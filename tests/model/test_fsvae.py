"""FSVAE: its neuron, compiled graphs, scheduled sampling, errors."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from sj_taid.model import FSVAE
from sj_taid.model.latent import Prior
from tests.model.conftest import frozen_alif, images, lif

SMALL = {"image_size": 8, "T": 8, "hidden_channels": (6, 12), "latent_channels": 10, "k": 4}


@pytest.mark.parametrize("training", [True, False])
def test_frozen_alif_equals_lif(training):
    alif = FSVAE(**SMALL, neuron=frozen_alif).double().train(training)
    original = FSVAE(**SMALL, neuron=lif).double().train(training)
    original.load_state_dict(
        {k: v for k, v in alif.state_dict().items() if not k.endswith((".w", ".v_threshold"))}
    )
    image = images(8).double()
    outputs, samples = [], []
    for model in (alif, original):
        torch.manual_seed(0)
        outputs.append(model(image, 0.3))
        samples.append(model.sample(4))
    for a, b in zip(*outputs, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(*samples)


@pytest.mark.slow
def test_compiled_graphs_serve_all_epochs(monkeypatch):
    torch.compiler.reset()
    passes, insert = [], Prior._insert_own_samples
    monkeypatch.setattr(Prior, "_insert_own_samples", lambda *a: passes.append(a) or insert(*a))
    monkeypatch.setattr(Prior, "FIRST_OWN_SAMPLE", 1)  # or 7 steps would be compiled
    sizes = {"image_size": 4, "T": 3, "hidden_channels": (2,), "latent_channels": 2, "k": 2}
    model = FSVAE(**sizes, own_sample_probability=(0.0, 1.0))
    counter = CompileCounterWithBackend("eager")
    model.compile(backend=counter, dynamic=False)
    graphs = []
    for progress in (0.0, 1.0):
        model.training_loss(images(2, size=4), progress)["loss"].backward()
        graphs.append(counter.frame_count)
    assert 0 < graphs[0] == graphs[1]
    assert len(passes) == 1, "the prior takes samples of its own in all epochs but the first"


def test_training_loss_scheduled_sampling_follows_the_progress(monkeypatch):
    model = FSVAE(**SMALL, own_sample_probability=(0.1, 0.3))
    used = []
    original = model.prior.forward
    monkeypatch.setattr(model.prior, "forward", lambda z, p: used.append(p) or original(z, p))
    for progress in (0.0, 0.5, 1.0):
        model.training_loss(images(), progress)
    assert used == pytest.approx([0.1, 0.2, 0.3])
