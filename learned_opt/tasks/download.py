"""Downloads image sets through torchvision if it is installed, and otherwise from OpenML."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from geodesic.files import write_atomic
from learned_opt.errors import DataError
from learned_opt.tasks.data import IDX_FILES, IDX_FOLDERS, find_data, load_images

CIFAR = "cifar10"
# On OpenML all images are in one table, with the training images first. The values are the table's
# name, its version, and the number of training images.
_OPENML = {
    "mnist": ("mnist_784", 1, 60_000),
    "fashion-mnist": ("Fashion-MNIST", 1, 60_000),
    "kmnist": ("Kuzushiji-MNIST", 1, 60_000),
    CIFAR: ("CIFAR_10", 1, 50_000),
}


def download(name: str, data_root: str | Path | None = None) -> None:
    """Downloads the image set `name` if it is missing under `data_root`.

    mnist, fashion-mnist and kmnist are stored in torchvision's layout, and cifar10 as train.npz and
    test.npz. Other names are users' own data or need no files, so nothing is done for them.
    Existing files are never changed.

    Raises:
        DataError: the download failed, or the existing files cannot be used.
    """
    if name not in _OPENML:
        return
    try:
        load_images(name, data_root)
        return
    except DataError:
        folder = find_data(IDX_FOLDERS.get(name, name), data_root)
        if all(map(_is_there, _files(name, folder))):
            raise
    try:
        arrays = _from_torchvision(name, folder.parent)
    except ImportError:
        arrays = _from_openml(name, data_root)
    except (OSError, RuntimeError) as error:
        raise _failed(name, "torchvision", error) from error
    for path, content in _encoded(name, folder, arrays).items():
        if not _is_there(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, content)


Arrays = dict[str, np.ndarray]  # train_images, train_labels, test_images, test_labels; all uint8


def _from_torchvision(name: str, root: Path) -> Arrays:
    import torchvision

    kind = getattr(torchvision.datasets, "CIFAR10" if name == CIFAR else IDX_FOLDERS[name])
    arrays = {}
    for split in ("train", "test"):
        found = kind(root, train=split == "train", download=True)
        arrays[f"{split}_images"] = np.asarray(found.data, dtype=np.uint8)
        arrays[f"{split}_labels"] = np.asarray(found.targets, dtype=np.uint8)
    return arrays


def _from_openml(name: str, data_root: str | Path | None) -> Arrays:
    from sklearn.datasets import fetch_openml

    title, version, train = _OPENML[name]
    home = find_data(".openml", data_root)
    try:
        # this parser needs no pandas
        found = fetch_openml(
            title, version=version, as_frame=False, parser="liac-arff", data_home=str(home)
        )
    except (OSError, ValueError) as error:
        raise _failed(name, "OpenML", error) from error
    images, labels = np.asarray(found.data, np.uint8), np.asarray(found.target).astype(np.uint8)
    if name == CIFAR:  # rows are red, then green, then blue pixels
        images = images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    else:
        images = images.reshape(-1, 28, 28)
    parts = {"train": slice(train), "test": slice(train, None)}
    return {f"{k}_images": images[part] for k, part in parts.items()} | {
        f"{k}_labels": labels[part] for k, part in parts.items()
    }


def _files(name: str, folder: Path) -> list[Path]:
    if name == CIFAR:
        return [folder / "train.npz", folder / "test.npz"]
    return [folder / "raw" / file for file in IDX_FILES.values()]


def _is_there(path: Path) -> bool:
    return path.exists() or Path(f"{path}.gz").exists()


def _encoded(name: str, folder: Path, arrays: Arrays) -> dict[Path, bytes]:
    """Returns the contents of the files by path, as `tasks/data.py` reads them."""
    if name == CIFAR:
        return {path: _npz(arrays, path.stem) for path in _files(name, folder)}
    raw = folder / "raw"
    return {raw / file: _idx(arrays[f"{s}_{kind}"]) for (s, kind), file in IDX_FILES.items()}


def _npz(arrays: Arrays, split: str) -> bytes:
    file = io.BytesIO()
    np.savez(file, images=arrays[f"{split}_images"], labels=arrays[f"{split}_labels"])
    return file.getvalue()


def _idx(array: np.ndarray) -> bytes:
    """Returns an array as the content of an idx file, see `_read_idx` of data.py."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + np.ascontiguousarray(array).tobytes()


def _failed(name: str, source: str, error: Exception) -> DataError:
    return DataError(
        f"data set {name!r} could not be downloaded from {source} ({error}); without a network, "
        "put it under data_root yourself"
    )
