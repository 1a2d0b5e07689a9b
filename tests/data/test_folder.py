"""Images in files, made up on disk: folders and CelebA, what they give and refuse."""

import re
import shutil

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets
from torchvision.datasets.utils import calculate_md5

from sj_taid import data
from sj_taid.data.folder import read_image
from tests.data.made_up import cut, first, make, ready
from tests.training.conftest import write_images


def test_folder_without_labels(tmp_path):
    write_images(tmp_path, 20)
    (tmp_path / "notes.txt").write_text("not an image")
    module = ready(data.ImageFolder, tmp_path, channels=3, classes=None, num_workers=2)
    assert module.classes is None
    assert len(module.train_set) == 18 and len(module.test_set) == 2
    images, labels = first(module.test_dataloader())
    assert images.shape == (2, 3, 16, 16) and labels.tolist() == [-1, -1]
    assert ((images[:, 0, 8, 8] + 1) * 127.5).round().tolist() == [18, 19]


def test_folder_with_a_folder_for_each_class(tmp_path):
    for name, n in (("cat", 10), ("dog", 20), (".thumbnails", 3)):
        write_images(tmp_path / "train" / name, n)
        write_images(tmp_path / "test" / name, 2, mode="L", suffix="jpg")
    module = ready(data.ImageFolder, tmp_path / "train", classes=2)
    images, labels = first(module.test_dataloader())
    assert labels.tolist() == [1, 0, 1] and len(module.train_set) == 27
    assert images.shape == (3, 1, 16, 16) and module.class_names == ["cat", "dog"]

    apart = {"root": tmp_path / "train", "test_root": str(tmp_path / "test")}
    module = ready(data.ImageFolder, **apart, classes=None)
    assert module.classes == make(data.ImageFolder, **apart, classes=None).classes == 2
    assert len(module.train_set) == 30 and len(module.test_set) == 4

    with pytest.raises(ValueError, match=r"classes=10, but .*2 folders .*cat, dog.*classes=2"):
        ready(data.ImageFolder, tmp_path / "train")
    with pytest.raises(ValueError, match=r"holds the parts of a split \(test, train\).*/train and"):
        ready(data.ImageFolder, tmp_path)
    shutil.rmtree(tmp_path / "test" / "dog")
    with pytest.raises(ValueError, match=r"test_root=.*must hold.*\(cat, dog\), but holds cat"):
        ready(data.ImageFolder, **apart, classes=2)


def test_images_as_people_have_them(tmp_path):
    """Hidden files are left out, a camera's orientation counts, and 16 bits are scaled."""
    write_images(tmp_path, 12)
    for name in ("._a.jpg", ".thumbs/a.jpg"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"no image")
    assert len(ready(data.ImageFolder, tmp_path, classes=None).train_set) == 11

    half = np.zeros((4, 8), dtype=np.uint8)
    half[:, :4] = 255
    turned = Image.fromarray(half)
    turned.getexif()[0x0112] = 6  # taken with the camera on its side
    turned.save(tmp_path / "turned.png", exif=turned.getexif())
    read = read_image(str(tmp_path / "turned.png"), "L", size=4)
    assert read.shape == (1, 4, 4) and read[0, :2].eq(255).all() and read[0, 2:].eq(0).all()

    deep = np.array([[0, 257], [1000, 65535]], dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    for mode, channels in (("L", 1), ("RGB", 3)):
        read = read_image(str(tmp_path / "deep.png"), mode, size=2)
        assert read.tolist() == [[[0, 1], [3, 255]]] * channels


def test_read_image_crops_the_middle(tmp_path):
    pixels = np.zeros((10, 12), dtype=np.uint8)
    pixels[3:7, 4:8] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert read_image(str(tmp_path / "a.png"), "L", size=2, crop=4).eq(255).all()
    assert read_image(str(tmp_path / "a.png"), "L", size=8).eq(255).float().mean() < 0.3
    module = ready(data.ImageFolder, tmp_path, classes=None, test_root=str(tmp_path), crop=4)
    assert first(module.test_dataloader())[0].eq(1).all()
    module = ready(data.ImageFolder, tmp_path, classes=None, test_root=str(tmp_path), crop=11)
    with pytest.raises(
        RuntimeError, match=r"a\.png .* 12x10 pixels are fewer than dataset\.crop=11"
    ):
        first(module.test_dataloader())
    with pytest.raises(ValueError, match=r"dataset\.crop must be null or at least 1, but it is 0"):
        make(data.ImageFolder, tmp_path, classes=None, crop=0)


def test_folder_that_is_no_use(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder at dataset\.root=.*nowhere"):
        ready(data.ImageFolder, tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no image in .*\.png"):
        ready(data.ImageFolder, tmp_path, classes=None)
    write_images(tmp_path, 4)
    for share in (0.1, 1.5):
        message = rf"test_share={share} of the 4 images in .* leaves .*; choose another share"
        with pytest.raises(ValueError, match=message):
            ready(data.ImageFolder, tmp_path, classes=None, test_share=share)


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for suffix in ("jpg", "png"):
        Image.fromarray(noise).save(tmp_path / f"a.{suffix}")
        cut(tmp_path / f"a.{suffix}")
        write_images(tmp_path, 9)
        module = ready(data.ImageFolder, tmp_path, classes=None)
        message = rf"a\.{suffix} cannot be read \(OSError: .*\); replace it, or move it out of"
        with pytest.raises(RuntimeError, match=message):
            first(module.train_dataloader()), first(module.test_dataloader())
        (tmp_path / f"a.{suffix}").unlink()


def test_all_images_that_cannot_be_read_are_named_at_once(tmp_path):
    write_images(tmp_path, 20)
    for name in ("03.png", "11.png", "19.png"):  # the last one is for testing
        cut(tmp_path / name)
    module = ready(data.ImageFolder, tmp_path, classes=None)
    for loader in (module.train_dataloader(), module.test_dataloader()):
        with pytest.raises(RuntimeError) as info:
            first(loader)
        assert sorted(re.findall(r"\d\d\.png", str(info.value))) == ["03.png", "11.png", "19.png"]


# CelebA


@pytest.fixture
def celeba(tmp_path, monkeypatch):
    """Eight images, black in the middle 148x148 and white around it, and the partition."""
    folder = tmp_path / "celeba"
    images = folder / "img_align_celeba"
    images.mkdir(parents=True)
    face = np.full((218, 178, 3), 255, dtype=np.uint8)
    face[35:183, 15:163] = 0
    lines = []
    for i, part in enumerate([0, 0, 0, 0, 1, 2, 2, 2], start=1):
        Image.fromarray(face).save(images / f"{i:06}.jpg", quality=95)
        lines.append(f"{i:06}.jpg {part}\n")
    partition = folder / "list_eval_partition.txt"
    partition.write_text("".join(lines))
    files = [("id", calculate_md5(partition), partition.name)]
    monkeypatch.setattr(datasets.CelebA, "file_list", files)
    return folder


def test_celeba(celeba):
    module = ready(data.CelebA, celeba.parent, channels=3, image_size=64, classes=None)
    assert len(module.train_set) == 4 and len(module.test_set) == 3
    images, labels = first(module.train_dataloader())
    assert images.shape == (4, 3, 64, 64) and labels.tolist() == [-1] * 4
    assert images[:, :, 2:-2, 2:-2].max() < -0.95  # all but what JPEG blurs
    assert module.validation_set is None
    own = ready(data.CelebA, celeba.parent, channels=3, classes=None, validation="own")
    assert [path[-10:] for path in own.validation_set.paths] == ["000005.jpg"]
    assert own.train_set.paths == module.train_set.paths

    damaged = celeba / "img_align_celeba" / "000006.jpg"
    cut(damaged)
    with pytest.raises(
        RuntimeError, match=r"000006\.jpg cannot be read .*; replace it, or move .*img_align"
    ):
        first(module.test_dataloader())
    damaged.unlink()
    with pytest.raises(RuntimeError, match=r"img_align_celeba is damaged.*1 of 3 .*000006\.jpg"):
        ready(data.CelebA, celeba.parent)
    cut(celeba / "list_eval_partition.txt")
    with pytest.raises(RuntimeError, match=r"list_eval_partition\.txt is damaged: its MD5 is not"):
        ready(data.CelebA, celeba.parent)
    shutil.rmtree(celeba / "img_align_celeba")
    with pytest.raises(FileNotFoundError, match=r"no CelebA .*lacks img_align_celeba;"):
        ready(data.CelebA, celeba.parent)
