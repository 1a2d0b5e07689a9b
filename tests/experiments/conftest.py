"""A run small enough for a test, through the real configs."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

CONF = Path(__file__).resolve().parents[2] / "conf"

TINY_TRAINER = [
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=2",
    "trainer.limit_val_batches=1",
    "trainer.limit_test_batches=1",
    "trainer.accelerator=cpu",
]

TINY = [
    "model.T=3",
    "model.hidden_channels=[4,6]",
    "model.latent_channels=5",
    "model.k=3",
    "dataset.image_size=8",
    "fad.hidden_channels=[4]",
    "fad.latent_channels=3",
    "fad.epochs=1",
    "fad.samples=8",
    *TINY_TRAINER,
]

TINY_CLASSIFICATION = [
    "task=classification",
    "model.T=2",
    "model.stages=[[4],[6]]",
    "model.hidden=8",
    "dataset.image_size=8",
    *TINY_TRAINER,
]


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """FAD's autoencoder is trained once for all tests."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def tiny(cache):
    """Compose conf/train.yaml with overrides, at a size for tests."""

    def make(*overrides, tiny=True):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return compose("train", [*(TINY if tiny else []), f"cache_dir={cache}", *overrides])

    return make
