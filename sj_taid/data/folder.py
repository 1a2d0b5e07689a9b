"""Still images that are read from their files when they are asked for: any folder, and CelebA."""

from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from torch import Tensor
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

from .base import Files
from .image import ImageData, Torchvision

UNLABELLED = -1
SPLIT = {"train", "test", "val", "valid", "validation"}


def image_files(
    paths: list[str],
    labels: list[int],
    data: ImageData,
    remedy: str,
    crop: int | None = None,
) -> Files:
    """Images of any size; of each a square in the middle is resized.

    The square has ``crop`` pixels in height and width; None takes the largest one.
    """
    mode = "L" if data.channels == 1 else "RGB"
    read = partial(read_image, mode=mode, size=data.image_size, crop=crop)
    return Files(paths, labels, read, remedy)


def read_image(path: str, mode: str, size: int, crop: int | None = None) -> Tensor:
    with Image.open(path) as opened:
        image: Image.Image = opened
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I;16"):  # convert would cut at 255, not scale
            image = image.convert("I").point(lambda value: value * (1 / 257))
        image = image.convert(mode)
        if crop is not None:
            if crop > min(image.size):  # center_crop would add a black border
                raise ValueError(
                    f"its {image.width}x{image.height} pixels are fewer than dataset.crop={crop}"
                )
            image = v2.functional.center_crop(image, [crop])
        image = v2.functional.center_crop(v2.functional.resize(image, [size]), [size])
        return v2.functional.pil_to_tensor(image)


class ImageFolder(ImageData):
    """The images of a folder of your own.

    Each folder in ``root`` is a class, in the order of their names; without any, the images are
    unlabelled. Hidden files and folders, whose names begin with a dot, are left out.

    Args:
        root: the folder, for training.
        classes: how many there are; None counts the folders.
        test_root: a second one like it, for testing.
        test_share: without ``test_root``, this share of each class is for testing: the last ones
            in the order of their names.
        crop: take a square of so many pixels from the middle of each image; None takes the largest.

    Raises:
        FileNotFoundError: no such folder, or no image in it.
        ValueError: other classes than ``classes`` says, or than those of ``root``; folders that are
            no classes, but the parts of a split.
        RuntimeError: an image that cannot be read, when its turn comes; names all such images.
    """

    def __init__(
        self,
        root: str,
        test_root: str | None = None,
        test_share: float = 0.1,
        classes: int | None = None,
        crop: int | None = None,
        **options: Any,
    ) -> None:
        if crop is not None and crop < 1:
            raise ValueError(f"dataset.crop must be null or at least 1, but it is {crop}")
        self.crop = crop
        self.root = Path(root).expanduser()
        if classes is None and self.root.is_dir():
            classes = len(_class_names(self.root, "dataset.root")) or None
        super().__init__(classes=classes, **options)
        self.test_root = None if test_root is None else Path(test_root).expanduser()
        self.test_share = test_share

    def load(self) -> tuple[Files, Files]:
        names = _class_names(self.root, "dataset.root")
        if self.classes not in (None, len(names)):
            raise ValueError(
                f"dataset.classes={self.classes}, but {self.root} holds {len(names)} folders of "
                f"classes ({', '.join(names)}); set dataset.classes={len(names) or 'null'}"
            )
        self.classes = len(names) or None
        self.class_names = names
        files = self._scan(self.root, names)
        if self.test_root is None:
            train, test = files.hold_out(self.test_share)
            if not (0 < self.test_share < 1 and len(train) and len(test)):
                raise ValueError(
                    f"dataset.test_share={self.test_share} of the {len(files)} images in "
                    f"{self.root} leaves {len(train)} for training and {len(test)} for testing; "
                    "choose another share, or give a folder for testing as dataset.test_root"
                )
            return train, test
        test_names = _class_names(self.test_root, "dataset.test_root")
        if test_names != names:
            raise ValueError(
                f"dataset.test_root={self.test_root} must hold the same folders of classes as "
                f"dataset.root ({', '.join(names)}), but holds {', '.join(test_names)}"
            )
        return files, self._scan(self.test_root, names)

    def _scan(self, root: Path, names: list[str]) -> Files:
        paths, labels = [], []
        classes = [(label, root / name) for label, name in enumerate(names)]
        for label, folder in classes or [(UNLABELLED, root)]:
            found = sorted(
                str(path)
                for path in folder.rglob("*")
                if path.suffix.lower() in IMG_EXTENSIONS
                and not any(part.startswith(".") for part in path.relative_to(folder).parts)
            )
            if not found:
                raise FileNotFoundError(
                    f"no image in {folder}: expected files that end in {', '.join(IMG_EXTENSIONS)}"
                    "; point dataset.root to a folder of images, or of one such folder a class"
                )
            paths += found
            labels += [label] * len(found)
        remedy = f"replace it, or move it out of {root}"
        return image_files(paths, labels, self, remedy, self.crop)


def _class_names(root: Path, option: str) -> list[str]:
    if not root.is_dir():
        raise FileNotFoundError(f"no folder at {option}={root}; point it to a folder of images")
    names = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if "train" in names and SPLIT.issuperset(names):
        raise ValueError(
            f"{option}={root} holds the parts of a split ({', '.join(names)}), not classes; choose "
            f"dataset.root={root / 'train'} and dataset.test_root={root / 'test'}"
        )
    return names


class CelebA(Torchvision):
    """CelebA's aligned faces, 218x178: the 148 pixels in the middle, resized.

    162770 images are for training, 19962 for testing, and 19867 for validation, which are used with
    ``validation="own"``. There are no labels.

    Source: Z. Liu, P. Luo, X. Wang and X. Tang, ICCV 2015.
    """

    source = datasets.CelebA
    folder = source.base_folder
    files = PARTITION, IMAGES = "list_eval_partition.txt", "img_align_celeba"
    TRAIN, VALIDATION, TEST = "0", "1", "2"  # in the partition

    def load(self) -> tuple[Files, Files]:
        rows = self._rows()
        return self._part(rows, self.TRAIN), self._part(rows, self.TEST)

    def load_validation(self) -> Files:
        return self._part(self._rows(), self.VALIDATION)

    def _rows(self) -> list[list[str]]:
        """The names of the images and the part that each is of."""
        self._require_files()
        md5 = next(md5 for _, md5, name in self.source.file_list if name == self.PARTITION)
        self._require_md5(self.PARTITION, md5)
        text = (self.place / self.PARTITION).read_text(encoding="utf-8")
        rows = [line.split() for line in text.splitlines()]
        unpacked = {path.name for path in (self.place / self.IMAGES).iterdir()}
        lost = [name for name, _ in rows if name not in unpacked]
        if lost:
            raise self._damaged(
                self.IMAGES, f"it lacks {len(lost)} of {len(rows)} images, {lost[0]} first"
            )
        return rows

    def _part(self, rows: list[list[str]], part: str) -> Files:
        images = self.place / self.IMAGES
        paths = [str(images / name) for name, of in rows if of == part]
        remedy = f"replace it, or move {images} away and run again with dataset.download=true"
        labels = [UNLABELLED] * len(paths)
        return image_files(paths, labels, self, remedy, crop=148)
