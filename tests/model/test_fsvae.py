"""FSVAE: its neuron and scheduled sampling."""

import pytest
import torch

from sj_taid.model import FSVAE
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


def test_training_loss_scheduled_sampling_follows_the_progress(monkeypatch):
    model = FSVAE(**SMALL, own_sample_probability=(0.1, 0.3))
    used = []
    original = model.prior.forward
    monkeypatch.setattr(model.prior, "forward", lambda z, p: used.append(p) or original(z, p))
    for progress in (0.0, 0.5, 1.0):
        model.training_loss(images(), progress)
    assert used == pytest.approx([0.1, 0.2, 0.3])
    assert all(isinstance(p, torch.Tensor) for p in used), "a float makes a compiled graph each"
