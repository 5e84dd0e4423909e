"""The `--output` folder of a command, which belongs to one process at a time and to one config.

The folder has these files besides the results:

config-<command>.yaml        the resolved config; only a run with the same config can resume
provenance-<command>.json    the versions, hardware and commit of every run that wrote here
.lock, .lock-owner.json      the process that uses the folder
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import platform
import reprlib
import socket
import subprocess
from collections.abc import Collection, Iterator, Mapping
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout

from geodesic.files import user_path, write_atomic
from learned_opt.errors import OutputError
from learned_opt.yaml_size import check_size

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)
_ABSENT = object()  # the value of a key that only the other of two configs has
# A damaged file may have a value of any size in place of a setting.
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 4, 200, 200
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 20


@contextlib.contextmanager
def claim_output(
    folder: str | Path, config: Mapping[str, Any], command: str, free: Collection[str] = ()
) -> Iterator[Path]:
    """Locks `folder` for `command` with `config`, and yields it as an absolute path.

    The operating system holds the lock, so it is released when the process ends, even if it is
    killed. Claims do not nest: claim once, at the outermost level, in only one process of a job.

    Args:
        folder: the folder; created if it does not exist.
        config: the config, which determines the results.
        command: names the files of the config and of the provenance. Commands may share a folder.
        free: keys that a later run may change because they do not affect results. The keys of
            nested settings are dotted.

    Raises:
        OutputError: another process uses the folder, the folder holds results of another config, or
            it cannot be written to, be it now or later, as when the disk is full.
    """
    folder = user_path(folder, "output", OutputError).absolute()
    owner_file, written = folder / ".lock-owner.json", None
    lock = FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise OutputError(
            f"output={str(folder)!r} is in use by {_owner(owner_file)}; wait until it ends, stop "
            "it, or use another --output"
        ) from None
    except OSError as error:
        raise OutputError(
            f"output={str(folder)!r} cannot be written to ({error}); use another --output"
        ) from error
    try:
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "command": command}
        written = json.dumps(owner | {"since": _now()}).encode()
        write_atomic(owner_file, written)
        _check_config(folder / f"config-{command}.yaml", plain(config), free)
        _add_provenance(folder / f"provenance-{command}.json")
        yield folder
    except OSError as error:
        if fix := _fix(error, folder):
            raise OutputError(
                f"output={str(folder)!r} cannot be written to ({error}); {fix} and run the same "
                "command again, which resumes from the last complete file"
            ) from error
        raise
    finally:
        with contextlib.suppress(OSError):  # the disk is read-only now, or the folder is gone
            if owner_file.read_bytes() == written:  # else the folder was replaced by another's
                owner_file.unlink()
        lock.release()


def provenance() -> dict[str, Any]:
    """Returns the versions, hardware and commit of this process, and the time in UTC."""
    return {"started": _now(), **_environment()}


@cache
def _environment() -> dict[str, Any]:
    def version(package: str) -> str | None:
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(package)
        return None

    packages = ("learned-opt", "torch", "numpy", "lightning")
    return {
        "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": _commit(),
    }


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """Returns the commit of this file, with "-dirty" if tracked files differ from it.

    Returns None if git does not track the file.
    """

    def git(*args: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *args]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()

    with contextlib.suppress(OSError, subprocess.SubprocessError):
        git("ls-files", "--error-unmatch", Path(__file__).name)  # not of a repository around .venv
        dirty = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("-dirty" if dirty else "")
    return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _owner(path: Path) -> str:
    try:
        owner = json.loads(path.read_text())
        return "learned-opt {command}, process {pid} on {host} since {since}".format(**owner)
    except (OSError, ValueError, KeyError):
        return "another process"  # which has not yet written the file, or has just deleted it


def _fix(error: OSError, folder: Path) -> str | None:
    """Returns what to do if `error` says that `folder` cannot be written to, and otherwise None."""
    if error.errno in FULL:
        return "free some space"
    if error.errno in FORBIDDEN and str(error.filename).startswith(str(folder)):
        return "make it writable"
    if error.errno == errno.ENOENT and not folder.exists():
        return "leave it there while a command is at work,"
    return None


def plain(value: Any) -> Any:
    """Returns `value` as YAML would read it back, without dataclasses, tuples and paths."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def _check_config(path: Path, config: dict[str, Any], free: Collection[str]) -> None:
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    if not path.exists():
        write_atomic(path, text.encode())
        return
    try:
        check_size(written := path.read_text())
        before = yaml.safe_load(written)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise OutputError(f"{path} is not readable YAML ({error}); use another --output") from error
    before, kept = (_without(c, free) for c in (before, yaml.safe_load(text)))
    if difference := describe_difference(before, kept):
        raise OutputError(
            f"output={str(path.parent)!r} holds results of another config: {difference}; use "
            "another --output, or delete the folder if you do not need its results"
        )


def _without(config: Any, keys: Collection[str], prefix: str = "") -> Any:
    if not isinstance(config, dict):
        return config
    named = {key: f"{prefix}{key}" for key in config}
    return {k: _without(config[k], keys, f"{n}.") for k, n in named.items() if n not in keys}


def describe_difference(old: Any, new: Any) -> str | None:
    """Describes the first setting in which two plain configs differ; None if there is none."""
    if (difference := _first_difference(old, new)) is None:
        return None
    key, *values = difference
    old, new = ("absent" if value is _ABSENT else _SHORT.repr(value) for value in values)
    return f"{key} was {old}, now it is {new}"


def _first_difference(old: Any, new: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """Returns the first (dotted key, old value, new value) in which two configs differ."""
    if isinstance(old, list) and isinstance(new, list):
        old, new = dict(enumerate(old)), dict(enumerate(new))
    if isinstance(old, dict) and isinstance(new, dict):
        for k in (*new, *(k for k in old if k not in new)):
            inner = f"{key}.{k}" if key else str(k)
            if found := _first_difference(old.get(k, _ABSENT), new.get(k, _ABSENT), inner):
                return found
        return None
    same = old == new or (old != old and new != new)  # NaN is the same config as NaN
    return None if same else (key, old, new)


def _add_provenance(path: Path) -> None:
    """Appends this run to the runs in the file; a resumed result has several."""
    runs = []
    if path.exists():
        try:
            runs = json.loads(path.read_text())
        except ValueError:  # the file is damaged, but is kept under another name
            path.replace(path.with_suffix(".damaged.json"))
    write_atomic(path, json.dumps([*runs, provenance()], indent=2).encode())
