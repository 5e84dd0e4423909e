"""Files that are whole or not there, and paths as users write them."""

import os
import uuid
from contextlib import suppress
from pathlib import Path


def user_path(path: str | Path, argument: str, error: type[Exception] = ValueError) -> Path:
    """`path` with `~` expanded, whether or not there is such a file.

    Raises `error`, with the name of the `argument`, where no file can have this path: its user is
    unknown, it holds a NUL or is too long, or a folder on its way may not be entered.
    """
    try:
        expanded = Path(path).expanduser()
        with suppress(FileNotFoundError, NotADirectoryError):
            expanded.stat()
    except (OSError, RuntimeError, ValueError) as reason:
        raise error(
            f"{argument}={str(path)!r} cannot be a path here ({reason}); give another, such "
            "as runs/demo"
        ) from reason
    return expanded


def write_atomic(path: str | Path, content: bytes) -> None:
    """`path` gets `content` whole or not at all, also where the process or the machine dies; a
    killed writer leaves a `.tmp` file at most."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # of a full disk, which else gets fuller each time
