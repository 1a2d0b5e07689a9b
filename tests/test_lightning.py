"""The Lightning callback that resets neurons."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from sj_taid import ALIFNode


def test_reset_state_starts_every_batch_from_rest(tmp_path):
    from lightning.pytorch import LightningModule, Trainer
    from torchmetrics import SumMetric

    from sj_taid.lightning import ResetState

    class Task(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 2), ALIFNode(v_threshold=0.1))
            self.starts = []
            self.steps = SumMetric()  # whose reset is not for the neurons'

        def training_step(self, x, i):
            self.starts.append(self.net[1].v)
            self.steps.update(1)
            return self.net(x).mean()

        validation_step = test_step = predict_step = training_step

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    task = Task()
    # The last batch is smaller: without a reset the batch size would not fit either.
    data = DataLoader(torch.rand(5, 3), batch_size=2)
    shown = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    options = dict.fromkeys(shown, False) | {"max_epochs": 2, "default_root_dir": tmp_path}
    trainer = Trainer(accelerator="cpu", callbacks=[ResetState()], **options)
    with torch.no_grad():
        task.net[1].v_threshold.fill_(-0.5)
    with pytest.warns(UserWarning, match=r"^layers net\.1: threshold at or below"):
        trainer.fit(task, data, data)
    trainer.test(task, data, verbose=False)
    trainer.predict(task, data)
    assert task.net[1].name == "net.1"
    # Two batches of the sanity check, two epochs of training and validation, test, predict.
    assert task.starts == [0.0] * (2 + 2 * 2 * 3 + 3 + 3)
    assert task.steps.compute() == len(task.starts)
