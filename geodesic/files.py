"""Writes files atomically, and reads paths as users type them."""

import os
import uuid
from contextlib import suppress
from pathlib import Path


def user_path(path: str | Path, argument: str, error: type[Exception] = ValueError) -> Path:
    """Returns `path` with `~` expanded; the file need not exist.

    Raises `error`, naming `argument`, if no file can have this path: the user after `~` is unknown,
    the path contains a NUL or is too long, or one of its folders may not be entered.
    """
    try:
        expanded = Path(path).expanduser()
        with suppress(FileNotFoundError, NotADirectoryError):
            expanded.stat()
    except (OSError, RuntimeError, ValueError) as reason:
        raise error(
            f"{argument}={str(path)!r} cannot be a path here ({reason}); give another path, such "
            "as runs/demo"
        ) from reason
    return expanded


def write_atomic(path: str | Path, content: bytes) -> None:
    """Writes `content` to `path` completely or not at all, even if the process or machine dies.

    A killed writer leaves at most a `.tmp` file behind.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # or each failed write to a full disk would fill it more
