"""Inception and its score: closed forms, torchmetrics' own, two processes, wrong weights."""

import math
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torchmetrics.wrappers import FeatureShare

from sj_taid.metric import FrechetDistance, Inception, InceptionScore, Precision, Recall
from tests.metric.pixels import CLASSES, Classifying, Pixels


def score(images):
    metric = InceptionScore(Classifying(), splits=1)
    for part in images.split(7):
        metric.update(part)
    return float(metric.compute())


def of_class(labels, confidence=1.0):
    """Images that the classifier finds to be ``labels`` with probability ``confidence``."""
    p = torch.full((len(labels), CLASSES), (1 - confidence) / (CLASSES - 1))
    p[torch.arange(len(labels)), labels] = confidence
    return p.log().clamp_min(-60).view(-1, 1, 2, 2)


def random_images(n=60, seed=0):
    return torch.randn(n, 1, 2, 2, generator=torch.Generator().manual_seed(seed))


def test_inception_score_of_known_classes():
    even = torch.arange(40) % CLASSES
    assert score(of_class(even)) == pytest.approx(CLASSES, rel=1e-6)
    assert score(of_class(even * 0)) == pytest.approx(1, rel=1e-6)
    assert score(of_class(even % 2)) == pytest.approx(2, rel=1e-6)
    # KL of every image to the even marginal is log 4 minus its entropy.
    p, rest = 0.7, 0.1
    entropy = -(p * math.log(p) + 3 * rest * math.log(rest))
    expected = math.exp(math.log(CLASSES) - entropy)
    assert score(of_class(even, p)) == pytest.approx(expected, rel=1e-6)


def metrics(rank=0, processes=1):
    """The metrics of images, of which each process sees its share; one network serves both."""
    features = Classifying()
    kinds = {"fid": FrechetDistance, "precision": Precision, "recall": Recall}
    comparing = {name: kind(features) for name, kind in kinds.items()}
    both = FeatureShare(comparing | {"score": InceptionScore(features, splits=1)})
    # Unequal shares, in as many batches: torchmetrics gathers the score's one by one.
    for part in random_images().split([5, 10, 5, 40])[rank::processes]:
        both.update(part, real=True)
    for part in random_images(seed=1).split([10, 20, 10, 20])[rank::processes]:
        both.update(part, real=False)
    (features,) = (m for m in both["fid"].modules() if isinstance(m, Pixels))
    assert features.calls == len(range(rank, 4, processes)) * 2
    return both


def one_of_two(rank, folder):
    address = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    try:
        values = metrics(rank, 2).compute()
        dist.barrier()
    finally:
        dist.destroy_process_group()
    return values


def other_process(index, folder):
    torch.save(one_of_two(1, folder), f"{folder}/other.pt")


@pytest.mark.slow
def test_metrics_of_two_processes_equal_those_of_one(tmp_path):
    other = mp.start_processes(other_process, (tmp_path,), join=False, start_method="forkserver")
    first = one_of_two(0, tmp_path)
    other.join()
    second = torch.load(tmp_path / "other.pt")
    values = metrics().compute()
    assert set(values) == {"fid", "precision", "recall", "score"}
    assert 0.5 < values["precision"] < 1 and 0.5 < values["recall"] < 1
    for name, value in values.items():
        assert float(first[name]) == pytest.approx(float(value), rel=1e-6)
        assert float(second[name]) == pytest.approx(float(value), rel=1e-6)


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
    features = inception(random_images(2).tanh())
    assert features.shape == (2, 2048) and features.isfinite().all()
    with pytest.raises(ValueError, match=r"C = 1 or 3, but got \[2, 2, 4, 4\]"):
        inception(torch.zeros(2, 2, 4, 4))
    expected = state["fc.weight"] @ features[0]
    torch.testing.assert_close(inception.classifier(features)[0], expected)
    assert InceptionScore(inception).needed == 1008
    assert "InceptionV3 (weights " in FrechetDistance(inception).protocol
