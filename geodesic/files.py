"""Files that are whole or not there."""

import os
import uuid
from pathlib import Path


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
