"""Labelled images from arrays or folders, as a network wants them."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["CIFAR_FILE", "IMAGENET_FILE", "DataError", "Dataset", "Images", "View", "load_dataset"]

CIFAR_FILE, IMAGENET_FILE = "cifar10.npz", "imagenet_sample.npz"
_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
_ENLARGED = 256 / 224  # shorter side before the centre crop, as the networks of torchvision were evaluated

Pixels = Callable[[int], np.ndarray]


class DataError(Exception):
    """A data set that is not there, cannot be read, or does not fit the network."""


@dataclass(frozen=True)
class View:
    """How a network sees images: mean and standard deviation of the RGB values (0 to 1), height and width in pixels,
    and whether it was trained on images that are turned by 180 degrees."""

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    size: int = 224
    rotated: bool = False


class Images:
    """Images with labels (int64), decoded on demand. ``pixels``: from a number to RGB of (height, width, 3), uint8."""

    def __init__(self, pixels: Pixels, labels: Tensor, view: View) -> None:
        self.labels, self.view = labels, view
        self._pixels = pixels
        self._mean = torch.tensor(view.mean).view(1, 3, 1, 1)
        self._std = torch.tensor(view.std).view(1, 3, 1, 1)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Sequence[int]) -> Tensor:
        """Images ``indices`` as float32 of shape (len(indices), 3, size, size), contiguous.

        Raises:
            DataError: an image cannot be read, or they are not of one size.
        """
        pixels = torch.from_numpy(_stack([self._pixels(i) for i in indices]))
        # In memory the images are channels-last; convolutions would carry that layout on.
        images = pixels.permute(0, 3, 1, 2).contiguous().float() / 255
        size = (self.view.size, self.view.size)
        if images.shape[-2:] != size:
            images = F.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)
        if self.view.rotated:
            images = images.flip(2, 3)
        return (images - self._mean) / self._std

    def first(self, count: int) -> Images:
        """The first ``count`` images."""
        return self.of(range(min(count, len(self))))

    def of(self, chosen: Sequence[int]) -> Images:
        """The images ``chosen``, in that order."""
        places = list(chosen)
        return Images(lambda i: self._pixels(places[i]), self.labels[places], self.view)

    def mirrored(self) -> Images:
        """The same images, left and right exchanged."""
        return Images(lambda i: self._pixels(i)[:, ::-1], self.labels, self.view)

    def decoded(self) -> Images:
        """The same images, all decoded now: for images that are looked at again and again."""
        found = [self._pixels(i) for i in range(len(self))]
        return Images(found.__getitem__, self.labels, self.view)


@dataclass(frozen=True)
class Dataset:
    """``test``: images to evaluate on. ``calibration``: further ones for scores that need data; None where there are
    none but ``test``. ``mixed``: whether the first images of ``test`` are a fair sample of all."""

    name: str
    test: Images
    calibration: Images | None
    mixed: bool

    def split(self, count: int | None, held_out: int, seed: int) -> tuple[Images, Images]:
        """Images to evaluate on, ``count`` or all of them (None), and ``held_out`` others to calibrate with.

        Where the set has no calibration images of its own, they are taken from the test images: a sample, fixed by
        ``seed``, which is not evaluated on. With ``count=None`` nothing is left for it: the second set is empty.
        """
        places = range(len(self.test))
        if not self.mixed:
            order = torch.randperm(len(self.test), generator=torch.Generator().manual_seed(seed))
            places = order.tolist()  # type: ignore[assignment]
        if self.calibration is not None:
            return self.test.of(places[:count]), self.calibration.first(held_out)
        if count is None:
            return self.test, self.test.of([])
        kept = len(places) - min(held_out, len(places) // 2)
        return self.test.of(places[: min(count, kept)]), self.test.of(places[kept:])


def load_dataset(path: Path, preferred: str, view: View) -> Dataset:
    """The images at ``path``: a ``.npz`` file of arrays, a folder with the file ``preferred``, or a folder that has a
    folder of images for each class (classes in alphabetical order).

    The arrays are ``test_images`` (or ``images``), uint8 of shape (count, height, width, 3), with ``test_labels`` (or
    ``labels``), int64; ``calib_images`` and ``calib_labels`` beside them for calibration; or images as JPEG files in
    one array: ``jpeg`` (uint8) with ``offsets``.

    Raises:
        DataError: there is no such thing, or it is not what it should be.
    """
    if path.is_dir() and preferred and (path / preferred).is_file():
        path = path / preferred
    if path.is_file() and path.suffix == ".npz":
        return _from_arrays(path, view)
    if path.is_dir():
        return _from_folder(path, preferred, view)
    raise DataError(f"{path} is no folder and no .npz file of images")


def _from_arrays(path: Path, view: View) -> Dataset:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files if key != "names"}
    except Exception as error:  # a damaged archive, or another kind of file, may raise anything
        raise DataError(f"cannot read {path} as arrays: {error}") from error
    if {"jpeg", "offsets", "labels"} <= arrays.keys():
        jpeg, offsets = arrays["jpeg"], arrays["offsets"]
        labels = _labels(path, arrays["labels"], len(offsets) - 1)
        return Dataset(
            path.stem, Images(lambda i: _decoded(jpeg[offsets[i] : offsets[i + 1]]), labels, view), None, False
        )
    for prefix, mixed in (("test_", True), ("", False)):
        if f"{prefix}images" in arrays and f"{prefix}labels" in arrays:
            test = _stacked(path, arrays[f"{prefix}images"], arrays[f"{prefix}labels"], view)
            calibration = None
            if "calib_images" in arrays and "calib_labels" in arrays:
                calibration = _stacked(path, arrays["calib_images"], arrays["calib_labels"], view)
            return Dataset(path.stem, test, calibration, mixed)
    raise DataError(
        f"{path} holds {', '.join(arrays) or 'nothing'}: arrays called test_images and test_labels, images and labels, "
        "or jpeg, offsets and labels are needed"
    )


def _stacked(path: Path, images: np.ndarray, labels: np.ndarray, view: View) -> Images:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise DataError(
            f"{path}: images must be uint8 of shape (count, height, width, 3), not {images.dtype} {images.shape}"
        )
    return Images(images.__getitem__, _labels(path, labels, len(images)), view)


def _stack(images: Sequence[np.ndarray]) -> np.ndarray:
    if len(sizes := sorted({image.shape[:2] for image in images})) > 1:
        raise DataError(f"images of different sizes, {sizes[0]} and {sizes[1]} pixels: bring them to one size")
    return np.stack(images)


def _labels(path: Path, labels: np.ndarray, count: int) -> Tensor:
    if labels.shape != (count,) or labels.dtype.kind not in "iu" or count == 0:
        raise DataError(
            f"{path}: {count} images need as many whole numbers as labels, not {labels.dtype} {labels.shape}"
        )
    return torch.from_numpy(labels.astype(np.int64))


def _from_folder(path: Path, preferred: str, view: View) -> Dataset:
    classes = sorted(folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    files, labels = [], []
    for label, folder in enumerate(classes):
        found = sorted(file for file in folder.rglob("*") if file.suffix.lower() in _ENDINGS)
        files += found
        labels += [label] * len(found)
    if not files:
        wanted = f"{preferred}, nor " if preferred else ""
        raise DataError(
            f"{path} has neither {wanted}folders with images ({', '.join(_ENDINGS)}) in it, one for each class"
        )
    return Dataset(path.name, Images(lambda i: _cropped(files[i], view.size), torch.tensor(labels), view), None, False)


def _cropped(file: Path, size: int) -> np.ndarray:
    """The middle of an image file, after its shorter side was brought to 8/7 of ``size``."""
    Image = _pillow()
    try:
        with Image.open(file) as opened:
            image = opened.convert("RGB")
            scale = round(size * _ENLARGED) / min(image.size)
            wide, high = (max(size, round(side * scale)) for side in image.size)
            image = image.resize((wide, high), Image.Resampling.BILINEAR)
            left, top = (wide - size) // 2, (high - size) // 2
            return np.asarray(image.crop((left, top, left + size, top + size)))
    except OSError as error:
        raise DataError(f"cannot read {file}: {error}") from error


def _decoded(jpeg: np.ndarray) -> np.ndarray:
    Image = _pillow()
    with Image.open(io.BytesIO(jpeg.tobytes())) as image:
        return np.asarray(image.convert("RGB"))


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError("image files need pillow: pip install pillow") from error
    return Image
