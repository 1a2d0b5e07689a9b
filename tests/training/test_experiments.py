"""Every experiment runs: one batch of made-up data through its own config, made small."""

import json

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from experiments import report
from sj_taid.data.base import Data, InMemory
from sj_taid.training import run
from sj_taid.training.commands import train
from tests.training.conftest import CONF, TINY, TINY_CLASSIFICATION

EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))


@pytest.fixture
def small(tiny):
    """An experiment's config with the tests' sizes in place of its own."""

    def make(name):
        cfg = tiny(f"experiment={name}", tiny=False)
        sizes = [*TINY, *TINY_CLASSIFICATION, "dataset.T=2", "dataset.num_workers=0"]
        for override in sizes:
            key, _, value = override.partition("=")
            if OmegaConf.select(cfg, key) is not None and key != "task":
                OmegaConf.update(cfg, key, OmegaConf.create(f"x: {value}").x)
        return cfg

    return make


@pytest.fixture
def made_up(monkeypatch):
    """Twelve samples in place of every data set's own."""

    def load(self):
        torch.manual_seed(0)
        frames = [self.T] if hasattr(self, "T") else []
        shape = (12, *frames, self.channels, self.image_size, self.image_size)
        samples = InMemory(
            torch.randint(0, 256, shape, dtype=torch.uint8), torch.arange(12) % (self.classes or 1)
        )
        return samples, samples

    for cls in (Data, *subclasses(Data)):
        monkeypatch.setattr(cls, "prepare_data", lambda self: None)
        monkeypatch.setattr(cls, "load", load)


def subclasses(cls):
    return {cls, *(deeper for child in cls.__subclasses__() for deeper in subclasses(child))}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_runs(small, made_up, tmp_path, name):
    cfg = small(name)
    metrics = train(cfg, tmp_path, command=f"python experiments/train.py experiment={name}")
    assert metrics[cfg.objective] >= 0 and metrics["epochs"] == 1
    assert json.loads((tmp_path / run.METRICS).read_text())["command"].endswith(name)


# What the end of a paper row's name promises: model, neuron, decoder.
ROWS = {
    "vae": ("vae", None, None),
    "fsvae": ("fsvae", "lif", "fixed"),
    "taid": ("fsvae", "lif", "taid"),
    "taid_temporal": ("fsvae", "lif", "taid_temporal"),
    **{neuron: ("classifier", neuron, None) for neuron in ("alif", "plif", "lif")},
}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_is_what_its_name_says(name):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", [f"experiment={name}"], return_hydra_config=True)
    choices = cfg.hydra.runtime.choices
    data, row = cfg.dataset.name, name.removeprefix(f"{cfg.dataset.name}_")
    assert choices["dataset"] == data and name.startswith(data)
    assert report.comment(name).endswith(".")
    if name.endswith(report.LAPTOP):
        assert row in ("small_cpu", "classifier_cpu")
        return
    model, neuron, decoder = ROWS[row]
    assert choices["model"].startswith(model)
    assert (choices["neuron"], choices["decoder"]) == (neuron, decoder)
    assert cfg.get("published", {"source": "none"})["source"]
