"""TET against values worked by hand, the feature loss, and the losses from the configs."""

import math

import pytest
import torch
from torch.nn import functional as F

from sj_taid.training import run
from sj_taid.training.checkpoint import read_checkpoint
from sj_taid.training.config import compose
from sj_taid.training.loss import TET, FeatureLoss
from sj_taid.training.parts import build_parts
from tests.training.conftest import CONF, TINY_CLASSIFICATION, TINY_ESVAE, fit

# One sample of class 0 at two steps: softmax (1/2, 1/2), then (3/4, 1/4).
OUTPUTS = torch.tensor([[[0.0, 0.0]], [[math.log(3), 0.0]]])
TARGET = torch.tensor([[1.0, 0.0]])
CROSS_ENTROPY = (math.log(2) + math.log(4 / 3)) / 2
DISTANCE = (1 + 1 + (math.log(3) - 1) ** 2 + 1) / 4  # to 1
# Smoothed by 0.2, the label is (0.9, 0.1).
SMOOTHED = CROSS_ENTROPY + 0.1 * math.log(3) / 2


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"mse_share": 0.0}, CROSS_ENTROPY),
        ({}, 0.95 * CROSS_ENTROPY + 0.05 * DISTANCE),
        ({"mse_share": 1.0}, DISTANCE),
        ({"mse_share": 1.0, "phi": 0.0}, math.log(3) ** 2 / 4),
        ({"mse_share": 0.0, "label_smoothing": 0.2}, SMOOTHED),
    ],
)
def test_tet_equals_a_value_worked_by_hand(options, expected):
    assert TET(**options)(OUTPUTS, TARGET).item() == pytest.approx(expected)


def test_tet_refuses_a_share_out_of_its_range():
    with pytest.raises(ValueError, match=r"mse_share must be a number from 0 to 1, but it is 1\.1"):
        TET(mse_share=1.1)


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "loss").glob("*.yaml")))
def test_loss_config_trains(tmp_path, name):
    data = ["dataset.mixup=0.2", "dataset.erase=0.5"]
    if name != "mse":  # which has nothing to smooth
        data.append("loss.label_smoothing=0.1")
    metrics = fit(tmp_path, *TINY_CLASSIFICATION, f"loss={name}", "optimizer=sgd", *data)
    assert metrics["loss"] > 0 and 0 <= metrics["accuracy"] <= 1
    last = run.load_model(tmp_path).head[-1]
    assert isinstance(last, torch.nn.Linear) == (name != "mse")  # currents, or rates


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


def test_classifier_learns_and_is_cached(tmp_path, caplog):
    digits = build_parts(compose("train", ["dataset.image_size=16"])).load_data()
    caplog.set_level("INFO")
    first, second = (FeatureLoss(1, 10, cache_dir=tmp_path) for _ in range(2))
    torch.manual_seed(7)
    first.prepare(digits)
    drawn = torch.rand(3)
    assert float(caplog.messages[-1].split()[-1]) < 0.5, caplog.messages
    trained = first.state_dict()
    torch.manual_seed(7)
    second.prepare(digits)
    assert torch.equal(torch.rand(3), drawn)  # cached or not, a run draws the same
    assert len([text for text in caplog.messages if "classifier is in" in text]) == 1
    torch.testing.assert_close(second.state_dict(), trained, rtol=0, atol=0)


def test_run_has_a_feature_loss(tmp_path):
    short = ["model.sample_from=learned", "trainer.limit_train_batches=2"]
    fit(tmp_path, *TINY_ESVAE, *short, "feature_loss=classifier")
    state = read_checkpoint(run.Run(tmp_path).checkpoint)
    assert "feature_loss.blocks.0.0.weight" in state["state_dict"]
    (epoch,) = state["callbacks"]["History"]["epochs"]
    assert epoch["train/features"] > 0
    learned = sum(len(group["params"]) for group in state["optimizer_states"][0]["param_groups"])
    assert learned == sum(p.requires_grad for p in run.Run(tmp_path).model().parameters())
