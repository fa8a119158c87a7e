"""Whole-file writing: a file is written completely or stays as it was."""

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
    """Write a file whole or not at all: what the block writes into the stream takes the place of `path`.

    The stream is memory, because some libraries do not survive a full disk.  At the block's end its bytes are
    written to a new file of a random name in the same folder, which is renamed.  The old file's permissions
    are kept.  After a failure the old file is unchanged.  OSError if the folder is missing, not writable or
    full.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"No such folder: {path.parent}")
    stream = io.BytesIO()
    yield stream
    temporary = path.with_name(TEMPORARY.replace("*", secrets.token_hex(8)))
    # O_EXCL opens no file that is there and follows no link: nobody else can know or prepare the name.
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
    """Rename a file; on Windows again after a moment, because a viewer may hold the old one."""
    for wait in (0.1, 0.5):
        try:
            return os.replace(source, target)
        except PermissionError:
            time.sleep(wait)
    os.replace(source, target)


@contextmanager
def writable_folder(folder: Path) -> Iterator[None]:
    """A folder to write into during the block, made if it is not there; OSError if it cannot be written to.

    Of the folders that were made, those that are empty at the end are removed.
    """
    made = list(takewhile(lambda path: not path.exists(), (folder, *folder.parents)))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            tempfile.TemporaryFile(dir=folder).close()  # before the work, not after it
        except OSError as error:
            raise OSError(f"{folder} cannot be written to ({error}); take another --out") from None
        yield
    finally:
        for path in made:
            with suppress(OSError):
                path.rmdir()


def remove_temporaries(folder: Path) -> None:
    """Remove what killed processes left in a folder; only for who holds the folder's lock."""
    for file in folder.glob(TEMPORARY):
        with suppress(OSError):
            file.unlink()
