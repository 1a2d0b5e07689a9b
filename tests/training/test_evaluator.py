"""Evaluating samples: what is cached, and no disturbance of the global random state."""

import io
from types import SimpleNamespace

import pytest
import torch

from sj_taid.data import Digits
from sj_taid.metric import FrechetDistance
from sj_taid.training.cache import cache_path, cached
from sj_taid.training.evaluator import Evaluator
from tests.data.made_up import ready
from tests.training.conftest import Network

NAMES = {"fad", "fad_precision", "fad_recall"}


class Noise(torch.nn.Module):
    """Draws images from the global random generator, as a model does."""

    def __init__(self, size=8):
        super().__init__()
        self.size = size
        self.scale = torch.nn.Parameter(torch.ones(()))

    def sample(self, n):
        return self.scale * torch.rand(n, 1, self.size, self.size)


def digits(**options):
    return ready(Digits, **{"name": "digits", "image_size": 8, "batch_size": 32} | options)


@pytest.fixture
def evaluator(tmp_path):
    """With an empty cache."""
    autoencoder = {"hidden_channels": 4, "latent_channels": 3, "epochs": 1, "batch_size": 32}
    return Evaluator(100, autoencoder | {"seed": 0}, cache_dir=tmp_path, accelerator="cpu")


def states(evaluator, data):
    """The weights of FAD's autoencoder, and the statistics of the test images."""
    ((metrics, _),) = evaluator.prepare(data)
    fad = metrics["fad"]
    real = {name: state for name, state in fad.metric_state.items() if "real" in name}
    return dict(fad.inception.state_dict()) | real


def assert_equal(first, second):
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_evaluator_makes_autoencoder_and_statistics_once(evaluator, tmp_path, monkeypatch, caplog):
    data = digits()
    with caplog.at_level("INFO"):
        first = states(evaluator, data)
    assert "its error is 0." in caplog.text
    assert first["real_features_num_samples"] == len(data.test_set)
    files = set(evaluator.cache_dir.glob("*.pt"))
    assert {file.name.split("-")[0] for file in files} == {"autoencoder", "statistics"}
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", None)
        patch.setattr(data, "test_dataloader", None)
        assert_equal(states(evaluator, data), first)

    evaluator.autoencoder["latent_channels"] = 4
    states(evaluator, data)
    assert len(set(evaluator.cache_dir.glob("*.pt"))) == 4
    evaluator.autoencoder["latent_channels"] = 3
    states(evaluator, digits(image_size=16))  # other images
    assert len(set(evaluator.cache_dir.glob("*.pt"))) == 6
    # Another run trains the same autoencoder.
    evaluator.cache_dir = tmp_path / "other"
    data.batch_size, data.augment, data.erase, data.mixup = 10, "flip", 0.5, 0.5
    torch.manual_seed(1)
    torch.testing.assert_close(states(evaluator, data), first)


def pickled(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


class Code:
    """Runs when it is unpickled."""

    def __reduce__(self):
        return pytest.fail, ("a pickle's code ran",)


DAMAGES = {
    "truncated": lambda whole: whole[: len(whole) // 2],
    "code": lambda whole: pickled({"x": Code()}),
    "dictionary": lambda whole: pickled({"x": torch.zeros(2)}),
    "renamed": lambda whole: pickled({"name": "y.pt", "content": {"x": torch.zeros(2)}}),
}


@pytest.mark.parametrize(
    ("samples", "limit", "left_out", "said"),
    [
        (100, 100, set(), ""),
        (99, None, {"fad_precision", "fad_recall"}, "Precision and recall of 99 images"),
        (100, 4, {"fad_precision", "fad_recall"}, "Precision and recall of 4 images"),
        (3, None, NAMES, "FAD needs 4 samples and as many test images, but there are 3 and 359"),
        (100, 3, NAMES, "FAD needs 4 samples and as many test images, but there are 100 and 3"),
    ],
)
def test_what_needs_more_images_is_left_out_with_a_warning(
    evaluator, caplog, samples, limit, left_out, said
):
    evaluator.samples = samples
    values = evaluator.evaluate_samples(Noise(), digits(limit=limit))
    assert NAMES - values.keys() == left_out and evaluator.needed == 4
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warned) == bool(said) and all(said in text for text in warned)


@pytest.mark.parametrize(("latents", "smaller"), [(17, True), (16, False)])
def test_a_smaller_metric_is_named_only_where_it_needs_less(evaluator, caplog, latents, smaller):
    evaluator.samples, evaluator.autoencoder["latent_channels"] = 2, latents
    evaluator.prepare(digits())
    assert f"FAD needs {latents + 1} samples" in caplog.text
    assert ("metric=small" in caplog.text) == smaller


@pytest.mark.parametrize(("spread", "alike"), [(1e-3, True), (0.1, False)])
def test_samples_that_are_all_alike_are_told_and_have_no_precision(
    evaluator, caplog, spread, alike
):
    model = Noise()
    model.scale.data.fill_(spread)
    values = evaluator.evaluate_samples(model, digits())
    assert ("The samples are all alike" in caplog.text) == alike
    for names in (values, values["protocol"]):
        assert "fad" in names and len({"fad_precision", "fad_recall"} & {*names}) == 2 * (not alike)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_cache_is_named_and_made_again(tmp_path, caplog, damage):
    path, made = tmp_path / "x.pt", []

    def make():
        made.append(1)
        return {"x": torch.ones(2)}

    cached(path, make)
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    for _ in range(2):
        assert_equal(cached(path, make), {"x": torch.ones(2)})
    (warning,) = caplog.messages
    kind = "a renamed file" if damage == "renamed" else "damaged"
    assert f"{path} is {kind}" in warning and len(made) == 2


def test_a_name_from_elsewhere_stays_in_the_cache(tmp_path):
    data = SimpleNamespace(name="../../photos of 2024")
    path = cache_path(tmp_path, "autoencoder", data)
    assert path.parent == tmp_path and path.name.startswith("autoencoder-..-..-photos-of-2024-")


def test_evaluate_samples_is_reproducible_and_leaves_the_random_state_alone(evaluator):
    data, model = digits(), Noise()
    state = torch.random.get_rng_state()
    first = evaluator.evaluate_samples(model, data)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert set(first) == NAMES | {"sample_variance", "protocol"} and set(first["protocol"]) == NAMES
    assert first["protocol"]["fad"].endswith("100 samples against 359 test images at 8x8")
    assert 0 <= first["fad_recall"] <= first["fad_precision"] <= 1
    assert evaluator.evaluate_samples(model, data) == first
    evaluator.seed = 1
    assert evaluator.evaluate_samples(model, data)["fad"] != first["fad"]
    evaluator.autoencoder["seed"] = 2  # the protocol names the autoencoder
    assert evaluator.evaluate_samples(model, data)["protocol"] != first["protocol"]


def test_evaluate_samples_checks_each_metric_before_a_training(evaluator, monkeypatch):
    data = digits()
    monkeypatch.setattr("sj_taid.training.evaluator.Inception", Network)
    evaluator.inception_weights = "weights.pth"
    evaluator.samples = Network.num_features
    with pytest.raises(
        ValueError, match=r"fid.*: at least 5 images are needed, but metric\.samples is 4"
    ):
        evaluator.prepare(data)
    evaluator.samples = 100
    data.test_set = data.test_set.subset(range(4))
    with pytest.raises(ValueError, match=r"fid.* test images is 4"):
        evaluator.prepare(data)
    monkeypatch.setattr("sj_taid.training.evaluator.fit_once", lambda *_, **__: pytest.fail())
    evaluator.inception_weights, evaluator.samples = None, 3
    with pytest.raises(  # a validation by FAD was asked for
        ValueError, match=r"^FAD: at least 4 images are needed, but metric\.samples is 3"
    ):
        evaluator.prepare(digits(validation=0.1).test_on_validation())


def test_evaluate_samples_runs_a_network_once_for_all_its_metrics(evaluator, monkeypatch):
    network = Network("weights.pth")
    monkeypatch.setattr("sj_taid.training.evaluator.Inception", lambda weights: network)
    evaluator.inception_weights, data = "weights.pth", digits()
    values = evaluator.evaluate_samples(Noise(), data)
    assert network.calls == len(data.test_dataloader()) + 1
    assert values["fid"] > 0 and 1 <= values["inception_score"] <= 4
    how = values["protocol"]
    assert how["fid"].startswith(FrechetDistance(network).protocol)
    assert how["fid"].endswith("100 samples against 359 test images at 8x8")
    assert how["inception_score"].endswith("100 samples")
    assert evaluator.evaluate_samples(Noise(), data) == values  # the test images' were cached
    assert network.calls == len(data.test_dataloader()) + 2
    assert "fid" not in evaluator.fad_alone().evaluate_samples(Noise(), data)


def test_evaluate_samples_measures_fad_as_published_too(evaluator, monkeypatch, tmp_path):
    class Published(FrechetDistance):
        batch_size, batches = 256, 1

        def __init__(self, folder, name, **options):
            assert (folder, name) == (tmp_path, "fashion")
            super().__init__(Network("weights.pth"), reset_real_features=False, **options)
            self.update(torch.rand(9, 1, 32, 32), real=True)

        def update(self, images, real):
            assert real or len(images) == self.batch_size
            super().update(images[..., :8, :8], real)

    monkeypatch.setattr("sj_taid.training.evaluator.PublishedFrechetAutoencoderDistance", Published)
    evaluator.published_autoencoders = tmp_path
    data = digits(image_size=32, limit=40)
    data.source = "FashionMNIST"
    values = evaluator.evaluate_samples(Noise(32), data)
    assert values["fad_published"] > 0 and values["fad"] > 0
    assert values["protocol"]["fad_published"].endswith(
        "256 samples against the published statistics of the test images"
    )
    small = digits()
    small.source = "FashionMNIST"
    for other in (small, digits(image_size=32)):
        with pytest.raises(ValueError, match=r"MNIST and FashionMNIST at 32x32, but .*=false"):
            evaluator.prepare(other)
