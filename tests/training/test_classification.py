"""Classification from the configs to the pictures."""

from functools import partial
from unittest import mock

import pytest
import torch
from matplotlib import image as mpimg
from omegaconf import OmegaConf
from torch import nn

import sj_taid
from sj_taid._internal.build import build
from sj_taid.calibration import fixed_thresholds
from sj_taid.model import Classifier
from sj_taid.monitoring import tau_and_threshold
from sj_taid.training import run, sample
from sj_taid.training import train as training
from sj_taid.training.checkpoint import read_checkpoint
from sj_taid.training.classification import Classification
from sj_taid.training.config import compose
from tests.training.conftest import TINY_CLASSIFICATION, fit


class Learned(nn.MSELoss):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))


@pytest.mark.parametrize("lr_scale", [None, 10.0])
def test_configure_optimizers_takes_what_a_loss_learns(lr_scale):
    model, loss = Classifier(image_size=8, T=2, stages=[[4]], hidden=6), Learned()
    adam = partial(torch.optim.Adam, lr=1e-3)
    optimizer = Classification(model, adam, lr_scale=lr_scale, loss=loss).configure_optimizers()
    learned = [(p, group["lr"]) for group in optimizer.param_groups for p in group["params"]]
    assert len(learned) == len([*model.parameters()]) + 1
    assert [rate for parameter, rate in learned if parameter is loss.scale] == [1e-3]


@pytest.mark.slow
def test_train_leaves_everything(trained):
    folder = trained(*TINY_CLASSIFICATION, "pictures=true")
    metrics = run.Run(folder).metrics
    assert 0 <= metrics["accuracy"] <= 1 and metrics["loss"] > 0
    assert metrics["epochs"] == 1 and metrics["seed"] == 0
    assert run.Run(folder).config.objective in metrics
    for name in ("curves.png", "confusion.png", "parameters.png"):
        assert mpimg.imread(folder / name).std() > 0, name
    checkpoint = read_checkpoint(run.Run(folder).checkpoint)
    (epoch,) = checkpoint["callbacks"]["History"]["epochs"]
    assert {*epoch} == {"train/accuracy", "train/loss", "val/accuracy", "val/loss"}
    groups = checkpoint["optimizer_states"][0]["param_groups"]
    assert groups[0]["lr"] == pytest.approx(0, abs=1e-9)  # its schedule's end
    assert [(g["name"], g["initial_lr"]) for g in groups] == [("weights", 1e-3), ("neurons", 1e-2)]
    assert len(groups[1]["params"]) == 2 * 4
    with pytest.raises(ValueError, match="sample needs task=generation, but this is a Classifier"):
        sample.main(compose("sample", [f"checkpoint={folder}"]))


@pytest.mark.slow
def test_train_calibrates_a_new_run_alone(tmp_path):
    start = ["neuron=lif", "neuron_start.calibrate=0.1", "neuron_start.v_threshold=4.0"]
    # A schedule that is the same when it resumes.
    job = [*TINY_CLASSIFICATION, *start, "optimizer.lr=0.0", "task.scheduler.T_max=2"]
    thresholds = []
    with mock.patch.object(training, "calibrate", wraps=sj_taid.calibrate) as calibrate:
        for epochs in (1, 2):
            fit(tmp_path, *job, f"trainer.max_epochs={epochs}")
            thresholds.append(fixed_thresholds(run.load_model(tmp_path)))
    calibrate.assert_called_once_with(mock.ANY, mock.ANY, rate=0.1)
    assert thresholds[0] == thresholds[1] and 4.0 not in thresholds[0].values()


def test_train_names_thresholds_at_their_bound(tmp_path):
    job = [*TINY_CLASSIFICATION, "trainer.max_epochs=0", "neuron.min_v_threshold=0.5"]
    with pytest.warns(UserWarning, match=r"^layers .*: threshold at its lower bound\. "):
        fit(tmp_path, *job)


@pytest.mark.parametrize("name", ["alif", "plif", "lif"])
def test_neurons_start_alike_and_at_whole_numbers(name):
    def start(*choices):
        cfg = compose("train", ["task=classification", f"neuron={name}", *choices])
        node = build(OmegaConf.to_container(cfg.neuron, resolve=True))()
        assert node.detach_reset and type(node.surrogate_function).__name__ == "ATan"
        return *tau_and_threshold(node), node.v_reset, node.decay_input

    whole = ["neuron_start.tau=2", "neuron_start.v_threshold=3", "neuron_start.v_reset=1"]
    assert start() == (2.0, 0.5, 0.0, True) and start(*whole) == (2.0, 3.0, 1.0, True)


class Rates(nn.Module):
    """Predicts class 1 always, and records its input."""

    classes, T = 3, 5

    def forward(self, x):
        self.seen = x
        return torch.tensor([[0.0, 0.5, 0.0]]).expand(x.shape[-4], -1)


def test_model_input_refuses_another_number_of_frames():
    for model in ("classifier_small", "classifier_mnist"):
        event = ["task=classification", "dataset=nmnist", "dataset.T=6", f"model={model}"]
        assert compose("train", event).model.T == 6
    task = Classification(Rates(), torch.optim.Adam, scheduler=None)
    with pytest.raises(ValueError, match=r"dataset\.T=4 frames, but model\.T=5; set dataset\.T"):
        task.training_step((torch.rand(2, 4, 2, 8, 8), torch.tensor([1, 1])), 0)


@pytest.fixture
def logged(monkeypatch):
    """What a task logs, which has no trainer."""
    values = {}
    monkeypatch.setattr(Classification, "log_mean", lambda self, k, v: values.update({k: float(v)}))
    return values


@pytest.mark.parametrize("shape", [(4, 1, 8, 8), (4, 5, 2, 8, 8)])
def test_training_step_loss_accuracy_and_order_of_time(logged, shape):
    task = Classification(Rates(), torch.optim.Adam, scheduler=None)
    x, label = torch.rand(shape), torch.tensor([1, 1, 1, 2])
    loss = task.training_step((x, label), 0)
    # Three of four: (0.5^2) / 3 classes; the last: (0.5^2 + 1^2) / 3.
    assert float(loss) == pytest.approx((3 * 0.25 + 1.25) / 12)
    assert logged == {"train/loss": float(loss), "train/accuracy": 0.75}
    assert torch.equal(task.model.seen, x if x.dim() == 4 else x.transpose(0, 1))


class Steps(nn.Module):
    """Class 0 at the first step, class 1 at the second."""

    classes, T = 2, 2

    def forward(self, x, each_step=False):
        outputs = torch.tensor([[[1.0, 0.0]], [[0.0, 3.0]]]).expand(-1, len(x), -1)
        return outputs if each_step else outputs.mean(0)


def test_training_step_mixed_labels_and_loss_of_each_step(logged):
    seen = []

    class Loss(nn.Module):
        each_step = True

        def forward(self, outputs, target):
            seen.append((outputs, target))
            return outputs.sum()

    task = Classification(Steps(), torch.optim.Adam, scheduler=None, loss=Loss())
    task.training_step((torch.rand(2, 1, 8, 8), torch.tensor([[0.3, 0.7], [0.6, 0.4]])), 0)
    task.validation_step((torch.rand(2, 1, 8, 8), torch.tensor([1, 1])), 0)
    (outputs, mixed), (_, one_hot) = seen
    assert outputs.shape == (2, 2, 2) and mixed.tolist()[0] == pytest.approx([0.3, 0.7])
    assert one_hot.tolist() == [[0, 1], [0, 1]]
    assert (logged["train/accuracy"], logged["val/accuracy"]) == (0.5, 1.0)


def test_confusion_counts_one_pass_of_the_test_set(logged):
    task = Classification(Rates(), torch.optim.Adam, scheduler=None)
    for _ in range(2):
        task.test_step((torch.rand(4, 1, 8, 8), torch.tensor([1, 1, 0, 2])), 0)
        task.on_test_epoch_end()
        assert task.counts.tolist() == [[0, 1, 0], [0, 2, 0], [0, 1, 0]]
