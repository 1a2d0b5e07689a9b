"""The feature loss: its value, its classifier, and a run with it."""

import pytest
import torch
from torch.nn import functional as F

from sj_taid.training.checkpoint import read_checkpoint
from sj_taid.training.feature_loss import FeatureLoss
from sj_taid.training.run import Run, build_part
from sj_taid.training.train import train
from tests.training.conftest import TINY_ESVAE


def test_feature_loss_is_the_error_after_each_block():
    loss = FeatureLoss(1, 10, weight=0.5).train()
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    output, image = torch.rand(2, 3, 1, 8, 8)
    output.requires_grad_()
    found, expected, layers = loss(output, image), 0.0, [output, image]
    for block in loss.blocks:
        layers = [block(layer) for layer in layers]
        expected = expected + 0.5 * F.l1_loss(*layers)
    assert torch.allclose(found, expected)
    found.backward()
    assert output.grad.abs().sum() > 0
    torch.testing.assert_close(loss.state_dict(), before, rtol=0, atol=0)  # batch norms too


@pytest.fixture(scope="module")
def digits(tiny):
    data = build_part(tiny("dataset.image_size=16"), "dataset")
    data.setup()
    return data


def test_classifier_learns_and_is_cached(digits, tmp_path, caplog):
    caplog.set_level("INFO")
    first, second = FeatureLoss(1, 10), FeatureLoss(1, 10)
    torch.manual_seed(7)
    first.prepare(digits, tmp_path)
    drawn = torch.rand(3)
    accuracy = float(caplog.messages[-1].split()[-2])
    assert accuracy > 90, caplog.messages
    trained = first.state_dict()
    torch.manual_seed(7)
    second.prepare(digits, tmp_path)
    assert torch.equal(torch.rand(3), drawn)  # cached or not, a run draws the same
    assert caplog.messages[-1].endswith(f"{accuracy:.2f} %")  # it is not trained again
    torch.testing.assert_close(second.state_dict(), trained, rtol=0, atol=0)


def test_run_has_a_feature_loss(tiny, tmp_path):
    job = [*TINY_ESVAE, "trainer.limit_train_batches=2", "logger=csv"]
    train(tiny(*job, "feature_loss=classifier", tiny=False), tmp_path)
    state = read_checkpoint(Run(tmp_path).checkpoint)
    assert "feature_loss.blocks.0.0.weight" in state["state_dict"]
    (epoch,) = state["callbacks"]["History"]["epochs"]
    assert epoch["train/features"] > 0
    learned = sum(len(group["params"]) for group in state["optimizer_states"][0]["param_groups"])
    assert learned == len([*Run(tmp_path).model().parameters()])
