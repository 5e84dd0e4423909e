"""Stores target paths as shards of tensors with a JSON manifest, without pickle.

    manifest.json             format, version, header; once finished, the record of every shard
    shard-00042.safetensors   the tensors of shard 42
    shard-00042.json          its record: bytes, sha256, shapes and dtypes, facts

A shard's record is written after the shard, and every file appears by an atomic rename. A shard
that matches its record is therefore complete; any other shard counts as missing, and a run that was
killed resumes with the missing ones. Processes share no file but the manifest, so several of them
may fill one folder at once, each with its own shards. Equal contents give equal bytes (sorted keys,
no time stamps).

The metadata of each shard contains a digest of the header that it was made with. A shard of another
header is refused. So is a shard without a digest, as earlier versions wrote it, unless the manifest
of a finished dataset records its checksum. A writer stops if its folder was deleted and made again
with another header.

The store is generic: its writer defines the meaning of the header, the facts and the tensors.
"""

import hashlib
import json
import os
import shlex
import time
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, contiguous_format

from geodesic.files import user_path, write_atomic
from geodesic.manifest import (
    FORMAT,
    ORIGIN,
    VERSION,
    DatasetError,
    changed_header,
    check_record,
    describe,
    inside,
    origin_in,
    read_json,
    read_manifest,
    record_name,
    sha256_of,
    shard_name,
    to_json,
)

NAMED = 8  # foreign shards that an error names one by one; if there are more, it names the folder
NEWS = 30.0  # seconds after which a process says what it is waiting for


class PathDataset:
    """A folder of shards, opened with `create` to write it or with `open` to read it.

        dataset = PathDataset.create("paths", header={"task": "digits", "seed": 0}, num_shards=8)
        for index in dataset.missing():
            dataset.write_shard(index, {"beads": beads}, facts={"chord_feasible": 0.1})
        dataset.finish()  # now `dataset` can be read, as after PathDataset.open("paths")

    Attributes:
        folder: the folder of the shards.
        header: what all shards have in common, as read back from JSON (tuples become lists).
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], check: bool) -> None:
        self.folder = folder
        self.header: dict[str, Any] = manifest["header"]
        self._num_shards: int = manifest["num_shards"]
        self._records: list[Any] | None = manifest["shards"]
        self._check = check
        self._origin = hashlib.sha256(to_json(self.header, "header")).hexdigest()
        self._verified: dict[int, str] = {}  # shard index -> the sha256 last computed of its file

    @classmethod
    def create(cls, folder: str | Path, header: dict[str, Any], num_shards: int) -> "PathDataset":
        """Opens `folder` for writing, and creates it if it does not exist.

        A dataset with the same header is resumed. Several processes may call this at once with the
        same header.

        Raises:
            DatasetError: the folder holds a dataset with another header or number of shards (the
                first key that differs is named) or shards without a manifest, or `header` is not
                JSON.
        """
        if num_shards < 1:
            raise DatasetError(f"num_shards must be at least 1, got {num_shards}")
        folder = user_path(folder, "folder", DatasetError)
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "header": json.loads(to_json(header, "header")),
            "num_shards": num_shards,
            "shards": None,
        }
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "manifest.json").exists():
            if any(folder.glob("shard-*")):
                raise DatasetError(
                    f"{folder} holds shards but no manifest.json that describes them; write to "
                    "another folder, or delete them"
                )
            write_atomic(folder / "manifest.json", to_json(manifest, "manifest"))
        found = read_manifest(folder)
        if difference := changed_header(found, manifest):
            raise DatasetError(
                f"{folder} holds another dataset: {difference}; write to another folder, or "
                "delete this one"
            )
        return cls(folder, found, check=True)

    @classmethod
    def open(cls, folder: str | Path, check: bool = True) -> "PathDataset":
        """Opens a finished dataset for reading.

        Args:
            folder: the folder of the dataset.
            check: whether to compare the sha256 of a shard with its record when it is first read.
                False saves reading each shard twice, and compares only sizes and shapes.

        Raises:
            DatasetError: the dataset is missing, unfinished, damaged, or of an unknown version.
        """
        folder = user_path(folder, "folder", DatasetError)
        manifest = read_manifest(folder)
        if manifest["shards"] is None:
            raise DatasetError(
                f"{folder} is unfinished; run the command that writes it again; it makes only the "
                "missing shards"
            )
        return cls(folder, manifest, check)

    def __len__(self) -> int:
        """Returns the number of shards, whether written or not."""
        return self._num_shards

    def facts(self, index: int) -> dict[str, Any]:
        """Returns the facts that were written with shard `index`."""
        return self._record(index)["facts"]

    def shard(self, index: int) -> dict[str, Tensor]:
        """Returns the tensors of shard `index`, read into memory.

        If the file is truncated or overwritten later, they do not change.

        Raises:
            DatasetError: the shard's file is missing, truncated or altered.
        """
        record = self._record(index)
        try:
            content = inside(self.folder, shard_name(index)).read_bytes()
        except (FileNotFoundError, IsADirectoryError):
            raise self._error(index, "is missing") from None
        digest = (lambda: hashlib.sha256(content).hexdigest()) if self._check else None
        fault, tensors = self._fault(index, record, len(content), digest), {}
        if fault is None:
            try:
                tensors, origin = load(content), origin_in(BytesIO(content))
            except SafetensorError as error:
                fault = f"is not a safetensors file ({error})"
            else:
                if describe(tensors) != record["tensors"]:
                    fault = "holds other tensors than its record says"
        if fault is not None:
            raise self._error(index, fault)
        if self._is_foreign(index, record, origin):
            raise self._foreign_error([index])
        return tensors

    def verify(self) -> None:
        """Compares every shard's file with its checksum, also if it was checked before.

        Raises:
            DatasetError: a shard is missing, truncated or altered; the first one is named.
        """
        self._verified.clear()
        for index in range(len(self)):
            fault, origin = self._look(index, self._record(index))
            if fault is not None:
                raise self._error(index, fault)
            if self._is_foreign(index, self._record(index), origin):
                raise self._foreign_error([index])

    @property
    def finished(self) -> bool:
        """Whether `finish` was called, so that the manifest records all shards."""
        return self._records is not None

    def missing(self) -> list[int]:
        """Returns the numbers of the shards that were not written, not completed, or damaged.

        Raises:
            DatasetError: some shards were made with another header, or the folder has since been
                made again with another one.
        """
        return [index for index, record in enumerate(self._found()) if record is None]

    def write_shard(self, index: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Writes shard `index`, and replaces an old one; it is complete on disk on return.

        Raises:
            DatasetError: `facts` is not JSON (NaN and infinity are not; None is), or in the
                meantime the folder was deleted or used for another dataset.
            IndexError: `index` is not in [0, len(self)).
        """
        self._check_index(index)
        # Copies, because safetensors refuses views and tensors that share memory.
        tensors = {
            name: tensor.detach().cpu().clone(memory_format=contiguous_format)
            for name, tensor in tensors.items()
        }
        content = save(tensors, {ORIGIN: self._origin})
        record: dict[str, Any] = {
            "file": shard_name(index),
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
            "tensors": describe(tensors),
            "facts": facts,
        }
        encoded = to_json(record, f"facts of shard {index}")
        self._check_folder()
        write_atomic(self.folder / shard_name(index), content)
        write_atomic(self.folder / record_name(index), encoded)
        self._verified[index] = record["sha256"]

    def fill(
        self,
        make: Callable[[int], tuple[dict[str, Tensor], dict[str, Any]]],
        rank: int = 0,
        world_size: int = 1,
        progress: Callable[[Iterable[int]], Iterable[int]] = iter,
        patience: float = 3600.0,
    ) -> None:
        """Makes the missing shards together with the other processes, and then calls `finish`.

        Args:
            make: maps the number of a shard to its tensors and facts.
            rank: the number of this process; it makes the shards whose number is rank modulo
                world_size.
            world_size: the number of processes that call this at the same time.
            progress: wraps the iterable of this process's shard numbers, for example tqdm.
            patience: after this many seconds without a new shard the other processes are taken for
                dead, and an error is raised.

        Raises:
            DatasetError: another process did not make its shards, the folder holds shards of
                another header, or in the meantime it was deleted or used for another dataset.
        """
        if self.finished and not self.missing():
            return
        missing, last, told = self.missing(), time.monotonic(), False
        while missing and (waited := time.monotonic() - last) < patience:
            mine = [index for index in missing if index % world_size == rank]
            for index in progress(mine) if mine else ():
                self.write_shard(index, *make(index))
            if waited > NEWS and not told:
                told = True
                warnings.warn(
                    f"waiting for {len(missing)} shards of {self.folder} that other processes have "
                    f"to make; this is process {rank} of {world_size}",
                    stacklevel=2,
                )
            if not mine:
                time.sleep(0.2)
            left = self.missing()  # this process's own again, where they were deleted meanwhile
            missing, last = left, last if left == missing else time.monotonic()
        if missing:
            raise DatasetError(
                f"{self.folder} lacks {len(missing)} shards of other processes, and none was added "
                f"in {patience:.0f} s; read their output for the cause, and run the command again"
            )
        if rank == 0:
            self.finish()
        self._records = self._found()

    def finish(self) -> None:
        """Writes the records of all shards into the manifest, so that the dataset can be opened.

        One process calls this when all writers are done.

        Raises:
            DatasetError: shards are missing or of another header, or in the meantime the folder was
                deleted or used for another dataset.
        """
        records = self._found()
        missing = [index for index, record in enumerate(records) if record is None]
        if missing:
            raise DatasetError(
                f"{self.folder} lacks {len(missing)} of {len(self)} shards, the first is "
                f"{shard_name(missing[0])}; write the shards that missing() returns first"
            )
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "header": self.header,
            "num_shards": len(self),
            "shards": records,
        }
        write_atomic(self.folder / "manifest.json", to_json(manifest, "manifest"))
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
        """Returns the record of each shard, None if it is missing; raises for foreign shards."""
        self._check_folder()
        records, foreign = [], []
        for index in range(len(self)):
            record, origin = self._written(index)
            records.append(record)
            if record is not None and self._is_foreign(index, record, origin):
                foreign.append(index)
        if foreign:
            raise self._foreign_error(foreign)
        return records

    def _check_folder(self) -> None:
        """Raises DatasetError if another process has made the folder into another dataset."""
        found = read_manifest(self.folder)
        if difference := changed_header(found, {"header": self.header, "num_shards": len(self)}):
            raise DatasetError(
                f"{self.folder} was deleted and made again as another dataset while this process "
                f"wrote to it: {difference}; run the command again with another folder"
            )

    def _is_foreign(self, index: int, record: dict[str, Any], origin: str | None) -> bool:
        """Whether a complete shard was made with another header.

        A shard without a digest of its header is foreign unless this dataset records its checksum.
        """
        if origin is None and self._records is not None:  # finished by an earlier version
            return self._records[index]["sha256"] != record["sha256"]
        return origin != self._origin

    def _foreign_error(self, indices: list[int]) -> DatasetError:
        names = [Path(shard_name(index)).stem for index in indices]
        files = shlex.join(str(self.folder / f"{name}{end}") for name in names
                           for end in (".safetensors", ".json"))  # fmt: skip
        remove = f"rm {files}" if len(names) <= NAMED else f"rm -r {shlex.quote(str(self.folder))}"
        more = f" and {len(names) - 1} more" if names[1:] else ""
        return DatasetError(
            f"{self.folder}: {names[0]}{more} came from another dataset, or from an earlier "
            f"version, which did not record its dataset; run `{remove}` and then the command that "
            "writes this folder; it makes only the missing shards"
        )

    def _written(self, index: int) -> tuple[dict[str, Any] | None, str | None]:
        """Returns the record of a shard that is complete on disk, and the digest in its file.

        Without such a shard both are None.
        """
        try:
            record = read_json(self.folder, record_name(index))
            check_record(record, index, record_name(index))
            fault, origin = self._look(index, record)
        except DatasetError:
            return None, None
        return (record, origin) if fault is None else (None, None)

    def _look(self, index: int, record: dict[str, Any]) -> tuple[str | None, str | None]:
        """Returns what is wrong with a shard's file, and the header's digest in it."""
        path = inside(self.folder, shard_name(index))
        try:
            with path.open("rb") as file:  # the same file to the end, whatever takes its place
                size = os.fstat(file.fileno()).st_size
                fault = self._fault(index, record, size, partial(sha256_of, file))
                return fault, origin_in(file) if fault is None else None
        except (FileNotFoundError, IsADirectoryError):
            return "is missing", None
        except ValueError:  # altered since its checksum was right
            return "is not a safetensors file", None

    def _fault(
        self,
        index: int,
        record: dict[str, Any],
        size: int,
        digest: Callable[[], str] | None,
    ) -> str | None:
        """Returns what is wrong with a shard of `size` bytes, or None.

        A checksum that matched before is not computed again.
        """
        if size != record["bytes"]:
            return f"has {size} bytes instead of {record['bytes']}"
        if digest is not None and self._verified.get(index) != record["sha256"]:
            if digest() != record["sha256"]:
                return "does not have the sha256 of its record"
            self._verified[index] = record["sha256"]
        return None

    def _error(self, index: int, fault: str) -> DatasetError:
        return DatasetError(
            f"{self.folder / shard_name(index)} {fault}; delete the file and run the command that "
            "wrote it again; it makes only the missing shards"
        )
