"""Measuring a generator's checkpoint further."""

from types import SimpleNamespace

import measure
import torch

from sj_taid.model import ESVAE
from sj_taid.training.run import Run
from tests.training.conftest import TINY_ESVAE


def test_measure_adds_an_evaluation(trained):
    run = Run(trained(*TINY_ESVAE, "model.sample_from=learned"))  # a flow takes longer to fit
    measure.main([str(run.folder), "--draws", "2"])
    (evaluation,) = run.evaluations
    metrics, protocol = evaluation["metrics"], evaluation["protocol"]
    fad = run.metrics["fad"]
    assert abs(metrics["fad_median"] - fad) < metrics["fad_range"]
    assert metrics["fad_floor"] < fad != metrics["fad_perfect"]
    assert metrics["fad_precision_floor"] > 0.5
    assert protocol["fad_median"].endswith(", of 2 draws")
    assert protocol["fad_floor"].endswith("images at 8x8, samples: training images")
    assert protocol["fad_perfect"].endswith("from the rates of training images")


def test_perfect_prior_draws_spikes_as_samples_have_them(monkeypatch):
    model = ESVAE(image_size=8, T=6, hidden_channels=(4,), latent_channels=10)
    monkeypatch.setattr(model, "rate", lambda image: torch.full((4, 10), 0.5))
    monkeypatch.setattr(model, "decode", lambda z_seq: z_seq.sum(0))
    data = SimpleNamespace(train_set=range(4), plain_train_dataloader=lambda: None)
    monkeypatch.setattr(measure.TrainingImages, "sample", lambda self, n: torch.zeros(n, 1))
    counts = measure.PerfectPrior(data, model).sample(4)
    assert 2 < counts.mean() < 4 and not (counts == 3).all()
