"""Export of a finished run: the model is the run's, its card complete, errors name a remedy."""

import shutil

import pytest
import torch

from sj_taid import ALIFNode, create_model, pretrained
from sj_taid.thresholds import fixed_thresholds
from sj_taid.training import Run, load_model
from sj_taid.training.config import compose
from sj_taid.training.export import export
from sj_taid.training.train import train
from tests.training.conftest import TINY_CLASSIFICATION, assert_same_weights
from tests.training.test_run import MyLIF

CLASSIFIER = ["neuron.backend=torch", *TINY_CLASSIFICATION]


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """The folders of a finished FSVAE and of a finished classifier."""
    folder = tmp_path_factory.mktemp("runs")
    train(tiny(), folder / "fsvae", command="sj-taid train x=1", overrides=["x=1"])
    cfg = compose("train", [*CLASSIFIER, "dataset.limit=40"])
    train(cfg, folder / "classifier", command="", overrides=[])
    return folder


@pytest.mark.slow
def test_export_command(runs, tmp_path, sj_taid, capsys):
    sj_taid("export", str(runs / "fsvae"), "--name", "tiny-1", "--out", str(tmp_path))
    assert f"create_model('{tmp_path / 'tiny-1'}', pretrained=True)" in capsys.readouterr().out
    here, there = create_model(tmp_path / "tiny-1", pretrained=True), load_model(runs / "fsvae")
    assert_same_weights(runs / "fsvae", here.state_dict())
    state = torch.random.get_rng_state()
    drawn = here.sample(3)
    torch.random.set_rng_state(state)
    assert torch.equal(drawn, there.sample(3))


def test_export_config_and_card(runs, tmp_path):
    folder = export(runs / "fsvae", "tiny", tmp_path)
    metrics = Run(runs / "fsvae").metrics
    assert pretrained.read_config(folder)["metrics"] == metrics
    card = (folder / "README.md").read_text()
    for text in (
        "pipeline_tag: unconditional-image-generation\n",
        'create_model("tiny", pretrained=True)\nimages = model.sample(16)\n',
        "Trained by `sj-taid train x=1`.\n",
        f"| {metrics['fad']:.2f} | {metrics['protocol']['fad']} |",
        f"| {metrics['reconstruction']:.4f} | {metrics['protocol']['reconstruction']} |",
    ):
        assert text in card, text
    assert str(runs) not in card + (folder / "config.json").read_text()


def test_export_leaves_the_backend_out_and_half_keeps_norms_and_neurons(runs, tmp_path):
    exact = create_model(export(runs / "classifier", "tiny", tmp_path), pretrained=True)
    for model, backend in ((exact, "auto"), (load_model(runs / "classifier"), "torch")):
        assert {m.backend for m in model.modules() if isinstance(m, ALIFNode)} == {backend}
    size = (tmp_path / "tiny" / "model.safetensors").stat().st_size
    note = "rounded to float16; the metrics are of float32"
    assert note not in (tmp_path / "tiny" / "README.md").read_text()
    folder = export(runs / "classifier", "tiny", tmp_path, half=True)  # over the other
    assert note in (folder / "README.md").read_text()
    half = create_model(folder, pretrained=True)
    assert (folder / "model.safetensors").stat().st_size < 0.7 * size
    for key, value in exact.state_dict().items():
        stored = half.state_dict()[key]
        assert stored.dtype == value.dtype
        assert torch.equal(stored, value.half().to(value.dtype) if value.dim() > 1 else value), key


def test_export_of_fixed_thresholds(tmp_path):
    start = ["neuron=lif", "neuron_start.calibrate=0.1", "pictures=false"]
    train(compose("train", [*TINY_CLASSIFICATION, *start]), tmp_path / "run", command="")
    folder = export(tmp_path / "run", "tiny", tmp_path)
    trained = fixed_thresholds(load_model(tmp_path / "run"))
    assert fixed_thresholds(create_model(folder, pretrained=True)) == trained
    untrained = fixed_thresholds(create_model(folder))
    assert trained.keys() == untrained.keys() and trained != untrained
    again = [*TINY_CLASSIFICATION, "neuron=lif", f"start_from={folder}", "optimizer.lr=0.0"]
    again += ["task.scheduler.T_max=2"]
    digest = pretrained.read_config(folder)["sha256"]
    started = train(compose("train", again), tmp_path / "again", command="")
    shutil.rmtree(folder)  # a resumed run needs it no more
    resumed = train(compose("train", [*again, "trainer.max_epochs=2"]), tmp_path / "again")
    assert started["start_from_sha256"] == resumed["start_from_sha256"] == digest
    assert resumed["epochs"] == 2
    card = (export(tmp_path / "again", "further", tmp_path) / "README.md").read_text()
    assert f"The weights it started from have the SHA-256 `{digest}`." in card
    model = load_model(tmp_path / "again")
    assert fixed_thresholds(model) == trained
    expected = dict(load_model(tmp_path / "run").named_parameters())
    assert all(torch.equal(value, expected[name]) for name, value in model.named_parameters())


def test_export_of_later_evaluations(runs, tmp_path):
    run = Run(runs / "classifier")
    for digest, accuracy in ((run.checkpoint_sha256(), 0.5), ("another", 0.9)):
        measured = {"metrics": {"accuracy": accuracy}, "protocol": {"accuracy": "by hand"}}
        run.save_evaluation({"checkpoint_sha256": digest} | measured)
    card = (export(runs / "classifier", "tiny", tmp_path) / "README.md").read_text()
    assert "| 50.00 | by hand |" in card and "90.00" not in card


def test_export_of_the_best_epoch(tmp_path):
    folder = tmp_path / "run"
    metrics = train(compose("train", [*CLASSIFIER, "dataset.validation=0.1"]), folder, command="")
    card = (export(Run(folder).best, "best", tmp_path) / "README.md").read_text()
    best = metrics["accuracy_best_validation_epoch"]
    assert f"| accuracy, best validation epoch, % ↑ | {100 * best:.2f} |" in card
    assert "last epoch" not in card
    other = shutil.copy(Run(folder).checkpoint, Run(folder).best.with_name("epoch=0.ckpt"))
    with pytest.raises(ValueError, match=r"epoch=0\.ckpt was not tested; export the run, or its"):
        export(other, "other", tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        *(None, '"sj-taid"', "\xff"),
        '{"sha256": "00", "metrics": {"versions": {"torch": "2.8"}}}',
        '{"metrics": {"versions": {"sj-taid": "1.0"}}}',  # it may use this library
    ],
)
def test_export_leaves_the_models_of_other_programs_alone(runs, tmp_path, config):
    files = {"model.safetensors": "weights", "README.md": "# sj-taid", "config.json": config}
    for name, text in files.items():
        if text is not None:
            (tmp_path / name).write_text(text, "latin-1")
    with pytest.raises(FileExistsError, match=f"{tmp_path} holds files that are no earlier"):
        export(runs / "classifier", tmp_path.name, tmp_path.parent)
    left = {path.name: path.read_text("latin-1") for path in tmp_path.iterdir()}
    assert left == {name: text for name, text in files.items() if text is not None}


def test_export_errors(runs, tmp_path, sj_taid):
    mine = f"{MyLIF.__module__}.{MyLIF.__name__}"
    foreign = ["neuron=lif", f"neuron._target_={mine}", f"trust=[{mine}]"]
    train(compose("train", [*TINY_CLASSIFICATION, *foreign]), tmp_path / "run", command="")
    with pytest.raises(ValueError, match=r"could not build this model \(.*names .*MyLIF.*trust="):
        export(tmp_path / "run", "tiny", tmp_path)
    for name in ("../tiny", "a/tiny", "", ".", "..", "/"):
        with pytest.raises(ValueError, match="--name must be a folder's name, not a path"):
            export(tmp_path / "run", name, tmp_path / "below")
    assert not (tmp_path / "below").exists()
    Run(tmp_path / "run").folder.joinpath("metrics.json").unlink()
    with pytest.raises(SystemExit, match="finish the run first"):
        sj_taid("export", str(tmp_path / "run"), "--name", "tiny", "--out", str(tmp_path))
    assert not (tmp_path / "tiny").exists()
