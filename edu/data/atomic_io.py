"""Files that are complete or absent, also after a kill or a power failure: write beside, sync, rename, sync the folder."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk; Windows flushes files that may be written, and no folders."""
    if os.name == "posix" or path.is_file():
        handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def publish(temporary: Path, path: Path) -> None:
    """Atomically rename `temporary` to `path`: fsync the file, rename, fsync the folder; hard links keep the old content."""
    sync(temporary)
    temporary.replace(path)
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a whole UTF-8 file or none; an OSError (a full disk) leaves the old one, and no other.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.json"
    >>> write_text(path, "{}"), path.read_text(), [each.name for each in path.parent.iterdir()]
    (None, '{}', ['a.json'])
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
