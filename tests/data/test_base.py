"""What every data set shares: its config, ``limit``, the order of its test set, its fingerprint."""

import pytest
import torch

from sj_taid import data
from sj_taid.data import event
from sj_taid.training.composing import compose, instantiate
from tests.data.made_up import make, ready
from tests.training.conftest import CONF, write_images

DATA_SETS = {path.stem for path in (CONF / "dataset").glob("*.yaml")} - {"base", "recordings"}


@pytest.mark.parametrize("name", sorted(DATA_SETS))
def test_every_config_makes_its_data_module(name):
    cfg = compose("train", [f"dataset={name}"]).dataset
    module = instantiate(cfg)
    assert module.name == name
    for key in ("channels", "image_size", "classes", "batch_size", "num_workers", "augment"):
        assert getattr(module, key) == cfg[key]
    assert not isinstance(module, event.EventData) or cfg["T"] == module.T


def test_limit_spreads_over_the_set():
    whole, some = ready(data.Digits), ready(data.Digits, limit=100)
    assert len(some.train_set) == len(some.test_set) == 100
    assert torch.equal(some.train_set[99][0], whole.train_set[1438 * 99 // 100][0])
    assert len(ready(data.Digits, limit=1000).test_set) == 359
    with pytest.raises(ValueError, match=r"dataset\.limit must be null or at least 1.* 0"):
        make(data.Digits, limit=0)


def test_fingerprint_is_that_of_the_samples(tmp_path):
    fingerprint = ready(data.Digits).fingerprint()
    assert fingerprint == ready(data.Digits, batch_size=7, augment="affine").fingerprint()
    others = [{"limit": 100}, {"image_size": 8}]
    assert len({fingerprint, *(ready(data.Digits, **o).fingerprint() for o in others)}) == 3

    write_images(tmp_path, 20)
    before = ready(data.ImageFolder, tmp_path, classes=None).fingerprint()
    assert before == ready(data.ImageFolder, tmp_path, classes=None).fingerprint()
    (tmp_path / "00.png").unlink()
    assert before != ready(data.ImageFolder, tmp_path, classes=None).fingerprint()


def test_every_part_of_a_test_set_in_files_holds_the_classes_in_their_proportions(tmp_path):
    for name, n in (("aeroplane", 40), ("bird", 20), ("cat", 20)):
        write_images(tmp_path / name, n)
    options = {"classes": 3, "test_share": 0.5}
    for limit, images in ((None, 40), (12, 12)):
        labels = ready(data.ImageFolder, tmp_path, **options, limit=limit).test_set.labels
        assert len(labels) == images
        for start in range(0, images, 4):
            assert sorted(labels[start : start + 4]) == [0, 0, 1, 2]
