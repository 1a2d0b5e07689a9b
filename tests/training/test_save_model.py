"""A run's model as a folder: it is the run's, whatever was its start, and others' files stay."""

import shutil

import pytest
import torch

from sj_taid import ALIFNode, create_model
from sj_taid.calibration import fixed_thresholds
from sj_taid.pretrained import read_config, save_model
from sj_taid.training import Run, load_model
from tests.training.conftest import TINY, TINY_CLASSIFICATION, assert_same_weights, fit
from tests.training.test_run import FOREIGN, MINE


@pytest.fixture
def classifier(trained):
    """The folder of a finished run."""
    return trained("neuron.backend=torch", "dataset.limit=40", *TINY_CLASSIFICATION)


def test_save_model_of_a_generator(tmp_path):
    fit(tmp_path / "run", *TINY)
    save_model(tmp_path / "run", tmp_path / "saved" / "tiny-1")
    here = create_model(tmp_path / "saved" / "tiny-1", pretrained=True)
    assert_same_weights(tmp_path / "run", here.state_dict())
    assert read_config(tmp_path / "saved" / "tiny-1")["metrics"] == Run(tmp_path / "run").metrics
    state = torch.random.get_rng_state()
    drawn = here.sample(3)
    torch.random.set_rng_state(state)
    assert torch.equal(drawn, load_model(tmp_path / "run").sample(3))


def test_save_model_leaves_the_backend_out_and_half_keeps_norms_and_neurons(classifier, tmp_path):
    save_model(classifier, tmp_path)
    exact, size = create_model(tmp_path, True), (tmp_path / "model.safetensors").stat().st_size
    for model in (exact, load_model(classifier)):
        assert {m.backend for m in model.modules() if isinstance(m, ALIFNode)} == {"auto"}
    save_model(classifier, tmp_path, half=True)  # over the other
    half = create_model(tmp_path, pretrained=True)
    assert (tmp_path / "model.safetensors").stat().st_size < 0.7 * size
    for key, value in exact.state_dict().items():
        stored = half.state_dict()[key]
        assert stored.dtype == value.dtype
        assert torch.equal(stored, value.half().to(value.dtype) if value.dim() > 1 else value), key


def test_save_model_of_fixed_thresholds_starts_a_training(tmp_path):
    job = [*TINY_CLASSIFICATION, "neuron=lif"]
    fit(tmp_path / "run", *job, "neuron_start.calibrate=0.1")
    folder = tmp_path / "saved"
    save_model(tmp_path / "run", folder)
    trained = fixed_thresholds(load_model(tmp_path / "run"))
    assert fixed_thresholds(create_model(folder, pretrained=True)) == trained
    untrained = fixed_thresholds(create_model(folder))
    assert trained.keys() == untrained.keys() and trained != untrained
    again = [*job, f"start_from={folder}", "optimizer.lr=0.0", "task.scheduler.T_max=2"]
    digest = read_config(folder)["sha256"]
    started = fit(tmp_path / "again", *again)
    shutil.rmtree(folder)  # a resumed run needs it no more
    resumed = fit(tmp_path / "again", *again, "trainer.max_epochs=2")
    assert started["start_from_sha256"] == resumed["start_from_sha256"] == digest
    assert resumed["epochs"] == 2
    model = load_model(tmp_path / "again")
    assert fixed_thresholds(model) == trained
    expected = dict(load_model(tmp_path / "run").named_parameters())
    assert all(torch.equal(value, expected[name]) for name, value in model.named_parameters())


def test_save_model_has_later_evaluations(classifier, tmp_path):
    measured = {"metrics": {"accuracy": 0.5}, "protocol": {"accuracy": "by hand"}}
    Run(classifier).save_evaluation(measured)
    save_model(classifier, tmp_path)
    assert read_config(tmp_path)["metrics"]["accuracy"] == 0.5


def test_save_model_of_the_best_epoch(classifier, tmp_path):
    best = Run(classifier).best
    save_model(best, tmp_path / "best")
    assert_same_weights(best, create_model(tmp_path / "best", True).state_dict())
    other = shutil.copy(best, best.with_name("epoch=0.ckpt"))
    with pytest.raises(ValueError, match=r"epoch=0\.ckpt was not tested; save the run, or its"):
        save_model(other, tmp_path / "other")


@pytest.mark.parametrize(
    "config",
    [
        None,
        '{"sha256": "00", "metrics": {"versions": {"torch": "2.8"}}}',
        '{"metrics": {"versions": {"sj-taid": "1.0"}}}',  # it may use this library
    ],
)
def test_save_model_leaves_the_models_of_other_programs_alone(classifier, tmp_path, config):
    files = {"model.safetensors": "weights", "README.md": "# sj-taid", "config.json": config}
    for name, text in files.items():
        if text is not None:
            (tmp_path / name).write_text(text, "latin-1")
    with pytest.raises(FileExistsError, match=f"{tmp_path} holds files that are no earlier"):
        save_model(classifier, tmp_path)
    left = {path.name: path.read_text("latin-1") for path in tmp_path.iterdir()}
    assert left == {name: text for name, text in files.items() if text is not None}


def test_save_model_refuses_custom_classes_and_unfinished_runs(classifier, trained, tmp_path):
    with pytest.raises(ValueError, match=r"config names .*MyLIF.*: no public class"):
        save_model(trained(*FOREIGN, f"trust=[{MINE}]"), tmp_path / "tiny")
    (classifier / "metrics.json").unlink()
    with pytest.raises(FileNotFoundError, match="finish the run first"):
        save_model(classifier, tmp_path / "tiny")
    assert not (tmp_path / "tiny").exists()
