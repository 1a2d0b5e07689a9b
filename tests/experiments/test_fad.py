"""FAD's autoencoder: trained once, cached, and never a disturbance of the global random state."""

import torch
from hydra.utils import instantiate

from experiments import fad


class Noise(torch.nn.Module):
    """Draws images from the global random generator, as a model does."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def sample(self, n):
        return self.scale * torch.rand(n, 1, 8, 8)


def test_autoencoder_is_trained_once_and_cached(tiny, tmp_path, monkeypatch):
    cfg = tiny()
    data = instantiate(cfg.dataset)
    trained = []
    original = fad._train
    monkeypatch.setattr(fad, "_train", lambda *a: trained.append(1) or original(*a))

    first = fad.fad_metric(cfg.fad, data, tmp_path, "cpu")
    second = fad.fad_metric(cfg.fad, data, tmp_path, "cpu")
    assert len(trained) == 1
    for a, b in zip(
        first.inception.state_dict().values(), second.inception.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b)

    cfg.fad.latent_channels = 4
    fad.fad_metric(cfg.fad, data, tmp_path, "cpu")
    assert len(trained) == 2 and len(list(tmp_path.glob("*.pt"))) == 2


def test_the_autoencoder_does_not_depend_on_the_run(tiny, tmp_path):
    cfg = tiny()
    states = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        metric = fad.fad_metric(cfg.fad, instantiate(cfg.dataset), tmp_path / str(seed), "cpu")
        states.append(metric.inception.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_a_damaged_cache_is_made_anew(tiny, tmp_path, caplog):
    cfg = tiny()
    data = instantiate(cfg.dataset)
    fad.fad_metric(cfg.fad, data, tmp_path, "cpu")
    (cached,) = tmp_path.glob("*.pt")
    whole = cached.read_bytes()
    cached.write_bytes(whole[:100])
    fad.fad_metric(cfg.fad, data, tmp_path, "cpu")
    assert "cannot be read" in caplog.text
    assert len(cached.read_bytes()) == len(whole)


def test_the_figure_is_reproducible_and_leaves_the_random_state_alone(tiny, tmp_path):
    cfg = tiny()
    metric = fad.fad_metric(cfg.fad, instantiate(cfg.dataset), tmp_path, "cpu")
    model = Noise()
    state = torch.random.get_rng_state()
    first = fad.fad_of(model, metric, samples=40, seed=5)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert fad.fad_of(model, metric, samples=40, seed=5) == first
    assert fad.fad_of(model, metric, samples=40, seed=6) != first
