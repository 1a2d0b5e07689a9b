"""Images in files, made up on disk: folders and CelebA, what they give and refuse."""

import os

import numpy as np
import pytest
from PIL import Image

from sj_taid import data
from sj_taid.data.folder import read_image
from tests.data.made_up import cut, first, make, ready
from tests.training.conftest import write_images


def folder(root, **options):
    return ready(data.ImageFolder, root, **{"classes": None} | options)


def lay(folder, places):
    """Make folders of three images, and links: ``place->target``."""
    for place, _, target in (words.partition("->") for words in places.split()):
        if target:
            (folder / place).symlink_to((folder / target).resolve())
        else:
            write_images(folder / place, 3)


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
    for name, n in (("cat", 8), ("dog", 20), (".thumbnails", 3)):
        write_images(tmp_path / "train" / name, n)
        write_images(tmp_path / "test" / name, 2, mode="L", suffix="JPG")
    for name in (".hidden.png", "notes.txt"):
        (tmp_path / "train" / name).write_bytes(b"")
    (more := tmp_path / "train" / "cat" / "more").symlink_to(tmp_path / "test" / "cat")
    module = folder(tmp_path / "train", classes=2)
    images, labels = first(module.test_dataloader())
    assert labels.tolist() == [1, 0, 1] and len(module.train_set) == 27
    assert images.shape == (3, 1, 16, 16) and module.class_names == ["cat", "dog"]

    more.unlink()  # or it would train on images for testing
    apart = {"root": tmp_path / "train", "test_root": str(tmp_path / "test")}
    assert make(data.ImageFolder, **apart, classes=None).classes == 2
    module = folder(**apart)
    assert len(module.train_set) == 28 and len(module.test_set) == 4


@pytest.mark.parametrize(("n", "size"), [(3, 2), (200, 9), (2300, 100)])
def test_image_folder_fits_batches_to_images_and_workers_to_cores(tmp_path, monkeypatch, n, size):
    write_images(tmp_path, 1)
    paths = {str(i): str(tmp_path / "00.png") for i in range(n)}
    monkeypatch.setattr("sj_taid.data.folder._images", lambda *_: paths)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    cats = ready(data.ImageFolder, root=tmp_path, classes=None, batch_size=None, num_workers=None)
    assert (cats.batch_size, cats.num_workers) == (size, 2)
    assert len(cats.train_dataloader()) >= min(20, len(cats.train_set) // size)


def test_read_image_turns_as_the_file_says_and_takes_the_middle(tmp_path):
    half = np.zeros((4, 8), dtype=np.uint8)
    half[:, :4] = 255
    turned = Image.fromarray(half)
    turned.getexif()[0x0112] = 6  # taken with the camera on its side
    turned.save(tmp_path / "turned.png", exif=turned.getexif())
    for crop, n in ((None, 4), (2, 2)):
        read = read_image(str(tmp_path / "turned.png"), channels=1, size=n, crop=crop)
        assert read.shape == (1, n, n)
        assert read[0, : n // 2].eq(255).all() and read[0, n // 2 :].eq(0).all()
    with pytest.raises(ValueError, match=r"it has \(4, 8\) pixels, fewer than 5"):
        read_image(str(tmp_path / "turned.png"), channels=1, size=4, crop=5)


TWICE = "are one image in two classes; remove a link"
NO_CLASSES = r"^dataset\.root=.* point it to one of these"
LOOSE = r"root has .* 3 images next to them, such as 00\.png; move each .*, or out"
BOTH = r"images of dataset\.test_root are in .*; keep each in"


@pytest.mark.parametrize(
    ("places", "options", "message"),
    [
        ("few", {"root": "nowhere"}, r"no folder at dataset\.root=nowhere"),
        ("root test/.hidden", {"test_root": "test"}, r"no image in test, of .*\.png"),
        ("root", {"classes": 10}, "holds no folders of classes"),
        ("root/cat root/dog", {"classes": 10}, "classes=10, but test has 2: cat, dog"),
        ("root/cat test", {"test_root": "test"}, "has the classes of no folder, but .*root cat"),
        ("root/train/cat", {}, NO_CLASSES),
        ("root/Train/cat root/val/cat root/test/cat", {}, NO_CLASSES),
        ("root/a root", {}, LOOSE),
        ("other/a root/a root", {"root": "other", "test_root": "root"}, LOOSE),
        ("root/a root/b root/a/up->root", {}, TWICE),
        ("root/a root/b root/a/03.png->root/b/00.png", {}, rf"a/03\.png and .*b/00\.png {TWICE}"),
        ("root/a root/b far root/a/far->far root/b/far->far", {}, TWICE),
        ("root/a test/a test/a/far->root/a", {"test_root": "test"}, BOTH),
        ("root/a test/a test/a/03.png->root/a/00.png", {"test_root": "test"}, BOTH),
    ],
)
def test_image_folder_refuses(tmp_path, monkeypatch, places, options, message):
    monkeypatch.chdir(tmp_path)
    lay(tmp_path, places)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        folder(**{"root": "root"} | options)


@pytest.mark.parametrize("share", [0.01, 0.99])
def test_image_folder_trains_and_tests_every_class(tmp_path, share):
    sizes = {"a": 2, "b": 3, "c": 50}
    for name, n in sizes.items():
        write_images(tmp_path / name, n)
    module = folder(tmp_path, test_share=share)
    for part in (module.train_set, module.test_set):
        assert {*part.labels} == {0, 1, 2}
    assert len(module.train_set) + len(module.test_set) == sum(sizes.values())
    write_images(tmp_path / "d", 1)
    with pytest.raises(ValueError, match=r"d/00\.png is the only file of its class"):
        folder(tmp_path, test_share=share)
    for name in "abcd":
        write_images(tmp_path / ".tests" / name, 1)
    assert len(folder(tmp_path, test_root=tmp_path / ".tests").train_set) == 56


@pytest.mark.parametrize(
    ("links", "n"),
    [
        ("root/a/99.png->root/a/00.png", 9),
        ("root/b/09.png->far/00.png root/b/10.png->far/00.png", 10),
        ("root/b/far->far far/back->root/b", 12),
        ("root/a/0->root/a root/a/more/0->root/a root/a/more/1->root/a/more root/b/0->root/b", 9),
    ],
)
def test_image_folder_has_each_image_once_however_links_go(tmp_path, links, n):
    lay(tmp_path, f"root/a root/a/more root/b far test/a test/b {links}")
    module = folder(tmp_path / "root", test_share=0.5)
    paths = [*module.train_set.samples, *module.test_set.samples]
    assert len(paths) == len({*map(os.path.realpath, paths)}) == n
    assert len(folder(tmp_path / "root", test_root=tmp_path / "test").train_set) == n


def test_image_folder_takes_names_of_splits_for_classes_next_to_others(tmp_path):
    lay(tmp_path, "train/cat test/cat station")
    assert folder(tmp_path).class_names == ["station", "test", "train"]


def test_image_folder_names_a_damaged_image(tmp_path):
    write_images(tmp_path, 2)
    Image.effect_noise((64, 64), 50).save(tmp_path / "00.png")
    cut(tmp_path / "00.png")  # whose head is whole
    module = folder(tmp_path, test_share=0.5)
    with pytest.raises(OSError, match=r"00\.png cannot be read \(.*\); replace it, or"):
        first(module.train_dataloader())


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "link": lambda path: (path.unlink(), path.symlink_to(f"{path}.gone")),
    "uint16": lambda path: Image.fromarray(np.zeros((9, 9), "uint16")).save(path, "tiff"),
    "float32": lambda path: Image.fromarray(np.zeros((9, 9), "float32")).save(path, "tiff"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_image_folder_names_a_file_that_is_no_image_before_a_training(tmp_path, damage):
    write_images(tmp_path, 20)
    damage(tmp_path / "03.png")
    expected = r"1 of 18 files cannot be read: \S*/03\.png \(.*; of each: replace it, or move"
    with pytest.raises(OSError, match=expected):
        folder(tmp_path)


def test_image_folder_names_ten_of_many_files_that_are_no_images(tmp_path):
    write_images(tmp_path, 20)
    for n in range(4, 16):
        (tmp_path / f"{n:02}.png").write_bytes(b"")
    with pytest.raises(OSError, match="12 of 18 files") as caught:
        folder(tmp_path)
    named = str(caught.value).partition(" (")[0]
    assert named.count(".png") == 10 and named.endswith("/13.png and 2 more")


@pytest.fixture
def celeba(tmp_path):
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
    return tmp_path


def test_celeba(celeba):
    options = {"channels": 3, "image_size": 64, "classes": None}
    module = ready(data.CelebA, celeba, **options)
    assert len(module.train_set) == 4 and len(module.test_set) == 3
    images, labels = first(module.train_dataloader())
    assert images.shape == (4, 3, 64, 64) and labels.tolist() == [-1] * 4
    assert images[:, :, 2:-2, 2:-2].max() < -0.95  # all but what JPEG blurs


def test_celeba_refuses_damaged_and_missing_files(celeba):
    images = celeba / "celeba" / "img_align_celeba"
    module = ready(data.CelebA, celeba, channels=3, classes=None)
    cut(images / "000006.jpg")
    with pytest.raises(OSError, match=r"06\.jpg cannot be read .*; replace it, or move"):
        first(module.test_dataloader())
    Image.new("RGB", (100, 218)).save(images / "000006.jpg")
    (images / "000007.jpg").unlink()
    with pytest.raises(OSError, match=r"2 of 3 files .*06\.jpg, .*07\.jpg \(ValueError.* than 148"):
        ready(data.CelebA, celeba, channels=3, classes=None)
    cut(celeba / "celeba" / "list_eval_partition.txt", 0.55)
    with pytest.raises(OSError, match=r"CelebA in .* is missing or damaged \(ValueError"):
        ready(data.CelebA, celeba, classes=None)
