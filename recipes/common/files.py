# SPDX-License-Identifier: BSD-3-Clause
"""Files that a crash, a kill or a full disk leaves as they were, or whole."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write to within, which takes the place of ``path`` once all of it is on disk."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def append_line(path: Path, line: str) -> None:
    """Appends a line of JSON, if the file has none like it; what is left of one that was cut off is dropped.

    Raises:
        OSError: it could not be written; the file has what it had.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        with contextlib.suppress(OSError):  # a file system without locks: then no two runs should end at once
            fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        whole = file.read()
        if line.encode() in whole.splitlines():
            return
        end, text = whole.rfind(b"\n") + 1, line.encode() + b"\n"
        if whole[end:] and not _is_cut_off(whole[end:]):  # somebody's editor left the newline out
            end, text = len(whole), b"\n" + text
        os.ftruncate(file.fileno(), end)
        try:
            if os.write(file.fileno(), text) < len(text):  # one call: a kill comes before or after it
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            os.ftruncate(file.fileno(), end)
            raise


def _is_cut_off(text: bytes) -> bool:
    """Whether this is the beginning of an object of JSON, and no more."""
    try:
        json.loads(text)
    except ValueError:
        return text.startswith(b"{")
    return False


def _sync_folder(folder: Path) -> None:
    """Makes a rename last: until then it may be in memory only."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
