"""Augmentation: what it does to an image, and that no draw is made twice."""

import math
from functools import partial

import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from sj_taid.data import Digits
from sj_taid.data.augment import AUGMENTATIONS, _warp
from tests.data.made_up import first, make, ready

digits = partial(ready, Digits, batch_size=40)


def images(loader):
    return torch.cat([x for x, _ in loader])


def photographs(n):
    return torch.randint(1, 256, (n, 3, 16, 16), dtype=torch.uint8)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentation_draws_for_each_sample_and_tells_whether_it_mirrors(name):
    torch.manual_seed(1)
    x = torch.zeros(64, 3, 1, 8, 8)
    x[..., 4, 1] = 1
    y = AUGMENTATIONS[name](x)
    assert y.shape == x.shape and (y % 1).any() == (name == "affine")
    assert torch.equal(y, y[:, :1].expand_as(y))  # the frames of a sequence share one map
    assert len(torch.unique(y, dim=0)) >= 2
    assert digits(augment=name).mirrors == bool(y[..., 4:].any())
    assert not digits().mirrors


def test_warp_equals_torchvisions_affine():
    x = photographs(n=1)
    angle, scale, pixels = 25.0, 0.9, (2, -1)
    bilinear = {"interpolation": v2.InterpolationMode.BILINEAR}
    expected = functional.affine(x, angle, pixels, scale, [0.0], **bilinear)
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    inverse = torch.tensor([[[cos, sin], [-sin, cos]]]) / scale
    moved = _warp(x, inverse, -torch.tensor([pixels]) / 16, "bilinear")
    assert (moved.int() - expected.int()).abs().max() <= 1  # rounding


def test_crop_flip_cuts_from_the_padded_image():
    x = photographs(n=40)
    y = AUGMENTATIONS["crop_flip"](x)
    padded = functional.pad(x, [2] * 4)
    for i in range(len(x)):
        crops = padded[i].unfold(1, 16, 1).unfold(2, 16, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
        assert (torch.cat([crops, crops.flip(-1)]) == y[i]).flatten(1).all(1).any()


def test_only_training_samples_vary():
    plain = digits()
    varied = digits(augment="affine", erase=1.0, mixup=1.0, validation=0.1)
    assert torch.equal(images(plain.test_dataloader()), images(varied.test_dataloader()))
    assert all(labels.dim() == 1 for _, labels in varied.val_dataloader())
    x, labels = first(varied.train_dataloader())
    assert labels.dim() == 2 and not torch.equal(x, first(varied.loader(varied.train_set))[0])


def test_draws_follow_the_seed_and_no_two_batches_share_them():
    data = digits(augment="affine", num_workers=2)
    data.train_set.samples[:] = data.train_set.samples[0].clone()

    def epoch(seed):
        torch.manual_seed(seed)
        return images(data.train_dataloader())

    first = epoch(seed=0)
    assert torch.equal(first, epoch(seed=0))
    assert not torch.equal(first, epoch(seed=1))
    assert len(torch.unique(first, dim=0)) == len(first)


def test_erase_blackens_a_rectangle_of_some_samples():
    loader = digits(erase=0.5).train_dataloader()
    # The frames of a recording lose the same rectangle.
    frames = loader.collate_fn((torch.full((400, 3, 2, 16, 16), 255).byte(), None))[0]
    assert torch.equal(frames, frames[:, :1, :1].expand_as(frames))
    erased = frames[:, 0, 0] == -1
    assert 0.4 < erased.flatten(1).any(1).float().mean() < 0.6
    assert len(torch.unique(erased, dim=0)) > 100  # each its own
    assert torch.equal(erased, erased.any(2)[:, :, None] & erased.any(1)[:, None, :])


def test_mixup_mixes_neighbours_and_their_labels():
    torch.manual_seed(0)
    plain, labels = first(digits().train_dataloader())
    torch.manual_seed(0)
    mixed, probabilities = first(digits(mixup=0.5).train_dataloader())
    part = probabilities.gather(1, labels[:, None])[labels != labels.roll(1)][0]
    one_hot = torch.eye(10)[labels]
    torch.testing.assert_close(mixed, part * plain + (1 - part) * plain.roll(1, 0))
    torch.testing.assert_close(probabilities, part * one_hot + (1 - part) * one_hot.roll(1, 0))
    collate = digits(mixup=1.0).train_dataloader().collate_fn
    frames = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1, 1).expand(-1, 3, 2, 16, 16)
    mixed, probabilities = collate((frames, torch.arange(6)))  # whole recordings
    assert torch.equal(mixed, mixed[:, :1, :1, :1, :1].expand(6, 3, 2, 16, 16))
    assert probabilities.shape == (6, 10)


def test_mixup_is_refused_without_labels():
    with pytest.raises(ValueError, match=r"dataset\.classes is None"):
        make(Digits, mixup=1.0, classes=None)
