"""The store of target paths: shards of tensors beside a JSON manifest. No pickle.

    manifest.json             format, version, header; once finished, the record of every shard
    shard-00042.safetensors   the tensors of shard 42
    shard-00042.json          its record: bytes, sha256, shapes and dtypes, facts

A shard's record is written after the shard, and every file appears by an atomic rename. So a shard
that fits its record is whole, any other one is missing, and a run that was killed resumes with the
missing ones. Writers share no other file: several processes may fill one folder at once, each its
own shards. Equal contents give equal bytes (sorted keys, no time stamps).

Each shard carries a digest of the header that it was made under, in the metadata of its file. One
of another header is refused, and so is one without a digest, as earlier versions wrote them, unless
the manifest of a finished dataset records its checksum. A writer whose folder was deleted and made
again under another header stops.

The store is generic: what the header, the facts and the tensors mean is up to its writer.
"""

import hashlib
import json
import shlex
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, contiguous_format

from geodesic.files import user_path, write_atomic

FORMAT = "geodesic-paths"
VERSION = 1
ORIGIN = "header"  # in the metadata of a shard: the digest of its dataset's header
NAMED = 8  # of the shards of another dataset, to be deleted one by one; of more, the folder
NEWS = 30.0  # seconds after which a process says what it is waiting for

_RECORD_TYPES = {"file": str, "bytes": int, "sha256": str, "tensors": dict, "facts": dict}


class DatasetError(ValueError):
    """A dataset of paths is missing, unfinished, damaged, or belongs to another header."""


class PathDataset:
    """A folder of shards; make one with `create` to write it, or with `open` to read it.

        dataset = PathDataset.create("paths", header={"task": "digits", "seed": 0}, num_shards=8)
        for index in dataset.missing():
            dataset.write_shard(index, {"beads": beads}, facts={"chord_feasible": 0.1})
        dataset.finish()  # from here on `dataset` can be read, as by PathDataset.open("paths")

    Attributes:
        folder: where it is.
        header: what all shards have in common, as JSON gives it back (tuples become lists).
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], check: bool) -> None:
        self.folder = folder
        self.header: dict[str, Any] = manifest["header"]
        self._num_shards: int = manifest["num_shards"]
        self._records: list[dict[str, Any]] | None = manifest["shards"]
        self._check = check
        self._origin = hashlib.sha256(_to_json(self.header, "header")).hexdigest()
        self._verified: dict[int, str] = {}  # shard index -> the sha256 that its file was seen with

    @classmethod
    def create(cls, folder: str | Path, header: dict[str, Any], num_shards: int) -> "PathDataset":
        """Open `folder` for writing, making it if need be; one with the same header is resumed.

        Several processes may do so at once if they pass the same header.

        Raises:
            DatasetError: the folder holds a dataset with another header or number of shards (the
                first key that differs is named), or shards without a manifest; or `header` is not
                JSON.
        """
        if num_shards < 1:
            raise DatasetError(f"num_shards must be at least 1, got {num_shards}")
        folder = user_path(folder, "folder", DatasetError)
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "header": json.loads(_to_json(header, "header")),
            "num_shards": num_shards,
            "shards": None,
        }
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "manifest.json").exists():
            if any(folder.glob("shard-*")):
                raise DatasetError(
                    f"{folder} holds shards but no manifest.json that says what they are; "
                    "write to another folder, or delete them"
                )
            write_atomic(folder / "manifest.json", _to_json(manifest, "manifest"))
        found = _read_manifest(folder)
        if difference := _difference(found, manifest):
            raise DatasetError(
                f"{folder} holds another dataset: {difference}; write to another folder, or "
                "delete this one"
            )
        return cls(folder, found, check=True)

    @classmethod
    def open(cls, folder: str | Path, check: bool = True) -> "PathDataset":
        """Open a finished dataset for reading.

        Args:
            folder: where `finish` left it.
            check: compare the sha256 of a shard with its record when the shard is first read;
                False saves reading it twice, and leaves the comparison of sizes and shapes.

        Raises:
            DatasetError: there is none, it is unfinished, of an unknown version, or damaged.
        """
        folder = user_path(folder, "folder", DatasetError)
        manifest = _read_manifest(folder)
        if manifest["shards"] is None:
            raise DatasetError(
                f"{folder} is unfinished; run the command that writes it again, which makes only "
                "the missing shards"
            )
        return cls(folder, manifest, check)

    def __len__(self) -> int:
        """The number of shards, written or not."""
        return self._num_shards

    def facts(self, index: int) -> dict[str, Any]:
        """What was written as the facts of shard `index`."""
        return self._record(index)["facts"]

    def shard(self, index: int) -> dict[str, Tensor]:
        """The tensors of shard `index`, memory-mapped: a page is read when it is touched.

        Raises:
            DatasetError: the shard's file is missing, truncated or altered.
        """
        record = self._record(index)
        fault, tensors = self._fault(index, record, checksum=self._check), {}
        if fault is None:
            try:
                tensors = load_file(self.folder / _shard_name(index))
            except SafetensorError as error:
                fault = f"is not a safetensors file ({error})"
            else:
                if _describe(tensors) != record["tensors"]:
                    fault = "holds other tensors than its record says"
        if fault is not None:
            raise self._error(index, fault)
        if self._is_foreign(index, record):
            raise self._foreign_error([index])
        return tensors

    def verify(self) -> None:
        """Compare every shard's file with its checksum, whatever was checked before.

        Raises:
            DatasetError: names the first shard that is missing, truncated or altered.
        """
        self._verified.clear()
        for index in range(len(self)):
            fault = self._fault(index, self._record(index), checksum=True)
            if fault is not None:
                raise self._error(index, fault)
            if self._is_foreign(index, self._record(index)):
                raise self._foreign_error([index])

    @property
    def finished(self) -> bool:
        """Whether `finish` was called: the manifest records all shards."""
        return self._records is not None

    def missing(self) -> list[int]:
        """The shards to write: those never written, half written, or damaged since.

        Raises:
            DatasetError: some are of another header, or the folder is by now.
        """
        return [index for index, record in enumerate(self._found()) if record is None]

    def write_shard(self, index: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Write shard `index`, replacing what is there; it is whole on disk when this returns.

        Raises:
            DatasetError: `facts` is not JSON (NaN and infinity are not; None is), or the folder was
                deleted or given to another dataset meanwhile.
            IndexError: `index` is not in [0, len(self)).
        """
        self._check_index(index)
        # Copies, as safetensors refuses views and tensors that share memory.
        tensors = {
            name: tensor.detach().cpu().clone(memory_format=contiguous_format)
            for name, tensor in tensors.items()
        }
        content = save(tensors, {ORIGIN: self._origin})
        record = {
            "file": _shard_name(index),
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
            "tensors": _describe(tensors),
            "facts": facts,
        }
        encoded = _to_json(record, f"facts of shard {index}")
        self._check_folder()
        write_atomic(self.folder / _shard_name(index), content)
        write_atomic(self.folder / _record_name(index), encoded)
        self._verified[index] = record["sha256"]

    def fill(
        self,
        make: Callable[[int], tuple[dict[str, Tensor], dict[str, Any]]],
        rank: int = 0,
        world_size: int = 1,
        progress: Callable[[Iterable[int]], Iterable[int]] = iter,
        patience: float = 3600.0,
    ) -> None:
        """Make the missing shards, with others: each process those of its rank; then `finish`.

        Args:
            make: tensors and facts of a shard, by its number.
            progress: wraps the numbers of this process's shards, such as tqdm.
            patience: seconds without a new shard after which the other processes are given up.

        Raises:
            DatasetError: another process did not make its shards, the folder holds shards of
                another header, or was deleted or given to another dataset meanwhile.
        """
        if self.finished and not self.missing():
            return
        mine = [index for index in self.missing() if index % world_size == rank]
        for index in progress(mine):
            self.write_shard(index, *make(index))
        missing, last, told = self.missing(), time.monotonic(), False
        while missing and (waited := time.monotonic() - last) < patience:
            if waited > NEWS and not told:
                told = True
                warnings.warn(
                    f"waiting for {len(missing)} shards of {self.folder} that other processes are "
                    f"to make: this one is {rank} of {world_size}",
                    stacklevel=2,
                )
            time.sleep(0.2)
            left = self.missing()
            missing, last = left, last if left == missing else time.monotonic()
        if missing:
            raise DatasetError(
                f"{self.folder} lacks {len(missing)} shards of other processes, and got none in "
                f"{patience:.0f} s; see their output, and run the command again"
            )
        if rank == 0:
            self.finish()
        self._records = self._found()

    def finish(self) -> None:
        """Put the records of all shards into the manifest: the dataset can now be opened.

        One process calls it, when all writers are done.

        Raises:
            DatasetError: shards are missing or of another header, or the folder was deleted or
                given to another dataset meanwhile.
        """
        records = self._found()
        missing = [index for index, record in enumerate(records) if record is None]
        if missing:
            raise DatasetError(
                f"{self.folder} lacks {len(missing)} of {len(self)} shards, the first of them "
                f"{_shard_name(missing[0])}; write those that missing() lists first"
            )
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "header": self.header,
            "num_shards": len(self),
            "shards": records,
        }
        write_atomic(self.folder / "manifest.json", _to_json(manifest, "manifest"))
        self._records = manifest["shards"]

    def _check_index(self, index: int) -> None:
        if not 0 <= index < len(self):
            raise IndexError(f"shard index must be in [0, {len(self)}), got {index}")

    def _record(self, index: int) -> dict[str, Any]:
        self._check_index(index)
        if self._records is None:
            raise DatasetError(f"{self.folder} is unfinished; call finish() before reading")
        return self._records[index]

    def _found(self) -> list[dict[str, Any] | None]:
        """The record of each shard, None where it is missing; all are of this dataset."""
        self._check_folder()
        records = [self._written(index) for index in range(len(self))]
        foreign = [i for i, record in enumerate(records) if record and self._is_foreign(i, record)]
        if foreign:
            raise self._foreign_error(foreign)
        return records

    def _check_folder(self) -> None:
        """That the folder still is this dataset's: another process may have made it anew."""
        found = _read_manifest(self.folder)
        if difference := _difference(found, {"header": self.header, "num_shards": len(self)}):
            raise DatasetError(
                f"{self.folder} was deleted and made again as another dataset while this process "
                f"wrote to it: {difference}; run the command again with another folder"
            )

    def _is_foreign(self, index: int, record: dict[str, Any]) -> bool:
        """Whether a whole shard was made under another header, or says none and is not known."""
        with safe_open(self.folder / _shard_name(index), "pt") as file:
            origin = (file.metadata() or {}).get(ORIGIN)
        if origin is None and self._records is not None:  # finished by an earlier version
            return self._records[index]["sha256"] != record["sha256"]
        return origin != self._origin

    def _foreign_error(self, indices: list[int]) -> DatasetError:
        names = [Path(_shard_name(index)).stem for index in indices]
        files = shlex.join(str(self.folder / f"{name}{end}") for name in names
                           for end in (".safetensors", ".json"))  # fmt: skip
        remove = f"rm {files}" if len(names) <= NAMED else f"rm -r {shlex.quote(str(self.folder))}"
        more = f" and {len(names) - 1} more" if names[1:] else ""
        return DatasetError(
            f"{self.folder}: {names[0]}{more} came from another dataset, or from an earlier "
            f"version, which did not say from which; run `{remove}` and then the command that "
            "writes this folder, which makes only the missing shards"
        )

    def _written(self, index: int) -> dict[str, Any] | None:
        """The record of a shard that is whole on disk, else None."""
        try:
            record = _read_json(self.folder, _record_name(index))
            _check_record(record, index, _record_name(index))
            fault = self._fault(index, record, checksum=True)
        except DatasetError:
            return None
        return record if fault is None else None

    def _fault(self, index: int, record: dict[str, Any], checksum: bool) -> str | None:
        """What is wrong with a shard's file; a checksum that was right is not computed again."""
        path = _inside(self.folder, _shard_name(index))
        if not path.is_file():
            return "is missing"
        size = path.stat().st_size
        if size != record["bytes"]:
            return f"has {size} bytes instead of {record['bytes']}"
        if checksum and self._verified.get(index) != record["sha256"]:
            if _sha256(path) != record["sha256"]:
                return "does not have the sha256 of its record"
            self._verified[index] = record["sha256"]
        return None

    def _error(self, index: int, fault: str) -> DatasetError:
        return DatasetError(
            f"{self.folder / _shard_name(index)} {fault}; delete the file and run the command that "
            "wrote it again, which makes only the missing shards"
        )


def _shard_name(index: int) -> str:
    return f"shard-{index:05d}.safetensors"


def _record_name(index: int) -> str:
    return f"shard-{index:05d}.json"


def _describe(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {
        name: {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
        for name, tensor in tensors.items()
    }


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _to_json(value: Any, what: str) -> bytes:
    try:
        return (json.dumps(value, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise DatasetError(f"{what} must be JSON with finite numbers: {error}") from error


def _inside(folder: Path, name: str) -> Path:
    path = folder / name
    if path.resolve().parent != folder.resolve():
        raise DatasetError(f"{path} is a link that leads out of its folder; put the file there")
    return path


def _read_json(folder: Path, name: str) -> Any:
    path = _inside(folder, name)
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DatasetError(f"{path} is missing: {folder} is not a dataset of paths") from None
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path} is not JSON: {error}") from error


def _read_manifest(folder: Path) -> dict[str, Any]:
    manifest, where = _read_json(folder, "manifest.json"), folder / "manifest.json"
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DatasetError(f"{where} is not the manifest of a dataset of paths")
    if manifest.get("version") != VERSION:
        raise DatasetError(
            f"{where} has format version {manifest.get('version')!r}, and this code reads "
            f"{VERSION}; use the release that wrote it, or write the dataset again"
        )
    num_shards, records = manifest.get("num_shards"), manifest.get("shards")
    if (
        not isinstance(manifest.get("header"), dict)
        or type(num_shards) is not int
        or not (records is None or (isinstance(records, list) and len(records) == num_shards))
    ):
        raise DatasetError(f"{where} is damaged: header, num_shards or shards is not as written")
    for index, record in enumerate(records or ()):
        _check_record(record, index, where)
    manifest["shards"] = records
    return manifest


def _check_record(record: Any, index: int, where: str | Path) -> None:
    """A record names its own shard's file and no other, so it cannot lead out of the folder."""
    if not isinstance(record, dict) or any(
        type(record.get(key)) is not kind for key, kind in _RECORD_TYPES.items()
    ):
        raise DatasetError(f"{where}: the record of shard {index} is damaged")
    if record["file"] != _shard_name(index):
        raise DatasetError(
            f"{where}: shard {index} must be the file {_shard_name(index)}, got {record['file']!r}"
        )


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    """The first difference that makes two manifests those of different datasets."""
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
    # As JSON, because Python holds 1, 1.0 and True for equal.
    if json.dumps(found, sort_keys=True) == json.dumps(wanted, sort_keys=True):
        return None
    return f"{key} is {found!r} there and {wanted!r} here"
