"""Training runs from the configs to the pictures: what is left, resumed and refused."""

import json
import shlex

import lightning as L
import pytest
import torch
from matplotlib import image as mpimg
from omegaconf import OmegaConf

from sj_taid._internal.build import build
from sj_taid.data import Digits
from sj_taid.training import cli, run
from sj_taid.training.checkpoint import read_checkpoint
from sj_taid.training.config import argument, compose
from sj_taid.training.parts import complete
from sj_taid.training.train import train
from tests.training.conftest import CONF, TINY, UNMEASURED, exit_code, write_images

PICTURES = [
    f"{name}.png" for name in ("samples", "reconstructions", "parameters", "attention", "curves")
]


def options(group):
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@pytest.mark.slow
def test_train_command_leaves_everything_and_can_be_sampled(tmp_path, cache, sj_taid, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    arguments = [*TINY, "pictures=true", f"hydra.run.dir={folder}", f"cache_dir={cache}"]
    assert exit_code(tmp_path, "train", *arguments) == 0
    assert not (tmp_path / "stderr").read_text()  # nobody else's notes either
    said = (tmp_path / "stdout").read_text().splitlines()
    assert all(said)  # no progress bar, and no blank line in its place
    assert said[-3:] == [
        "Picture: run/samples.png",
        "Metrics: run/metrics.json",
        "Next:    sj-taid sample checkpoint=run",
    ]

    for name in PICTURES:
        assert mpimg.imread(folder / name).std() > 0, name
    metrics = json.loads((folder / run.METRICS).read_text())
    assert metrics["fad"] > 0 and metrics["reconstruction"] > 0
    assert metrics["epochs"] == 1 and metrics["command"].startswith("sj-taid train")
    assert list((folder / "tensorboard").glob("events*"))

    sj_taid("sample", f"checkpoint={folder}", "n=6", "seed=3")
    assert mpimg.imread(folder / "samples-seed3.png").std() > 0
    assert not list(tmp_path.glob("outputs")) and not list(tmp_path.glob("*.log"))


@pytest.fixture
def unmeasured(tiny):
    return lambda *overrides: tiny(*UNMEASURED, *overrides, tiny=False)


def test_train_with_a_scheduler_of_torch(unmeasured, tmp_path):
    scheduler = "{_target_: torch.optim.lr_scheduler.StepLR, _partial_: true, step_size: 1}"
    train(unmeasured(f"task.scheduler={scheduler}", "trainer.max_epochs=2"), tmp_path)
    (state,) = read_checkpoint(run.Run(tmp_path).checkpoint)["lr_schedulers"]
    assert state["_last_lr"] == [pytest.approx(1e-5)]


def test_train_for_a_time_and_keep_every_epoch(unmeasured, tmp_path):
    every = "{_target_: lightning.pytorch.callbacks.ModelCheckpoint, save_top_k: -1}"
    options = ["+trainer.max_time=00:00:00:02", f"+callbacks.every={every}"]
    metrics = train(unmeasured("trainer.max_epochs=1000", *options), tmp_path)
    assert 0 < metrics["epochs"] < 1000
    assert len([*tmp_path.rglob("*.ckpt")]) >= metrics["epochs"] + 1


def test_train_goes_on_within_the_epoch_that_max_steps_ended(unmeasured, tmp_path):
    steps = [unmeasured("trainer.max_epochs=3", f"+trainer.max_steps={n}") for n in (3, 6)]
    train(steps[0], tmp_path)
    assert train(steps[1], tmp_path)["epochs"] == 3
    assert read_checkpoint(run.Run(tmp_path).checkpoint)["global_step"] == 6


class LastStep(torch.nn.Module):
    """A decoder of one's own."""

    def __init__(self, T):
        super().__init__()
        self.T = T

    def forward(self, x_seq):
        return x_seq[-1]


def test_train_with_a_decoder_of_ones_own(tiny, tmp_path):
    name = f"{__name__}.LastStep"
    decoder = [f"decoder._target_={name}", "~decoder.kernel_size", "~decoder.squeeze"]
    train(tiny(*decoder, f"trust=[{name}]", "pictures=true"), tmp_path)
    assert (tmp_path / "samples.png").is_file() and not (tmp_path / "attention.png").exists()


#: a neuron, ALIF in two ways among them, for each image decoder
CHOICES = [
    *(f"neuron={name}" for name in options("neuron") if not name.startswith("alif")),
    "surrogate=atan neuron.min_v_threshold=0.05",
    "neuron.learn_tau=false trainer.precision=bf16-mixed",
]


@pytest.mark.slow
@pytest.mark.parametrize(("decoder", "choice"), [*zip(options("decoder"), CHOICES, strict=True)])
def test_train_every_choice(tiny, tmp_path, decoder, choice):
    chosen = [f"decoder={decoder}", *choice.split(), "pictures=true"]
    assert train(tiny(*chosen, "trainer.limit_train_batches=1"), tmp_path)["fad"] > 0
    assert {*PICTURES} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("name", options("model"))
def test_compose_every_model(tiny, name):
    cfg = tiny(f"model={name}", "dataset.image_size=64", tiny=False)
    assert build(OmegaConf.to_container(cfg.model, resolve=True)).image_size == 64


def test_compose_starts_fsvae_at_the_originals_neuron(tiny):
    cfg = tiny(tiny=False).neuron
    assert (cfg.init_tau, cfg.v_threshold, cfg.v_reset) == (pytest.approx(4 / 3), 0.2, 0.0)
    assert not cfg.decay_input and not cfg.detach_reset
    assert cfg.surrogate_function._target_.endswith("Rect")


def test_train_fetches_data_before_reading(unmeasured, tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(Digits, "prepare_data", lambda self: order.append("prepared"))
    load = Digits.load
    monkeypatch.setattr(Digits, "load", lambda self: order.append("loaded") or load(self))
    train(unmeasured(), tmp_path)
    assert order[:2] == ["prepared", "loaded"] and order.count("loaded") == 1


def test_train_repeats_with_the_same_seed(tiny, trained, tmp_path):
    first = run.Run(trained(*TINY)).metrics
    second, other = train(tiny(), tmp_path / "b"), train(tiny("seed=1"), tmp_path / "c")
    for key in ("fad", "reconstruction"):
        assert first[key] == second[key] != other[key]


def test_train_measures_the_same_after_a_kill_before_the_metrics(tiny, trained):
    longer = ["trainer.max_epochs=3", "trainer.limit_train_batches=null", "dataset.limit=300"]
    there = run.Run(trained(*TINY, *longer))
    before = there.metrics
    (there.folder / run.METRICS).unlink()
    after = train(tiny(*longer), there.folder)
    differ = [k for k, v in before.items() if isinstance(v, float) and after[k] != v]
    assert differ in ([], ["training_seconds"])


class Stop(L.Callback):
    """Ends a long run in its third epoch."""

    def on_train_batch_end(self, trainer, *_):
        if trainer.current_epoch == 2 and trainer.max_epochs == 500:
            raise SystemExit("stopped")


@pytest.mark.slow
def test_interrupted_run_resumes_in_its_folder_with_its_choices(
    tiny, sj_taid, tmp_path, cache, capsys, monkeypatch
):
    start = ["neuron=lif", "neuron_start.calibrate=0.1", "neuron_start.v_threshold=4.0"]
    place = tmp_path / "sweep"
    place.mkdir()
    monkeypatch.chdir(place)
    there = run.Run(place / "one's größe, lr=0 #2")  # not as a sweep names it
    with pytest.raises(SystemExit, match="Stopped") as stopped:
        sj_taid(
            "train", *TINY, *start, "trainer.max_epochs=500", f"cache_dir={cache}",
            *shlex.split(argument("hydra.run.dir", there.folder)),
            f"+callbacks.stop._target_={__name__}.Stop", f"trust=[{__name__}.Stop]",
        )  # fmt: skip
    before = torch.load(there.checkpoint, weights_only=True)
    assert before["epoch"] == 1 and not there.is_finished
    again = shlex.split(str(stopped.value).splitlines()[0].partition("sj-taid ")[2])
    again.append(f"trust=[{__name__}.Stop]")
    with pytest.raises(SystemExit, match="must be at least the 2 epochs that are trained"):
        sj_taid(*again, "trainer.max_epochs=1")
    assert there.config.trainer.max_epochs == 500

    sj_taid(*again, "trainer.max_epochs=4")
    metrics = there.metrics
    assert metrics["epochs"] == 4 and metrics["choices"]["neuron"] == "lif"
    assert metrics["command"].count("trainer.max_epochs") == 1
    assert metrics["training_seconds"] > before["callbacks"]["Stopwatch"]["time_elapsed"]["train"]
    resumed = torch.load(there.checkpoint, weights_only=True)
    history, earlier = (saved["callbacks"]["History"] for saved in (resumed, before))
    assert len(history["neurons"]) == 5 and len(history["epochs"]) == 4
    assert history["epochs"][:2] == earlier["epochs"] and resumed["global_step"] == 2 * 4
    assert [path.name for path in place.iterdir()] == [there.folder.name]

    capsys.readouterr()
    sj_taid(*again)
    assert "finished already" in capsys.readouterr().out and there.metrics == metrics


def test_damaged_checkpoint_is_refused_before_anything_is_written(trained, unmeasured):
    there = run.Run(trained(*UNMEASURED))
    there.checkpoint.write_bytes(b"PK half a checkpoint")
    metrics = there.metrics
    with pytest.raises(ValueError, match=r"last\.ckpt is not a whole checkpoint"):
        train(unmeasured("trainer.max_epochs=2"), there.folder)
    assert there.metrics == metrics and there.config.trainer.max_epochs == 1


CLASSIFIER = "task=classification model=classifier_small"


def counted(*overrides):
    """A config that knows how many classes its data have."""
    cfg = compose("train", overrides)
    complete(cfg, build(OmegaConf.to_container(cfg.dataset, resolve=True)))
    return cfg


def test_classes_are_counted_for_all_that_learn_from_labels(tmp_path):
    for name in ("cat", "dog"):
        write_images(tmp_path / name, 1)
    images = ["dataset=image_folder", f"dataset.root={tmp_path}"]
    cfg = counted(*images, "feature_loss=classifier")
    assert cfg.feature_loss.classes == 2 and cfg.dataset.num_workers > 0
    # Data that do not say how many they have leave it to the model.
    cfg = counted(*CLASSIFIER.split(), "dataset.classes=null", "model.classes=7")
    assert (cfg.dataset.classes, cfg.model.classes) == (None, 7)
    flat = [*CLASSIFIER.split(), images[0], f"dataset.root={tmp_path / 'cat'}"]
    with pytest.raises(ValueError, match="a classifier needs classes, but the data have none; put"):
        counted(*flat)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective=fadd", "objective=fadd is none of reconstruction"),
        ("pictures=maybe", "^pictures: input should be a valid boolean, but it is 'maybe'"),
        ("compile=maybe", "^compile: input should be a valid boolean; .* an object, but it is"),
        ("~metric compile={mode:banana}", "^compile=.* is not .*Unrecognized mode="),
        ("~metric compile={banana:1}", "^compile=.* is not .* argument 'banana'"),
        ("accelerate=null", "^accelerate: input should be a valid boolean, but it is None"),
        ("optimizer.lr=1e30", r"^optimizer\.lr: input should be less than or equal to 1000"),
        ("optimizer.lr=inf", r"^optimizer\.lr: input should be a finite number, but it is inf"),
        ("trainer.gradient_clip_val=-1", r"^trainer\.gradient_clip_val: .* greater than or equal"),
        ("trainer.limit_test_batches=0", r"^trainer\.limit_test_batches: .* greater than 0"),
        ("trainer.max_epochs=null", r"^trainer\.max_epochs: input should be a valid integer"),
        (
            "dataset=image_folder dataset.root=",
            r"^dataset\.root: .* at least 1 char.*, but it is ''",
        ),
        ("dataset.seed=-1", r"^dataset\.seed: input should be greater than or equal to 0"),
        ("dataset.erase=1.5", r"^dataset\.erase: input should be less than or equal to 1"),
        ("dataset.classes=10.0", r"^dataset\.classes: input should be a valid integer, .* is 10.0"),
        ("metric.autoencoder.seed=-1", r"^metric: autoencoder\.seed: input should be greater"),
        ("model.T=abc", r"^model\.T: input should be a valid integer, but it is 'abc'"),
        ("model.hidden_channels=0", "^model: hidden_channels must be an integer >= 1, but it is 0"),
        ("model.image_decoder=taid", r"^model\.image_decoder: an object, by its _target_, but"),
        ("model.chroma_weight=1", "^model: chroma_weight=1 is for images of 3 channels"),
        ("neuron_start.calibrate=2", r"^neuron_start\.calibrate: input should be less than 1"),
        ("surrogate=atan surrogate.alpha=-1", r"^surrogate\.alpha: input should be greater than 0"),
        ("task.scheduler=foo", r"^task\.scheduler: an object, by its _target_, but it is 'foo'"),
        ("+optimizer.betas=[0.9,b]", r"^optimizer\.betas: input should be a valid number, but"),
        (
            "+callbacks.progress_bar.refresh_rate=x",
            r"^callbacks\.progress_bar\.refresh_rate: input",
        ),
        ("~metric ~logger trainer.precision=bf16-true", "bf16-true has no 32-bit"),
        ("+trainer.plugins=[]", r"^trainer\.plugins is set by the run; leave it out"),
        (f"{CLASSIFIER} model.classes=3", r"^model\.classes=3, but dataset\.classes is 10; leave"),
        (f"{CLASSIFIER} decoder=taid", "makes no images, which decoder= is for; leave it out"),
        ("task=classification", "FSVAE lacks classes; choose another"),
        ("task=generation model=classifier_small", "Classifier lacks training_loss, sample; "),
        ("loss=tet", "^loss= is for task=classification; add that, or leave loss= out"),
        (f"feature_loss=classifier {CLASSIFIER}", "^feature_loss= is for task=generation"),
        (
            "feature_loss=classifier dataset.classes=null",
            r"^feature_loss\.classes: input should be",
        ),
        (
            "dataset=nmnist",
            r"takes ImageData, but dataset=nmnist is Recordings; for recordings add",
        ),
        (
            "+callbacks.swa._target_=lightning.pytorch.callbacks.StochasticWeightAveraging",
            "other weights than the saved ones; take WeightAveraging",
        ),
    ],
)
def test_train_names_what_is_expected(cache, tmp_path, override, message):
    cfg = compose("train", [f"cache_dir={cache}", "model=fsvae_small", *override.split()])
    with pytest.raises(ValueError, match=message):
        train(cfg, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    "choices",
    [
        "model=fsvae_small neuron=lif decoder=fixed feature_loss=classifier optimizer=adam",
        "task=classification loss=cross_entropy optimizer=sgd surrogate=rectangle logger=csv",
        "task=classification dataset=image_folder dataset.root=images neuron=alif_channel",
    ],
)
def test_train_refuses_nonsense_wherever_it_is(tmp_path, monkeypatch, choices):
    """In every key, so also in those to come: none is named here."""

    def start(*_):
        pytest.fail(f"{key}={nonsense} is taken")

    monkeypatch.setattr("sj_taid.training.train.prepare_start", start)
    monkeypatch.chdir(tmp_path)
    for image in ("cat", "dog"):
        write_images(tmp_path / "images" / image, 10)
    composed = compose("train", choices.split())
    leaves = run.flatten(OmegaConf.to_container(composed))
    groups = {path.name for path in CONF.iterdir()}  # which Hydra keeps from values
    nonsense = {"x": [{"y": None}]}
    keys = {key for key in leaves if not key.endswith(("_target_", "_partial_"))}
    for key in keys - groups - {"trust", "compile"}:
        cfg = composed.copy()
        OmegaConf.set_struct(cfg, False)
        OmegaConf.update(cfg, key, nonsense, merge=False)
        with pytest.raises(cli.USER_ERRORS) as refused:
            train(cfg, tmp_path / "run")
        name = key.rpartition(".")[2]
        assert name in str(refused.value) or "${" in str(leaves[key]), (key, refused.value)
        assert not (tmp_path / "run").exists()
