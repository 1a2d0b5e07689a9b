"""Measuring generated images: what is made once, and no disturbance of the global random state."""

import multiprocessing
import time

import pytest
import torch
from hydra.utils import instantiate

from sj_taid.training import evaluation
from sj_taid.training.evaluation import kept
from tests.training.conftest import Network


class Noise(torch.nn.Module):
    """Draws images from the global random generator, as a model does."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def sample(self, n):
        return self.scale * torch.rand(n, 1, 8, 8)


@pytest.fixture
def setting(tiny, tmp_path):
    """A config with an empty cache, and its data."""
    cfg = tiny(f"cache_dir={tmp_path / 'cache'}", "metric.samples=40")
    data = instantiate(cfg.dataset)
    data.setup()
    return cfg, data


def states(cfg, data):
    fad = evaluation._metrics(data, cfg, torch.device("cpu"))["fad"]
    names = evaluation.STATISTICS
    return dict(fad.inception.state_dict()) | {name: getattr(fad, name) for name in names}


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_autoencoder_and_statistics_are_made_once_and_kept(setting, tmp_path, monkeypatch):
    cfg, data = setting
    first = states(cfg, data)
    assert first["real_features_num_samples"] == len(data.test_set)
    files = set((tmp_path / "cache").glob("*.pt"))
    assert {file.name.split("-")[0] for file in files} == {"autoencoder", "statistics"}

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "bare_trainer", None)
        patch.setattr(data, "test_dataloader", None)
        assert_equal(states(cfg, data), first)

    cfg.metric.autoencoder.latent_channels = 4
    states(cfg, data)
    assert len(set((tmp_path / "cache").glob("*.pt"))) == 4
    cfg.dataset.image_size = 16  # other images
    other = instantiate(cfg.dataset)
    other.setup()
    states(cfg, other)
    assert len(set((tmp_path / "cache").glob("*.pt"))) == 6


def test_the_autoencoder_does_not_depend_on_the_run(setting, tmp_path):
    cfg, data = setting
    first = states(cfg, data)
    cfg.cache_dir = str(tmp_path / "other")
    data.batch_size, data.augment = 10, "flip"
    torch.manual_seed(1)
    torch.testing.assert_close(states(cfg, data), first)


def test_the_figures_are_reproducible_and_leave_the_random_state_alone(setting):
    cfg, data = setting
    model = Noise()
    state = torch.random.get_rng_state()
    first = evaluation.measure(model, data, cfg)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert set(first) == {"fad", "protocol"}
    assert first["protocol"]["fad"].endswith("40 samples against 359 test images at 8x8")
    assert evaluation.measure(model, data, cfg) == first
    cfg.seed = 6
    assert evaluation.measure(model, data, cfg)["fad"] != first["fad"]


def test_the_protocol_names_the_autoencoder(setting):
    cfg, data = setting
    protocols = []
    for seed in (1, 1, 2):
        cfg.metric.autoencoder.seed = seed
        protocols.append(evaluation.measure(Noise(), data, cfg)["protocol"]["fad"])
    assert protocols[0] == protocols[1] != protocols[2]


def test_what_a_figure_lacks_shows_before_a_training(setting, monkeypatch):
    cfg, data = setting
    monkeypatch.setattr(evaluation, "Inception", Network)
    cfg.metric.inception_weights = "weights.pth"
    assert set(evaluation.measure(Noise(), data, cfg, only="fad")) == {"fad", "protocol"}
    cfg.metric.samples = Network.num_features
    monkeypatch.setattr(evaluation, "_autoencoder", None)  # not so far
    with pytest.raises(ValueError, match=r"fid needs at least 5 images, but metric\.samples is 4"):
        evaluation.measure(Noise(), data, cfg, only="fad")
    cfg.metric.samples = 40
    data.test_set = data.test_set.subset(range(4))
    with pytest.raises(ValueError, match=r"fid .* but the number of test images is 4"):
        evaluation.measure(Noise(), data, cfg, only="fad")


def test_what_is_damaged_is_made_anew(tmp_path, caplog):
    path = tmp_path / "kept.pt"
    made = {"x": torch.arange(3.0)}
    assert_equal(kept(path, lambda: made), made)
    assert_equal(kept(path, lambda: pytest.fail("it is there")), made)
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    assert_equal(kept(path, lambda: made), made)
    assert "cannot be read" in caplog.text and path.read_bytes() == whole


def make_slowly(path, made):
    def make():
        made.put(1)
        time.sleep(0.3)
        return {"x": torch.ones(2)}

    assert torch.equal(kept(path, make)["x"], torch.ones(2))


def test_of_several_processes_one_makes_it(tmp_path):
    fork = multiprocessing.get_context("fork")
    made = fork.Queue()
    processes = [fork.Process(target=make_slowly, args=(tmp_path / "x.pt", made)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert made.get() == 1 and made.empty()
