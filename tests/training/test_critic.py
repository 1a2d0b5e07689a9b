"""The critic of generated images: its loss by hand, and runs in which it takes part."""

from types import SimpleNamespace

import lightning as L
import pytest
import torch
from torch.nn import functional as F

from sj_taid.model import ESVAE
from sj_taid.training.checkpoint import read_checkpoint
from sj_taid.training.critic import PatchCritic
from sj_taid.training.generation import Generation
from sj_taid.training.run import Run
from sj_taid.training.train import train
from tests.training.conftest import assert_same_weights, weights
from tests.training.test_prior import ADAM, SMALL, TINY_ESVAE, Stop

CRITIC = ["critic=patch", "critic.width=2", "critic.warmup=1", "model.sample_from=mixture"]
JOB = [*TINY_ESVAE, *CRITIC, "trainer.limit_train_batches=3", "trainer.max_epochs=4"]


def test_critic_tells_images_apart_by_the_hinge_loss():
    critic = PatchCritic(1, width=4, updates=1)
    real, fake = torch.rand(2, 8, 1, 8, 8)
    fake[:, :, ::2] = -1
    expected = F.relu(1 - critic.eval().net(real)).mean() + F.relu(1 + critic.net(fake)).mean()
    assert torch.allclose(critic.teach(real, fake), expected)
    losses = [critic.train().teach(real, fake).item() for _ in range(100)]
    assert losses[-1] < losses[0] / 2 and critic.steps == 101


def test_pull_has_the_share_of_the_gradient():
    critic = PatchCritic(2, share=0.25, width=4).eval()
    fake = torch.rand(3, 2, 8, 8, requires_grad=True)
    (own,) = torch.autograd.grad(-critic.net(fake).mean(), fake)
    gradient = torch.randn(3, 2, 8, 8)
    (pull,) = torch.autograd.grad(critic.pull(fake, gradient), fake)
    assert torch.allclose(pull, 0.25 * own * gradient.norm() / own.norm())


def test_critic_says_that_it_has_lost():
    critic = PatchCritic(1, warmup=200, lr=0.0, width=2)
    for net in (critic.net[0], critic.net[-1]):
        torch.nn.init.zeros_(net.bias)
    nothing = torch.zeros(2, 1, 8, 8)
    with pytest.raises(RuntimeError, match=r"overruns its critic, whose loss is 1\.9\d, .*share"):
        for _ in range(300):
            critic.teach(nothing, nothing)
    assert critic.steps == 300


class Keep(L.Callback):
    """Keeps the model as it is where the critic's epoch starts."""

    def on_train_batch_start(self, trainer, task, batch, index):
        if trainer.current_epoch == 1 and index == 0:
            Keep.kept = {k: v.clone() for k, v in task.model.state_dict().items()}


@pytest.mark.parametrize("trains", ["decoder", "all"])
def test_critic_trains_the_decoder_alone_or_all(tiny, tmp_path, trains):
    callback = f"+callbacks.keep._target_={__name__}.Keep"
    chosen = [*JOB, f"critic.trains={trains}", "critic.epochs=1", "trainer.max_epochs=2"]
    train(tiny(*chosen, callback, tiny=False), tmp_path)
    changed = {k for k, v in weights(tmp_path).items() if not torch.equal(v, Keep.kept[k])}
    assert "decoder.0.0.0.weight" in changed
    before = ("stem", "encoder", "to_latent", "prior", "mixture")
    assert any(k.startswith(before) for k in changed) == (trains == "all")


@pytest.mark.slow
def test_resumed_run_has_the_critic_that_it_had(tiny, tmp_path):
    job = [*JOB, "critic.epochs=3", "critic.trains=all"]
    train(tiny(*job, tiny=False), tmp_path / "whole")
    stop = f"+callbacks.stop._target_={Stop.__module__}.Stop"
    with pytest.raises(SystemExit):
        train(tiny(*job, stop, tiny=False), tmp_path / "run")
    train(tiny(*job, tiny=False), tmp_path / "run")
    assert_same_weights(tmp_path / "run", weights(tmp_path / "whole"))
    critics = [critic_of(tmp_path / name) for name in ("run", "whole")]
    torch.testing.assert_close(*critics, rtol=0, atol=0)
    assert critics[0]["critic._extra_state"]["steps"] == 9


def test_finished_run_resumes_with_a_critic(tiny, tmp_path):
    job = [o for o in JOB if "critic" not in o]
    train(tiny(*job, "trainer.max_epochs=1", tiny=False), tmp_path)
    assert not critic_of(tmp_path)
    train(tiny(*job, *CRITIC, "critic.epochs=1", "trainer.max_epochs=2", tiny=False), tmp_path)
    assert critic_of(tmp_path)["critic._extra_state"]["steps"] == 3


def test_run_resumes_without_its_critic(tmp_path, sj_taid):
    one_step = ["trainer.limit_train_batches=1", "pictures=false", "callbacks=quiet"]
    command = ["train", *TINY_ESVAE, *one_step, f"hydra.run.dir={tmp_path}"]
    sj_taid(*command, "critic=patch", "critic.warmup=0", "trainer.max_epochs=1")
    assert critic_of(tmp_path)
    sj_taid("train", f"resume={tmp_path}", "critic=none", "trainer.max_epochs=2")
    assert not critic_of(tmp_path) and Run(tmp_path).metrics["epochs"] == 2

    before = {path: path.read_bytes() for path in tmp_path.glob("*.*")}
    with pytest.raises(SystemExit, match=r"warmup=300 steps leave none"):
        sj_taid("train", f"resume={tmp_path}", "critic=patch", "trainer.max_epochs=3")
    after = {path: path.read_bytes() for path in tmp_path.glob("*.*")}
    assert {path.name for path in before if before[path] != after.get(path)} <= {"train.log"}


def critic_of(folder):
    state = read_checkpoint(Run(folder).checkpoint)["state_dict"]
    return {name: value for name, value in state.items() if name.startswith("critic.")}


def test_critic_needs_steps_in_which_it_is_heard(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"warmup=300 steps leave none of the 6 of the critic's 2"):
        train(tiny(*JOB, "critic.warmup=300", tiny=False), tmp_path)


def test_critic_needs_a_model_with_a_latent():
    other = torch.nn.Identity()
    other.training_loss = other.sample = None
    with pytest.raises(
        ValueError, match="is for ESVAE and FSVAE, but the model is Identity; leave"
    ):
        Generation(other, ADAM, critic=PatchCritic(1))


def test_critic_needs_one_process(monkeypatch):
    monkeypatch.setattr(Generation, "trainer", SimpleNamespace(world_size=2, precision="32-true"))
    task = Generation(ESVAE(**SMALL), ADAM, critic=PatchCritic(1))
    with pytest.raises(ValueError, match=r"a critic learns in one process: add trainer\.devices=1"):
        task.setup("fit")
