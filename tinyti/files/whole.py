"""Whole-file writing: a file is written completely or stays as it was."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: str | Path) -> Iterator[io.BytesIO]:
    """Write a file whole or not at all: what the block writes into the stream takes the place of `path`.

    The stream is memory, because some libraries do not survive a full disk.  At the block's end its bytes are
    written to `.NAME.tmp`, which is renamed.  After a failure the old file is unchanged.  OSError if the
    folder is missing, not writable or full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"No such folder: {path.parent}")
    stream = io.BytesIO()
    yield stream
    try:
        with open(temporary, "wb") as file:
            file.write(stream.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
