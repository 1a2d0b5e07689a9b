"""What every data set shares: its config, its parts and their order, its fingerprint."""

import dataclasses
import shutil
from collections import Counter
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from PIL import Image
from torch.utils.data import DistributedSampler

from sj_taid import data
from sj_taid.data import base
from sj_taid.training.config import compose
from tests.data.made_up import ready
from tests.training.conftest import CONF, write_images

DATA_SETS = {path.stem for path in (CONF / "dataset").glob("*.yaml")} - {"base", "recordings"}


@pytest.mark.parametrize("name", sorted(DATA_SETS))
def test_config_makes_its_data_module(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "images").mkdir(parents=True)  # where image_folder counts classes
    cfg = compose("train", [f"dataset={name}"]).dataset
    module = instantiate(cfg)
    assert module.name == (name if name != "image_folder" else "image_folder_images")  # its root's
    for key in ("channels", "image_size", "classes", "batch_size", "augment"):
        assert getattr(module, key) == cfg[key]
    assert getattr(module, "T", None) == cfg.get("T")


def images(samples):
    return {image.numpy().tobytes() for image, _ in samples}


def test_validation_and_limit_are_drawn_by_their_own_seed():
    state = torch.manual_seed(1).get_state()
    whole = ready(data.Digits)
    split, again, other = (ready(data.Digits, validation=0.1, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    rest, drawn = split.train_set, split.validation_set
    assert len(rest) == 1294 and len(drawn) == 144 and whole.validation_set is None
    assert images(rest) | images(drawn) == images(whole.train_set)
    assert not images(rest) & images(drawn)
    assert torch.equal(split.test_set.samples, whole.test_set.samples)
    all_classes, few = (Counter(samples.labels) for samples in (whole.train_set, drawn))
    assert all(abs(few[label] - 0.1 * n) < 1.5 for label, n in all_classes.items())
    assert images(again.validation_set) == images(drawn) != images(other.validation_set)
    for module, n in ((split, 144), (whole, 359)):
        assert len(torch.cat([x for x, _ in module.val_dataloader()])) == n
    some, others = (ready(data.Digits, limit=100, seed=seed) for seed in (0, 1))
    assert len(some.train_set) == len(some.test_set) == 100
    assert images(some.train_set) != images(others.train_set)
    assert len(ready(data.Digits, limit=1000).test_set) == 359
    with pytest.raises(ValueError, match="the validation_set of test is empty"):
        ready(data.Digits, validation=0.0001)


def test_sets_of_files_hold_the_classes_in_their_proportions(tmp_path):
    for name, n in (("aeroplane", 40), ("bird", 20)):
        write_images(tmp_path / name, n)
    module = ready(data.ImageFolder, tmp_path, classes=2, test_share=0.5, validation=0.2)
    assert module.train_set.labels == [0] * 16 + [1] * 8
    assert not set(module.train_set.samples) & set(module.validation_set.samples)
    for samples, of_each in ((module.validation_set, 2), (module.test_set, 10)):
        assert len(samples) == 3 * of_each
        for start in range(0, len(samples), 3):  # every part is mixed
            assert sorted(samples.labels[start : start + 3]) == [0, 0, 1]
    few = ready(data.ImageFolder, tmp_path, classes=2, test_share=0.5, limit=9).test_set
    assert Counter(few.labels) == {0: 6, 1: 3}


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([*range(1, 11)], "the train_set of test has the label 10; .*classes=10 are 0 to 9"),
        (torch.full((10,), -1), "has the label -1"),
        (np.arange(9), "a label is needed for each of 10 samples, not 9"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, message):
    class Mine(data.ImageData):
        def load(self):
            images = torch.zeros(10, 1, 16, 16, dtype=torch.uint8)
            return (data.Samples(images, labels),) * 2

    with pytest.raises(ValueError, match=message):
        ready(Mine)
    if len(labels) == 10:
        assert len(ready(Mine, classes=None).train_set) == 10


def test_fingerprint_is_of_the_samples_alone():
    whole = ready(data.Digits).fingerprint()
    same = {"validation": 0.0, "batch_size": 7, "augment": "affine"}
    assert ready(data.Digits, **same).fingerprint() == whole
    others = [ready(data.Digits, **o).fingerprint() for o in ({"limit": 100}, {"image_size": 8})]
    split = ready(data.Digits, validation=0.1)
    others += [split.fingerprint(), split.test_on_validation().fingerprint()]
    # What was made of the training set, as FAD's autoencoder, serves whatever is tested on.
    of_training = split.fingerprint(split.train_set)
    assert of_training == split.test_on_validation().fingerprint(split.train_set)
    others += [of_training, split.fingerprint(split.test_set)]
    assert len({whole, *others}) == 7


def test_fingerprint_of_files_follows_their_names_sizes_and_bytes(tmp_path):
    def fingerprint(folder, **options):
        return ready(data.ImageFolder, folder, classes=None, **options).fingerprint()

    here = tmp_path / "here"
    write_images(here, 20)
    before = fingerprint(here)
    assert fingerprint(shutil.copytree(here, tmp_path / "elsewhere")) == before
    (here / "00.png").unlink()
    assert fingerprint(here) != before
    for name in ("a", "b"):  # raw images, of one length
        (tmp_path / name).mkdir()
        for number in range(4):
            pixels = torch.randint(256, (8, 8), dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.bmp")
    assert len({fingerprint(tmp_path / name, test_share=0.5) for name in "ab"}) == 2
    files = ready(data.ImageFolder, here, classes=None).train_set
    relabelled = dataclasses.replace(files, labels=[1] * len(files))
    assert relabelled.identity() != files.identity()


@pytest.mark.parametrize("processes", [1, 2])
def test_train_dataloader_has_a_batch_for_every_process(processes, monkeypatch):
    """A last small batch is left out, but never the only one of a process."""
    module = ready(data.Digits, limit=150, batch_size=100)
    progress = SimpleNamespace(current=SimpleNamespace(processed=0))
    fit_loop = SimpleNamespace(epoch_progress=progress)
    module.trainer = SimpleNamespace(world_size=processes, fit_loop=fit_loop)
    sampler = partial(DistributedSampler, num_replicas=processes, rank=0)
    monkeypatch.setattr(base, "DistributedSampler", sampler)
    assert len(module.train_dataloader()) == 1
