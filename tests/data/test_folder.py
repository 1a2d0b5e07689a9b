"""Images in files, made up on disk: folders and CelebA, what they give and refuse."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

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
    for name, n in (("cat", 8), ("dog", 20), (".thumbnails", 3)):
        write_images(tmp_path / "train" / name, n)
        write_images(tmp_path / "test" / name, 2, mode="L", suffix="jpg")
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

    with pytest.raises(ValueError, match=r"classes=10, but test has 2: cat, dog"):
        folder(tmp_path / "train", classes=10)
    shutil.rmtree(tmp_path / "test" / "dog")
    with pytest.raises(ValueError, match=r"test_root has the classes cat, but"):
        folder(**apart)


@pytest.mark.parametrize(("n", "size"), [(3, 2), (200, 9), (5000, 100)])
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"root": "nowhere"}, r"no folder at dataset\.root=nowhere"),
        ({"test_root": "empty"}, r"no image in empty, of .*\.png"),
        ({"classes": 10}, "holds no folders of classes"),
        ({"test_root": "cats"}, "test_root has the classes cat, but dataset.root of no folder"),
        ({"test_share": 1.5}, r"test_share: input should be less than 1, but it is 1\.5"),
    ],
)
def test_image_folder_refuses(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "few", 4)
    write_images(tmp_path / "cats" / "cat", 2)
    (tmp_path / "empty").mkdir()
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        folder(**{"root": "few"} | options)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
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


#: links below a folder of the classes a and b, and where they lead; and what is then refused
LINKS = {
    "a/loop -> a": None,
    "a/more/loop -> a": None,
    "a/more/to/up -> a/more": None,
    "a/again -> a/more": None,
    "a/99.png -> a/00.png": None,
    "b/09.png -> ../far/00.png, b/10.png -> ../far/00.png": None,
    "b/far -> ../far, ../far/back -> b": None,
    "a/0 -> a, a/more/0 -> a, a/more/1 -> a/more, b/0 -> b": None,
    "a/up -> .": r"b/00\.png and .*a/up/b/00\.png|a/up/b/00\.png and .*b/00\.png",
    "a/b -> b": "are one image in two classes; remove a link, so that it is in one",
    "b/far -> ../far, a/far -> ../far": r"a/far/00\.png and .*b/far/00\.png are one image",
    "a/03.png -> b/00.png": r"a/03\.png and .*b/00\.png are one image in two classes",
    "c -> b": r"b/00\.png and .*c/00\.png are one image",
    "all -> .": "are one image in two classes",
}


@pytest.mark.parametrize(("links", "refusal"), LINKS.items())
def test_image_folder_has_each_image_once_however_links_go(tmp_path, links, refusal):
    for name in ("a", "a/more", "a/more/to", "b", "../far", "../test/a", "../test/b"):
        write_images(tmp_path / "root" / name, 3)
    real = {path.resolve() for path in tmp_path.glob("root/**/*.png")}
    for link in links.split(", "):
        place, target = (tmp_path / "root" / path for path in link.split(" -> "))
        place.symlink_to(target.resolve())
    if refusal:
        with pytest.raises(ValueError, match=refusal):
            folder(tmp_path / "root")
        return
    if "far" in links:
        real |= {*tmp_path.glob("far/00.png" if "png" in links else "far/*.png")}
    module = folder(tmp_path / "root", test_share=0.5)
    paths = [*module.train_set.samples, *module.test_set.samples]
    assert sorted(Path(path).resolve() for path in paths) == sorted(real)
    whole = folder(tmp_path / "root", test_root=tmp_path / "test")
    assert len(whole.train_set) == len(real)


@pytest.mark.parametrize("link", ["test/a/far", "test/a/00.png", "test"])
def test_image_folder_refuses_to_test_on_images_that_are_trained_on(tmp_path, link):
    write_images(tmp_path / "root" / "a", 3)
    if link != "test":
        write_images(tmp_path / "test" / "a", 3)
        (tmp_path / "test" / "a" / "00.png").unlink()
    target = tmp_path / "root" / {"test": "", "test/a/far": "a"}.get(link, "a/01.png")
    (tmp_path / link).symlink_to(target)
    with pytest.raises(ValueError, match=r"images of dataset\.test_root are in .*; keep each in"):
        folder(tmp_path / "root", test_root=tmp_path / "test")


@pytest.mark.parametrize("names", ["train", "Train Test", "train val test", "training dev"])
def test_image_folder_refuses_folders_that_are_no_classes(tmp_path, names):
    for name in names.split():
        write_images(tmp_path / name / "cat", 2)
    with pytest.raises(ValueError, match=r"^dataset\.root=.* point it to one of these"):
        folder(tmp_path)
    write_images(tmp_path / "station", 2)  # so that they may be classes
    assert folder(tmp_path).classes == 1 + len(names.split())


@pytest.mark.parametrize("test_root", [False, True])
def test_image_folder_refuses_images_next_to_classes(tmp_path, test_root):
    for part in ("train", "test"):
        write_images(tmp_path / part / "cat", 4)
    beside = tmp_path / ("test" if test_root else "train")
    for name in (".hidden.png", "notes.txt"):
        (beside / name).write_bytes(b"")
    roots = {"root": tmp_path / "train", "test_root": tmp_path / "test" if test_root else None}
    assert folder(**roots).classes == 1
    write_images(beside, 2, suffix="JPG")
    with pytest.raises(
        ValueError, match=r"2 images next to them, such as 00\.JPG; move each .*, or out"
    ):
        folder(**roots)


def test_image_folder_names_a_damaged_image(tmp_path):
    write_images(tmp_path, 2)
    Image.effect_noise((64, 64), 50).save(tmp_path / "00.png")
    cut(tmp_path / "00.png")  # whose head is whole
    module = folder(tmp_path, test_share=0.5)
    with pytest.raises(OSError, match=r"00\.png cannot be read \(.*\); replace it, or"):
        first(module.train_dataloader())


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no image"),
    "link": lambda path: (path.unlink(), path.symlink_to(f"{path}.gone")),
    **{
        str(dtype): lambda path, dtype=dtype: Image.fromarray(np.zeros((9, 9), dtype)).save(
            path, "tiff"
        )
        for dtype in ("uint16", "int32", "float32")
    },
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
@pytest.mark.parametrize("wrong", [[3], [0, 3], range(4, 16)])
def test_image_folder_names_all_files_that_are_no_images_before_a_training(tmp_path, damage, wrong):
    write_images(tmp_path, 20)
    for n in wrong:
        damage(tmp_path / f"{n:02}.png")
    with pytest.raises(OSError, match=f"{len(wrong)} of 18 files cannot be read: ") as caught:
        folder(tmp_path, limit=18)
    assert "of each: replace it, or move" in str(caught.value)
    text, named = str(caught.value).partition(" (")[0], [*wrong][:10]
    assert all(f"{n:02}.png" in text for n in named)
    assert ("2 more" in text) == (len(wrong) > 10) and text.count(".png") == len(named)


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
