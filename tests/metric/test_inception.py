"""Inception and its score: closed forms, and wrong weights."""

import pickle
import sys
from pathlib import Path

import pytest
import torch

from sj_taid.metric import FrechetDistance, Inception, InceptionScore
from tests.metric.pixels import CLASSES, Pixels, classifier


class Classifying(Pixels):
    """With a classifier, as Inception."""

    def __init__(self):
        super().__init__()
        self.classifier = classifier()


def score(images):
    metric = InceptionScore(Classifying(), splits=1)
    for part in images.split(7):
        metric.update(part)
    return float(metric.compute())


def of_class(labels):
    return (60 * torch.eye(CLASSES)[labels] - 60).view(-1, 1, 2, 2)  # logits


def test_inception_score_of_known_classes():
    even = torch.arange(40) % CLASSES
    assert score(of_class(even)) == pytest.approx(CLASSES, rel=1e-6)
    assert score(of_class(even * 0)) == pytest.approx(1, rel=1e-6)
    assert score(of_class(even % 2)) == pytest.approx(2, rel=1e-6)


def test_inception_without_torch_fidelity(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ModuleNotFoundError, match="pip install torch-fidelity"):
        Inception("weights.pth")


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("touched"),)


@pytest.fixture
def fidelity():
    """torch-fidelity's network, where it is installed."""
    return pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")


@pytest.mark.usefixtures("fidelity")
def test_inception_says_where_weights_go_and_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights.pth"
    with pytest.raises(FileNotFoundError, match=r"no Inception weights at .*get https://.*\.pth"):
        Inception(path)
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(pickle.UnpicklingError):
        Inception(path)
    assert not Path("touched").exists()


def test_inception_with_made_up_weights(fidelity, tmp_path, monkeypatch):
    network = fidelity.FeatureExtractorInceptionV3
    with monkeypatch.context() as patch:
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *a, **k: {})
        patch.setattr(network, "load_state_dict", lambda *a: None)
        state = network("inception-v3-compat", ["2048"]).state_dict()
    path = tmp_path / "weights-inception-0123.pth"
    torch.save(state, path)
    random_state = torch.random.get_rng_state()
    inception = Inception(path).train()
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert not any(m.training for m in inception.modules())
    features = inception(torch.rand(2, 1, 2, 2))
    assert features.shape == (2, 2048) and features.isfinite().all()
    with pytest.raises(ValueError, match=r"C = 1 or 3, but got \[2, 2, 4, 4\]"):
        inception(torch.zeros(2, 2, 4, 4))
    expected = state["fc.weight"] @ features[0]
    torch.testing.assert_close(inception.classifier(features)[0], expected)
    assert InceptionScore(inception).needed == 1008
    assert "InceptionV3 (weights " in FrechetDistance(inception).protocol
