"""Fitting the flow of a model of the package again."""

from types import SimpleNamespace

import refit
import torch

from sj_taid import create_model
from sj_taid.pretrained import read_config
from sj_taid.training.run import Run

NAME = "esvae_mnist_taid"


def test_refit_makes_runs_of_other_flows(tmp_path, monkeypatch):
    batches = [(torch.rand(20, 1, 32, 32) * 2 - 1, None) for _ in range(3)]
    samples = SimpleNamespace(labels=[0, 1] * 30)
    data = SimpleNamespace(mirrors=False, train_set=samples, plain_train_dataloader=lambda: batches)
    monkeypatch.setattr(refit, "build_data", lambda cfg: data)
    chosen = ["dataset.root=elsewhere", "model.flow_epochs=1"]
    local = "cache_dir=/home/me"  # no part of the record
    refit.main([NAME, str(tmp_path), local, *chosen, "--seeds", "0", "1"])
    first, second = (Run(tmp_path / f"{NAME}-{seed}") for seed in (0, 1))
    assert first.config.dataset.root == "elsewhere" and first.config.model.flow_epochs == 1
    assert second.metrics["prior_fitted"]["seed"] == 1
    assert second.origin["command"] == second.metrics["command"]  # which resuming reads
    before = read_config(NAME)["metrics"]
    assert {*before} - {*second.metrics} == {*before} & refit.STALE
    assert {"validation_fad", "fad", "fad_published_median"} <= refit.STALE
    command = f"python experiments/refit.py {NAME} FOLDER {' '.join(chosen)} --seeds 1"
    assert second.metrics["prior_fitted"]["command"] == command
    shipped, model, other = create_model(NAME, pretrained=True), first.model(), second.model()
    assert model.labels == [0, 1]
    assert not torch.equal(model.flow.velocity.last.weight, other.flow.velocity.last.weight)
    assert torch.equal(model.to_latent[0][0].weight, shipped.to_latent[0][0].weight)
