"""Atomic writes: a reader finds the old file or the new one, never a partial one."""

from __future__ import annotations

import errno
import os
import secrets
from pathlib import Path
from typing import IO


def write_atomically(path: str | os.PathLike[str], payload: bytes | memoryview | str) -> None:
    """Write a file atomically: write a temporary file in the same folder, flush it to the disk and rename it.

    Args:
        path: the file, replaced if it exists; its folder must exist. The target of a link is replaced, not the link.
        payload: bytes, or text, which is written as UTF-8; characters that UTF-8 cannot encode become escapes.

    Raises:
        OSError: if the file cannot be written, for example on a full disk. The error names `path`, and an existing file
            is unchanged.
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
