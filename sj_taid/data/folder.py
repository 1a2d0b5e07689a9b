"""Still images read from their files when they are asked for: any folder, and CelebA."""

import os
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Annotated, ClassVar

from PIL import Image, ImageOps
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2 import functional

from .._internal.checks import expand_home
from .image import ImageData, Torchvision
from .samples import Samples

UNLABELLED = -1
#: folders of these names alone are parts of a data set, not its classes
SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval"}


def look_at(path: str, crop: int | None = None) -> None:
    """Read the head of an image's file, and refuse what :func:`read_image` refuses by it."""
    with Image.open(path) as image:
        _check(image, crop)


def _check(image: Image.Image, crop: int | None) -> None:
    if image.mode[0] in "IF":  # convert would cut at 255, not scale
        raise ValueError("it has more than 8 bits per pixel and channel; convert it to 8")
    if crop is not None and crop > min(image.size):  # center_crop would add a black border
        raise ValueError(f"it has {image.size} pixels, fewer than {crop}")


def read_image(path: str, channels: int, size: int, crop: int | None = None) -> Tensor:
    """Read an image, of which the middle ``crop`` pixels, or the largest square, are resized."""
    with Image.open(path) as opened:
        image: Image.Image = opened
        ImageOps.exif_transpose(image, in_place=True)
        _check(image, crop)
        image = image.convert("L" if channels == 1 else "RGB")
        if crop is not None:
            image = functional.center_crop(image, [crop])
        image = functional.center_crop(functional.resize(image, [size]), [size])
        return functional.pil_to_tensor(image)


@dataclass(kw_only=True, eq=False, repr=False)
class ImageFolder(ImageData):
    """The images of any folder: files of the formats of torchvision's ``ImageFolder``.

    Each folder in ``root`` is a class, in the order of their names, and holds all its images;
    without any, the images are unlabelled. Links are followed, and an image that several lead to
    is one; hidden files and folders, whose names begin with a dot, are left out.

    Args:
        root: the folder, for training.
        classes: number of classes; None counts the folders.
        test_root: a second folder like it, for testing.
        test_share: without ``test_root``, this share of each class is for testing: the last ones
            in the order of their names, at least one.
        batch_size: None makes 20 batches or more of the training images, of at most 100.
        num_workers: None takes a process per core, at most 4.

    Raises:
        FileNotFoundError: no such folder, or no image in it.
        ValueError: other classes in ``test_root`` than in ``root``, images next to the folders of
            classes, a class of one image without ``test_root``, or an image that is in two classes,
            or in both roots.
        OSError: images that cannot be read, all by name if their heads say so, else when one is
            asked for.
    """

    root: Path
    test_root: Path | None = None
    test_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    batch_size: PositiveInt | None = None  # type: ignore[assignment]
    num_workers: NonNegativeInt | None = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        self.root = expand_home(self.root)
        if self.test_root is not None:
            self.test_root = expand_home(self.test_root)
        if self.classes is None:
            self.classes = len(_class_names(self.root, "dataset.root")) or None
        if self.num_workers is None:
            self.num_workers = min(4, os.cpu_count() or 1)
        super().__post_init__()

    def setup(self, stage: str | None = None) -> None:
        super().setup(stage)
        if self.batch_size is None:
            self.batch_size = min(100, max(2, len(self.train_set) // 20))

    def load(self) -> tuple[Samples, Samples]:
        names = _class_names(self.root, "dataset.root")
        if self.classes and not names:
            raise ValueError(f"{self.root} holds no folders of classes; set dataset.classes=null")
        self.class_names = names
        files = self._scan(self.root, names)
        if self.test_root is None:
            return files.hold_out(self.test_share)
        test_names = _class_names(self.test_root, "dataset.test_root")
        if test_names != names:
            raise ValueError(
                f"dataset.test_root has the classes {', '.join(test_names) or 'of no folder'}, but "
                f"dataset.root {', '.join(names) or 'of no folder'}"
            )
        tests = self._scan(self.test_root, names)
        trained, tested = ({*map(os.path.realpath, part.samples)} for part in (files, tests))
        if both := sorted(trained & tested):
            raise ValueError(
                f"{len(both)} images of dataset.test_root are in dataset.root too, such as "
                f"{both[0]}; keep each in one of them, or leave dataset.test_root out"
            )
        return files, tests

    def _scan(self, root: Path, names: list[str]) -> Samples:
        if names and (loose := sorted(filter(_is_image, (p.name for p in root.iterdir())))):
            raise ValueError(
                f"{root} has folders of classes, and {len(loose)} images next to them, such as "
                f"{loose[0]}; move each into the folder of its class, or out of {root}"
            )
        found: dict[str, str] = {}
        labels = []
        for label, name in [*enumerate(names)] or [(UNLABELLED, "")]:
            images = _images(root / name)
            if not images:
                raise FileNotFoundError(
                    f"no image in {root / name}, of {', '.join(IMG_EXTENSIONS)}"
                )
            if both := found.keys() & images.keys():
                first = min(both)
                raise ValueError(
                    f"{found[first]} and {images[first]} are one image in two classes; remove a "
                    "link, so that it is in one"
                )
            found |= images
            labels += [label] * len(images)
        read = partial(read_image, channels=self.channels, size=self.image_size)
        remedy = f"replace it, or move it out of {root}"
        return Samples([*found.values()], labels, read, remedy, look_at)


def _is_image(name: str) -> bool:
    return not name.startswith(".") and name.lower().endswith(IMG_EXTENSIONS)


def _images(folder: Path) -> dict[str, str]:
    """The path of each image in the folder or below it, in their order, by its real path."""
    found: dict[str, str] = {}
    walked = set()  # or a link to a folder above would lead round and round
    for here, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(here)) in walked:
            folders.clear()
            continue
        walked.add(real)
        folders[:] = sorted(name for name in folders if name[0] != ".")
        for name in sorted(filter(_is_image, files)):
            path = str(Path(here, name))
            found.setdefault(os.path.realpath(path), path)
    return dict(sorted(found.items(), key=itemgetter(1)))


def _class_names(root: Path, option: str) -> list[str]:
    if not root.is_dir():
        raise FileNotFoundError(f"no folder at {option}={root}; point it to a folder of images")
    names = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if names and {name.lower() for name in names} <= SPLITS:
        raise ValueError(
            f"{option}={root} would have the classes {', '.join(names)}; point it to one of these "
            "folders (dataset.root to that for training, dataset.test_root to that for testing)"
        )
    return names


@dataclass(kw_only=True, eq=False, repr=False)
class CelebA(Torchvision):
    """CelebA's aligned faces, 218x178: the 148 pixels in the middle, resized.

    162770 images are for training and 19962 for testing; the 19867 for validation are left out.
    There are no labels.

    Source: Z. Liu, P. Luo, X. Wang and X. Tang, ICCV 2015.
    """

    sources: ClassVar = {"CelebA": (162_770, 19_962)}
    source: str = "CelebA"

    def load(self) -> tuple[Samples, Samples]:
        return self._listed("0"), self._listed("2")

    def _listed(self, part: str) -> Samples:
        images = self.path / "img_align_celeba"
        with self._remedy():
            partition = (self.path / "list_eval_partition.txt").read_text(encoding="utf-8")
            rows = [line.split() for line in partition.splitlines()]
            names = [name for name, of in rows if of == part]
        paths = [str(images / name) for name in names]
        remedy = f"replace it, or move {images} away and run again with dataset.download=true"
        read = partial(read_image, channels=self.channels, size=self.image_size, crop=148)
        look = partial(look_at, crop=148)
        return Samples(paths, [UNLABELLED] * len(paths), read, remedy, look)
