"""Images in files, made up on disk: folders and CelebA, what they give and refuse."""

import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets
from torchvision.datasets.utils import calculate_md5

from sj_taid import data
from sj_taid.data.folder import read_image
from tests.data.made_up import cut, first, make, ready
from tests.training.conftest import write_images


def folder(root, **options):
    return ready(data.ImageFolder, root, **{"classes": None} | options)


def test_image_folder_without_labels(tmp_path):
    write_images(tmp_path, 20)
    (tmp_path / "notes.txt").write_text("not an image")
    for name in ("._a.jpg", ".thumbs/a.jpg"):  # hidden
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"no image")
    module = folder(tmp_path, channels=3, num_workers=2)
    assert module.classes is None
    assert len(module.train_set) == 18 and len(module.test_set) == 2
    images, labels = first(module.test_dataloader())
    assert images.shape == (2, 3, 16, 16) and labels.tolist() == [-1, -1]
    assert ((images[:, 0, 8, 8] + 1) * 127.5).round().tolist() == [18, 19]


def test_image_folder_with_a_folder_per_class(tmp_path):
    for name, n in (("cat", 10), ("dog", 20), (".thumbnails", 3)):
        write_images(tmp_path / "train" / name, n)
        write_images(tmp_path / "test" / name, 2, mode="L", suffix="jpg")
    module = folder(tmp_path / "train", classes=2)
    images, labels = first(module.test_dataloader())
    assert labels.tolist() == [1, 0, 1] and len(module.train_set) == 27
    assert images.shape == (3, 1, 16, 16) and module.class_names == ["cat", "dog"]

    apart = {"root": tmp_path / "train", "test_root": str(tmp_path / "test")}
    assert make(data.ImageFolder, **apart, classes=None).classes == 2
    module = folder(**apart)
    assert len(module.train_set) == 30 and len(module.test_set) == 4

    with pytest.raises(ValueError, match=r"classes=10, but test has 2 classes \(cat, dog\); .*=2"):
        folder(tmp_path / "train", classes=10)
    with pytest.raises(ValueError, match=r"holds the parts of a split \(test, train\).*/train and"):
        folder(tmp_path)
    shutil.rmtree(tmp_path / "test" / "dog")
    with pytest.raises(ValueError, match=r"test_root=.*must hold.*\(cat, dog\), but holds cat"):
        folder(**apart)


def test_read_image_turns_and_scales_as_the_file_says(tmp_path):
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


def test_image_folder_crops_the_middle(tmp_path):
    pixels = np.zeros((10, 12), dtype=np.uint8)
    pixels[3:7, 4:8] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    shares = [
        first(folder(tmp_path, test_root=str(tmp_path), crop=crop).test_dataloader())[0].eq(1)
        for crop in (4, None)
    ]
    assert shares[0].all() and shares[1].float().mean() < 0.3
    module = folder(tmp_path, test_root=str(tmp_path), crop=11)
    with pytest.raises(RuntimeError, match=r"a\.png .* 12x10 pixels are fewer than dataset\.crop"):
        first(module.test_dataloader())


def test_image_folder_refuses_missing_folders_and_empty_parts(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder at dataset\.root=.*nowhere"):
        folder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no image in .*\.png"):
        folder(tmp_path)
    with pytest.raises(ValueError, match=r"classes=10, but .* holds no folders of classes; set"):
        folder(tmp_path, classes=10)
    write_images(tmp_path, 4)
    for share in (0.1, 1.5):
        message = rf"test_share={share} of the 4 images in .* leaves .*; choose another share"
        with pytest.raises(ValueError, match=message):
            folder(tmp_path, test_share=share)


def test_image_folder_names_all_damaged_images_at_once(tmp_path):
    write_images(tmp_path, 20)
    pixels = torch.randint(256, (64, 64, 3), dtype=torch.uint8).numpy()
    names = [f"{n:02}a.png" for n in (3, 11, 19)]  # the last one is for testing
    for name in names:
        Image.fromarray(pixels).save(tmp_path / name)
        cut(tmp_path / name)
    module = folder(tmp_path)
    for loader in (module.train_dataloader(), module.test_dataloader()):
        message = r"cannot be read \(OSError: .*\); .*; replace it, or move it out of"
        with pytest.raises(RuntimeError, match=message) as info:
            first(loader)
        assert sorted(re.findall(r"\d\da\.\w+", str(info.value))) == names


@pytest.fixture
def celeba(tmp_path, monkeypatch):
    """Eight images, black in the middle 148x148 and white around it, and the partition."""
    images = tmp_path / "celeba" / "img_align_celeba"
    images.mkdir(parents=True)
    face = np.full((218, 178, 3), 255, dtype=np.uint8)
    face[35:183, 15:163] = 0
    partition = tmp_path / "celeba" / "list_eval_partition.txt"
    with partition.open("w") as file:
        for i, part in enumerate([0, 0, 0, 0, 1, 2, 2, 2], start=1):
            Image.fromarray(face).save(images / f"{i:06}.jpg", quality=95)
            file.write(f"{i:06}.jpg {part}\n")
    files = [("id", calculate_md5(partition), partition.name)]
    monkeypatch.setattr(datasets.CelebA, "file_list", files)
    return tmp_path


def test_celeba(celeba):
    options = {"channels": 3, "image_size": 64, "classes": None}
    module = ready(data.CelebA, celeba, **options)
    assert len(module.train_set) == 4 and len(module.test_set) == 3
    images, labels = first(module.train_dataloader())
    assert images.shape == (4, 3, 64, 64) and labels.tolist() == [-1] * 4
    assert images[:, :, 2:-2, 2:-2].max() < -0.95  # all but what JPEG blurs
    assert module.validation_set is None
    own = ready(data.CelebA, celeba, **options, validation="own")
    assert [path[-10:] for path in own.validation_set.paths] == ["000005.jpg"]
    assert own.train_set.paths == module.train_set.paths


def test_celeba_refuses_damaged_and_missing_files(celeba):
    partition, images = (celeba / "celeba" / name for name in data.CelebA.files)
    module = ready(data.CelebA, celeba, channels=3)
    cut(images / "000006.jpg")
    with pytest.raises(RuntimeError, match=r"000006\.jpg cannot be read .*; replace it, or move"):
        first(module.test_dataloader())
    (images / "000006.jpg").unlink()
    with pytest.raises(RuntimeError, match=r"img_align_celeba is damaged.*1 of 3 .*000006\.jpg"):
        ready(data.CelebA, celeba)
    cut(partition)
    with pytest.raises(RuntimeError, match=r"list_eval_partition\.txt is damaged: its MD5 is not"):
        ready(data.CelebA, celeba)
    shutil.rmtree(images)
    with pytest.raises(FileNotFoundError, match=r"no CelebA .*lacks img_align_celeba;"):
        ready(data.CelebA, celeba)
