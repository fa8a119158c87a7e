"""Atomic writes: a file is written completely or stays as it was."""

import io
import os
import secrets
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path

TEMPORARY = ".tinyti-*.tmp"  # what a killed process may leave behind


@contextmanager
def atomic_write(path: str | Path) -> Iterator[io.BytesIO]:
    """Write a file atomically: `path` gets the bytes that the block writes into the stream.

    The stream is in memory, because some libraries do not survive a full disk.  At the end of the block its
    bytes go to a new file with a random name in the same folder, which is then renamed to `path`.  The old
    file's permissions are kept.  After a failure the old file is unchanged.  OSError if the folder is
    missing, not writable or full.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"No such folder: {path.parent}")
    stream = io.BytesIO()
    yield stream
    temporary = path.with_name(TEMPORARY.replace("*", secrets.token_hex(8)))
    # O_EXCL refuses existing files and symlinks: nobody can prepare a file under the random name.
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    mode = stat.S_IMODE(path.stat().st_mode) if path.is_file() and not path.is_symlink() else None
    try:
        with open(os.open(temporary, flags, 0o666 if mode is None else mode), "wb") as file:
            file.write(stream.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        if mode is not None:
            with suppress(OSError):  # some file systems have no modes
                os.chmod(temporary, mode)
        _replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _replace(source: Path, target: Path) -> None:
    """Rename a file, and retry twice if that is denied: on Windows a viewer may hold the old file."""
    for wait in (0.1, 0.5):
        try:
            return os.replace(source, target)
        except PermissionError:
            time.sleep(wait)
    os.replace(source, target)


@contextmanager
def writable_folder(folder: Path) -> Iterator[None]:
    """Create a folder, if it is missing, for the block to write into; OSError if it is not writable.

    At the end, the folders that were created here are removed if they are empty.
    """
    made = list(takewhile(lambda path: not path.exists(), (folder, *folder.parents)))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            tempfile.TemporaryFile(dir=folder).close()  # fail before the work, not after it
        except OSError as error:
            raise OSError(f"{folder} cannot be written to ({error}); take another --out") from None
        yield
    finally:
        for path in made:
            with suppress(OSError):
                path.rmdir()


def remove_temporaries(folder: Path) -> None:
    """Remove the temporary files of killed processes; the caller must hold the folder's lock."""
    for file in folder.glob(TEMPORARY):
        with suppress(OSError):
            file.unlink()
