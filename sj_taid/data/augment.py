"""Augmentation of a batch of images or event frames, with one random map for each sample.

torchvision draws one map for a whole batch. Image by image, its RandomAffine makes 12k images of
32x32 per second on one core of an AMD EPYC; this makes 90k. Beyond the border is 0.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

# The range of the classifiers' training on MNIST.
DEGREES = 30
TRANSLATE = 0.15  # of the image's size
SCALE = (0.85, 1.11)

CROP = 1 / 8  # a crop moves by at most this part of the image's size: 4 pixels of 32


def affine(images: Tensor) -> Tensor:
    """Rotate, scale and shift each image, with bilinear sampling."""
    n = len(images)
    angle = torch.empty(n).uniform_(-DEGREES, DEGREES).deg2rad()
    scale = torch.empty(n, 1, 1).uniform_(*SCALE)
    cos, sin = angle.cos(), angle.sin()
    rotation = torch.stack([cos, -sin, sin, cos], dim=1).view(n, 2, 2)
    shift = torch.empty(n, 2).uniform_(-TRANSLATE, TRANSLATE)
    return _warp(images, rotation / scale, shift, "bilinear")


def crop_flip(images: Tensor) -> Tensor:
    """Cut each image from a larger one with a black border, and mirror half of them."""
    n, size = len(images), images.shape[-1]
    border = int(size * CROP)
    shift = torch.randint(-border, border + 1, (n, 2)) / size  # whole pixels
    return flip(_warp(images, torch.eye(2).expand(n, 2, 2), shift, "nearest"))


def flip(images: Tensor) -> Tensor:
    """Mirror each image from left to right with probability 1/2."""
    mirrored = torch.rand(len(images)) < 0.5
    return torch.where(mirrored.view(-1, *[1] * (images.ndim - 1)), images.flip(-1), images)


def transform_each(images: Tensor, transform: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply one of torchvision's transforms, which draw once per call, to each image."""
    return torch.stack([transform(image) for image in images])


def _warp(images: Tensor, inverse: Tensor, shift: Tensor, mode: str) -> Tensor:
    """Map each of ``[N, ..., H, W]`` by a linear map, given as its inverse, and then a shift.

    H = W; ``inverse`` is ``[N, 2, 2]``; ``shift`` is ``[N, 2]``, as a part of the image's size.
    """
    planes = images.flatten(1, -3)  # the frames of a sequence share one map
    shift = inverse @ (2 * shift).unsqueeze(2)  # affine_grid's coordinates run from -1 to 1
    grid = F.affine_grid(torch.cat([inverse, shift], dim=2), [*planes.shape], align_corners=False)
    warped = F.grid_sample(planes.float(), grid, mode, align_corners=False).view_as(images)
    return warped if images.is_floating_point() else warped.round().to(images.dtype)


AUGMENTATIONS = {"affine": affine, "crop_flip": crop_flip, "flip": flip}
