"""Atomic writes: a reader finds the old file or the new one, never a partial one."""

from __future__ import annotations

import errno
import os
import secrets
from pathlib import Path
from typing import IO


def write_atomically(path: str | os.PathLike[str], payload: bytes | memoryview | str) -> None:
    """Write a file atomically: to a temporary file in the same folder, flushed to the disk, then renamed.

    Args:
        path: the file, replaced when it exists; its folder must exist. The target of a link is replaced, not the link.
        payload: bytes, or text, written as UTF-8; bytes of names in other encodings become escapes.

    Raises:
        OSError: when it cannot be written, on a full disk for example; it names `path`, and an older file is unchanged.
    """
    path = Path(os.path.realpath(path))
    payload = payload.encode(errors="backslashreplace") if isinstance(payload, str) else payload
    temporary = path.with_name(f".bsmamba2-{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(payload)
            file.flush()
            fsync(file)
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            reason = f"cannot save {len(payload):,} bytes, nothing was changed: {error.strerror or error}"
            raise OSError(error.errno, reason, str(path)) from error
        raise


def fsync(file: IO[bytes]) -> None:
    """Flush a file to the disk, if its file system supports that."""
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise
