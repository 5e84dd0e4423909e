"""Loads images to classify: scikit-learn's digits, the MNIST family, or a user's `.npz` files.

Nothing is downloaded here; download.py does that. The files of the MNIST family have torchvision's
layout, but torchvision is not needed to read them.
"""

import gzip
import math
import os
import struct
import zipfile
import zlib
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from geodesic.files import user_path
from learned_opt.errors import DataError

# Our names of the MNIST family, and torchvision's names of the classes and folders.
IDX_FOLDERS = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST"}
IDX_FILES = {
    (split, kind): f"{prefix}-{kind}-{layout}-ubyte"
    for split, prefix in (("train", "train"), ("test", "t10k"))
    for kind, layout in (("images", "idx3"), ("labels", "idx1"))
}

_CHANNELS = (1, 3, 4)  # numbers of channels: gray, color, and color with transparency
_GZIP = b"\x1f\x8b"  # the first bytes of a gzip file

_DIGITS_TRAIN = 1437  # four fifths of the 1,797 images, rounded down; 360 remain to test on
_DIGITS_SPLIT_SEED = 0

# The errors of gzip, zipfile and numpy for files that are truncated, altered or of another kind. A
# damaged header may ask for more memory than there is, or for an unknown compression
# (NotImplementedError, which is a RuntimeError). Opening a .npy file as an archive is a TypeError.
DAMAGED = (
    OSError,
    EOFError,
    LookupError,
    ValueError,
    ArithmeticError,
    MemoryError,
    RuntimeError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
    TypeError,
)


@dataclass(frozen=True)
class ImageData:
    """A training set and a test set of labelled images.

    Pixels are standardized by the mean and the standard deviation of all pixels of the training
    set, two scalars. The same two numbers standardize the test set, and channels keep their
    relative brightness.

    Attributes:
        name: the name by which the set was loaded.
        train_x: (n, pixels) float32; images are flattened in the order of the file.
        train_y: (n,) int64 in [0, num_classes); every class occurs.
        test_x: (m, pixels) float32.
        test_y: (m,) int64 in [0, num_classes).
        num_classes: the largest training label plus one.
        image_shape: the shape of an image before flattening, (height, width) or
            (height, width, channels).
    """

    name: str
    train_x: torch.Tensor
    train_y: torch.Tensor
    test_x: torch.Tensor
    test_y: torch.Tensor
    num_classes: int
    image_shape: tuple[int, ...]


def load_images(name: str, data_root: str | Path | None = None) -> ImageData:
    """Returns a data set by name. Results are cached and shared, so do not write to their tensors.

    Args:
        name: "digits" (bundled with scikit-learn, 1437 train and 360 test images of 8 x 8);
            "mnist", "fashion-mnist" or "kmnist" (`MNIST/raw/train-images-idx3-ubyte` and its three
            companions under `data_root`, each plain or `.gz`); or a folder under `data_root`, or
            an absolute path, with `train.npz` and `test.npz`. These contain `images` (n, ...)
            uint8, with channels last, and `labels` (n,) integers.
        data_root: the folder of data sets; the default is `$LEARNED_OPT_DATA`. "digits" needs none.

    Raises:
        DataError: a file is missing, damaged or of another layout; the message names it.
    """
    if name == "digits":
        return _load("digits", None)
    return _load(name, find_data(IDX_FOLDERS.get(name, name), data_root))


def find_data(name: str, data_root: str | Path | None = None) -> Path:
    """Returns `name` if it is an absolute path, else `name` under `data_root` or $LEARNED_OPT_DATA.

    Raises:
        DataError: `name` is not absolute, and neither a folder nor the variable is given.
    """
    path = user_path(name, "data", DataError)
    if path.is_absolute():
        return path
    root = os.environ.get("LEARNED_OPT_DATA") if data_root is None else data_root
    if not root:
        raise DataError(
            f"data set {name!r} is read from a folder, but none is given; pass data_root, or set "
            "LEARNED_OPT_DATA to the folder of your data sets (only 'digits' and 'markov' need "
            "neither)"
        )
    folder = user_path(root, "data_root", DataError) / path
    return user_path(folder, "data", DataError).absolute()


# A benchmark alternates between a few sets, each of about 0.2 GB as float32.
@lru_cache(maxsize=4)
def _load(name: str, folder: Path | None) -> ImageData:
    if folder is None:
        splits = _read_digits()
    elif name in IDX_FOLDERS:
        splits = _read_idx_folder(folder)
    else:
        splits = _read_npz_folder(folder)
    (train_images, train_labels), (test_images, test_labels) = splits
    if train_images.shape[1:] != test_images.shape[1:]:
        raise DataError(
            f"{name!r} in {folder}: training images are {train_images.shape[1:]} and test images "
            f"{test_images.shape[1:]}; give both splits one shape"
        )
    classes = np.unique(train_labels)
    num_classes = len(classes)
    if classes[0] != 0 or classes[-1] != num_classes - 1:
        raise DataError(
            f"{name!r} in {folder}: training labels must be 0, 1, ... without a gap, but they are "
            f"{num_classes} values from {classes[0]} to {classes[-1]}; renumber them"
        )
    if test_labels.min() < 0 or test_labels.max() >= num_classes:
        raise DataError(
            f"{name!r} in {folder}: test labels are from {test_labels.min()} to "
            f"{test_labels.max()}, but training labels from 0 to {num_classes - 1}; renumber them"
        )
    standardised = _standardised_levels(name, train_images)
    return ImageData(
        name=name,
        train_x=torch.from_numpy(standardised[train_images.reshape(len(train_images), -1)]),
        train_y=torch.from_numpy(train_labels.astype(np.int64)),
        test_x=torch.from_numpy(standardised[test_images.reshape(len(test_images), -1)]),
        test_y=torch.from_numpy(test_labels.astype(np.int64)),
        num_classes=num_classes,
        image_shape=tuple(train_images.shape[1:]),
    )


def _standardised_levels(name: str, images: np.ndarray) -> np.ndarray:
    """Returns (x - mean) / std of each uint8 grey level x, (256,) float32.

    Mean and standard deviation are computed from the histogram of `images`. Its integer counts are
    exact, so the result does not depend on the number of threads, and no float copy is made.
    """
    counts = sum(np.bincount(image.ravel(), minlength=256) for image in images)
    levels = np.arange(256)
    mean = counts @ levels / counts.sum()
    std = math.sqrt(counts @ (levels - mean) ** 2 / counts.sum())
    if std == 0:
        raise DataError(f"{name!r}: every pixel of the training set is {mean:g}; use other images")
    return ((levels - mean) / std).astype(np.float32)


_Split = tuple[np.ndarray, np.ndarray]  # images (n, ...) uint8, labels (n,) integers


def _read_digits() -> tuple[_Split, _Split]:
    from sklearn.datasets import load_digits  # local, because importing it takes a second

    bunch = load_digits()
    images = bunch.images.astype(np.uint8)  # grey levels from 0 to 16, stored as floats
    order = np.random.default_rng(_DIGITS_SPLIT_SEED).permutation(len(images))
    train, test = order[:_DIGITS_TRAIN], order[_DIGITS_TRAIN:]
    return (images[train], bunch.target[train]), (images[test], bunch.target[test])


def _read_npz_folder(folder: Path) -> tuple[_Split, _Split]:
    paths = {split: folder / f"{split}.npz" for split in ("train", "test")}
    missing = [str(path) for path in paths.values() if not path.is_file()]
    if missing:
        raise DataError(
            f"missing {', '.join(missing)}; write each with numpy.savez(path, images=images, "
            "labels=labels), with images (n, ...) uint8 and labels (n,) integers from 0. These "
            f"names need no .npz files: 'digits', {', '.join(map(repr, IDX_FOLDERS))}"
        )
    return _read_npz(paths["train"]), _read_npz(paths["test"])


def _read_npz(path: Path) -> _Split:
    try:
        with np.load(path, allow_pickle=False) as archive:
            images, labels = archive["images"], archive["labels"]
    except DAMAGED as error:
        raise DataError(
            f"{path} is not a complete .npz file with arrays 'images' and 'labels': {error}; write "
            "it again with numpy.savez"
        ) from error
    if images.dtype != np.uint8 or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"{path}: images must be uint8 and labels integers, got {images.dtype} and "
            f"{labels.dtype}; before numpy.savez, convert {_conversion(images, labels)}"
        )
    return _checked(images, labels, f"{path}")


def _conversion(images: np.ndarray, labels: np.ndarray) -> str:
    """Returns how to convert the images to uint8, or the labels to integers, without loss."""
    if images.dtype == np.uint8:
        return "labels with labels.astype(int), if they are whole numbers"
    if not images.size or not np.issubdtype(images.dtype, np.number) or np.iscomplexobj(images):
        return "images to grey levels from 0 to 255"
    low, high = images.min(), images.max()
    if low >= 0 and high <= 1:
        return "images with (255 * images).round().astype(numpy.uint8), as they are from 0 to 1"
    if low >= 0 and high <= 255:
        return "images with images.round().astype(numpy.uint8)"
    return (
        f"images, which are from {low:g} to {high:g}, to 0 to 255 before .astype(numpy.uint8), "
        "which does not scale"
    )


def _read_idx_folder(folder: Path) -> tuple[_Split, _Split]:
    raw = folder / "raw"
    stems = {key: raw / name for key, name in IDX_FILES.items()}
    paths = {
        key: next((p for p in (stem, Path(f"{stem}.gz")) if p.is_file()), None)
        for key, stem in stems.items()
    }
    missing = [str(stem) for key, stem in stems.items() if paths[key] is None]
    if missing:
        raise DataError(
            f"missing {', '.join(missing)} (each may also end in .gz); get them with "
            f"torchvision.datasets.{folder.name}(root={str(folder.parent)!r}, download=True)"
        )
    arrays = {key: _read_idx(paths[key], 3 if key[1] == "images" else 1) for key in stems}
    train, test = (
        _checked(
            arrays[split, "images"],
            arrays[split, "labels"],
            f"{paths[split, 'images']} with {paths[split, 'labels']}",
        )
        for split in ("train", "test")
    )
    return train, test


def _read_idx(path: Path, ndim: int) -> np.ndarray:
    """Returns the uint8 array of `ndim` dimensions in an idx file.

    The file begins with a big-endian int32 magic 0x0000TTDD, with TT = 08 for unsigned bytes and DD
    the number of dimensions. Then come the DD sizes as big-endian int32, and then the bytes. This
    is the layout of LeCun's MNIST page.
    """
    magic = bytes([0, 0, 8, ndim])
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read()
    except DAMAGED as error:
        fix = f"rename it to {path.stem}" if _begins(path, magic) else "get it again"
        raise DataError(f"{path} cannot be read to its end: {error}; {fix}") from error
    header_bytes = 4 * (1 + ndim)
    if content[:2] == _GZIP:
        raise DataError(f"{path} is compressed with gzip; rename it to {path.name}.gz")
    if content[:4] != magic:
        raise DataError(
            f"{path} begins with {content[:4].hex() or 'nothing'}, but an idx file of "
            f"{ndim}-dimensional bytes begins with {magic.hex()}; get it again"
        )
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, header_bytes, 4)]
    if len(content) - header_bytes != math.prod(shape):
        raise DataError(
            f"{path} has {len(content)} bytes, but its header promises {header_bytes} and "
            f"{' x '.join(map(str, shape))}, so it is truncated or damaged; get it again"
        )
    return np.frombuffer(content, dtype=np.uint8, offset=header_bytes).reshape(shape)


def _begins(path: Path, magic: bytes) -> bool:
    with suppress(OSError), path.open("rb") as file:
        return file.read(len(magic)) == magic
    return False


def _checked(images: np.ndarray, labels: np.ndarray, where: str) -> _Split:
    if labels.ndim != 1 or images.ndim < 2 or len(images) != len(labels) or images.size == 0:
        raise DataError(
            f"{where}: images must be (n, ...) and labels (n,) with the same n > 0, got "
            f"{images.shape} and {labels.shape}"
        )
    if images.ndim == 4 and images.shape[1] in _CHANNELS and images.shape[3] not in _CHANNELS:
        n, channels, height, width = images.shape
        raise DataError(
            f"{where}: images are {images.shape}, which looks like channels first; store channels "
            f"last, ({n}, {height}, {width}, {channels}), with images.transpose(0, 2, 3, 1)"
        )
    return images, labels
