"""The manifest of a dataset of paths, the records of its shards, and checks of both."""

import hashlib
import json
import struct
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

FORMAT = "geodesic-paths"
VERSION = 1
ORIGIN = "header"  # the key of the header's digest in the metadata of a shard
MAX_HEADER = 1 << 20  # bytes; a damaged length must not allocate memory
RECORD_TYPES = {"file": str, "bytes": int, "sha256": str, "tensors": dict, "facts": dict}


class DatasetError(ValueError):
    """A dataset of paths is missing, unfinished or damaged, or was made with another header."""


def shard_name(index: int) -> str:
    """Returns the name of the file of a shard."""
    return f"shard-{index:05d}.safetensors"


def record_name(index: int) -> str:
    """Returns the name of the file of a shard's record."""
    return f"shard-{index:05d}.json"


def describe(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Returns the dtype and the shape of each tensor, as a record has them."""
    return {
        name: {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
        for name, tensor in tensors.items()
    }


def sha256_of(file: BinaryIO) -> str:
    """Returns the checksum of the rest of a file."""
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def origin_in(file: BinaryIO) -> str | None:
    """Returns the digest in the metadata of a safetensors file that is whole.

    The file begins with the length, in 8 bytes, of the JSON after them.
    """
    file.seek(0)
    (length,) = struct.unpack("<Q", file.read(8))
    header = json.loads(file.read(min(length, MAX_HEADER)))
    return header.get("__metadata__", {}).get(ORIGIN)


def to_json(value: Any, what: str) -> bytes:
    """Returns `value`, which is `what` for an error, as JSON; equal values give equal bytes."""
    try:
        return (json.dumps(value, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise DatasetError(f"{what} must be JSON with finite numbers: {error}") from error


def inside(folder: Path, name: str) -> Path:
    """Returns the path of a file of the folder, and refuses links that lead out of it."""
    path = folder / name
    if path.resolve().parent != folder.resolve():
        raise DatasetError(
            f"{path} is a link that leads out of its folder; replace it by the file itself"
        )
    return path


def read_json(folder: Path, name: str) -> Any:
    """Returns the content of a JSON file of the folder."""
    path = inside(folder, name)
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DatasetError(
            f"{path} is missing, so {folder} is not a dataset of paths; give another folder"
        ) from None
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path} is not JSON: {error}; restore it, or write it again") from error


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns the manifest of a folder, checked."""
    manifest, where = read_json(folder, "manifest.json"), folder / "manifest.json"
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DatasetError(f"{where} is not the manifest of a dataset of paths; give its folder")
    if manifest.get("version") != VERSION:
        raise DatasetError(
            f"{where} has format version {manifest.get('version')!r}, and this version reads "
            f"{VERSION}; use the release that wrote it, or write the dataset again"
        )
    num_shards, records = manifest.get("num_shards"), manifest.get("shards")
    if (
        not isinstance(manifest.get("header"), dict)
        or type(num_shards) is not int
        or not (records is None or (isinstance(records, list) and len(records) == num_shards))
    ):
        raise DatasetError(
            f"{where} is damaged: header, num_shards or shards is invalid; write the dataset again"
        )
    for index, record in enumerate(records or ()):
        check_record(record, index, where)
    manifest["shards"] = records
    return manifest


def check_record(record: Any, index: int, where: str | Path) -> None:
    """Raises DatasetError if a record is damaged or names any file but that of its shard."""
    if not isinstance(record, dict) or any(
        type(record.get(key)) is not kind for key, kind in RECORD_TYPES.items()
    ):
        raise DatasetError(
            f"{where}: the record of shard {index} is damaged; write the dataset again"
        )
    if record["file"] != shard_name(index):
        raise DatasetError(
            f"{where}: shard {index} must be the file {shard_name(index)}, got {record['file']!r}"
        )


def changed_header(found: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    """Returns the first difference in header or number of shards of two manifests, or None."""
    differences = (_first_difference(found[k], wanted[k], k) for k in ("header", "num_shards"))
    return next(filter(None, differences), None)


def _first_difference(found: Any, wanted: Any, key: str) -> str | None:
    if isinstance(found, dict) and isinstance(wanted, dict):
        for name in sorted(found.keys() | wanted.keys()):
            if (name in found) != (name in wanted):
                return f"{key}.{name} is only in the {'old' if name in found else 'new'} one"
            difference = _first_difference(found[name], wanted[name], f"{key}.{name}")
            if difference:
                return difference
        return None
    # Compared as JSON, because in Python 1, 1.0 and True are equal.
    if json.dumps(found, sort_keys=True) == json.dumps(wanted, sort_keys=True):
        return None
    return f"{key} is {found!r} there and {wanted!r} here"
