"""The C++ extension used by `cpu`: built on and for this machine, cached on disk, verified before loading.

A library is loaded only from a folder that no other user can write to, and only if it is complete, that is, if its last
32 bytes are the SHA-256 of the rest. Without a usable folder, it is built for the current process only.

Book: "Appendix: the CPU kernel".
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..atomic_write import write_atomically
from .self_test import BackendError, warn_once

SOURCES = Path(__file__).with_name("cpp")
FLAGS = ("-std=c++20", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-shared")
X86_FLAGS = ("-mprefer-vector-width=512",)  # a processor without registers this wide uses two
FIX_COMPILER = "apt install g++, or name a compiler in the environment variable CXX"
NEWER_COMPILER = "g++ 11 or clang 14, or newer"
FIX_FOLDER = "name a folder that can be written in TORCH_EXTENSIONS_DIR"
BUILD_TIMEOUT = 600  # seconds

build_seconds: float | None = None
"""Build time in this process, in seconds; None without a build."""
kept_in: Path | None = None
"""Cache folder of the loaded extension; None before it is loaded, or if it was built for this process only."""


@functools.cache
def load_extension() -> Any:
    """Load the operators of `cpp/mixer.cpp`; build them first unless they are cached.

    Raises:
        BackendError: if there is no compiler, the build fails, or the system is not Linux.

    Warns:
        RuntimeWarning: if the cache folder cannot be used; the build then serves this process only.
    """
    if sys.platform != "linux":
        raise BackendError(f"it is built on Linux only so far, not on {sys.platform}", "Linux")
    global kept_in
    command, name = _command()
    folder = None
    try:
        folder = cache_folder()
        _make_private(folder)
        _build_if_missing(command, folder / name)
        kept_in = folder
        return _load(folder / name)
    except OSError as error:
        reason = f"{folder or error.filename} cannot be used ({error.strerror})"
    try:
        with tempfile.TemporaryDirectory(prefix="bsmamba2-") as temporary:
            warn_once(f"the C++ kernel is built for this process only, because {reason}: {FIX_FOLDER}")
            _build(command, Path(temporary, name))
            return _load(Path(temporary, name))  # it stays loaded after the file is deleted
    except OSError as error:
        raise BackendError(f"{reason}, nor can a temporary folder ({error.strerror})", FIX_FOLDER) from error


def cache_folder() -> Path:
    """Cache folder: `bsmamba2` in TORCH_EXTENSIONS_DIR, or in the `torch_extensions` folder of the user's cache.

    Raises:
        FileNotFoundError: for a user without a home folder.
    """
    if chosen := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(chosen, "bsmamba2").absolute()
    try:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:
        raise FileNotFoundError(errno.ENOENT, "this user has no home folder", "~/.cache") from error
    return Path(caches, "torch_extensions", "bsmamba2").absolute()


def _command() -> tuple[list[str], str]:
    """Compiler command and library name. The name contains a hash of everything that determines the build, because
    machines with different processors may share a home folder."""
    root = Path(torch.__file__).parent
    command = [*_compiler(), *FLAGS, *(X86_FLAGS if platform.machine() == "x86_64" else ())]
    command += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    command += ["-isystem", str(root / "include")]
    sources = [path.read_bytes() for path in sorted(SOURCES.glob("*"))]
    lines = Path("/proc/cpuinfo").read_text().splitlines()  # what `-march=native` reads
    processor = sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    key = hashlib.sha256(repr((sources, command, torch.__version__, "".join(processor))).encode()).hexdigest()[:16]
    return [*command, str(SOURCES / "mixer.cpp"), f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu"], f"bsmamba2-{key}.so"


def _compiler() -> list[str]:
    """The compiler from CXX, as a program or a command with arguments such as `ccache g++`; no shell is used."""
    chosen = os.environ.get("CXX", "").strip() or "c++"
    try:
        return [chosen] if shutil.which(chosen) or Path(chosen).exists() else shlex.split(chosen)
    except ValueError as error:
        raise BackendError(f"CXX={chosen!r:.100} is not a command ({error})", FIX_COMPILER) from error


def _make_private(folder: Path) -> None:
    """Create a folder that only this user can write to; if others could write to it, first remove its libraries."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, "it is a link or a file", str(folder))
    if status.st_mode & 0o022 and status.st_uid == os.geteuid():
        for library in folder.glob("bsmamba2-*.so"):
            library.unlink()
        folder.chmod(0o700)
    elif status.st_mode & 0o022 or status.st_uid not in (os.geteuid(), 0):
        raise PermissionError(errno.EPERM, "another user owns it or can write it", str(folder))


def _is_whole(library: Path) -> bool:
    """Whether a library exists, is unchanged, and could be written only by this user or root."""
    try:
        status = library.lstat()
    except FileNotFoundError:
        return False
    if not stat.S_ISREG(status.st_mode) or status.st_uid not in (os.geteuid(), 0) or status.st_mode & 0o022:
        return False
    payload = library.read_bytes()
    return hashlib.sha256(payload[:-32]).digest() == payload[-32:]


def _build_if_missing(command: list[str], library: Path) -> None:
    """Build a library if it is missing or damaged; among several processes, the first builds and the others wait."""
    if _is_whole(library):
        return
    with _locked(library.parent) as locked:
        if locked:  # so any unfinished builds belong to killed processes
            for leftover in library.parent.glob("build-*"):
                shutil.rmtree(leftover, ignore_errors=True)
            for leftover in library.parent.glob(".bsmamba2-*.tmp"):
                leftover.unlink()
            if _is_whole(library):
                return
        _build(command, library)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Lock a folder against other builds while the context is active; yields whether that worked."""
    import fcntl  # not available on Windows

    descriptor, deadline, locked = os.open(folder, os.O_RDONLY), time.monotonic() + BUILD_TIMEOUT, False
    try:
        while not locked and time.monotonic() < deadline:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                locked = True
            except BlockingIOError:
                time.sleep(0.2)
            except OSError:  # a file system without locks
                break
        yield locked
    finally:
        os.close(descriptor)


def _build(command: list[str], library: Path) -> None:
    """Build in a temporary folder, append the hash, and write the library to its final path atomically."""
    global build_seconds
    started, compiler = time.perf_counter(), command[0]
    with tempfile.TemporaryDirectory(prefix="build-", dir=library.parent) as folder:
        made = Path(folder, library.name)
        environment = os.environ | {"TMPDIR": folder, "LC_ALL": "C"}
        command = [*command, "-o", str(made)]
        try:
            done = subprocess.run(command, capture_output=True, env=environment, timeout=BUILD_TIMEOUT)
        except subprocess.TimeoutExpired as error:
            raise BackendError(f"{compiler} takes more than {BUILD_TIMEOUT} s to build it", FIX_COMPILER) from error
        except OSError as error:
            reason = f"the C++ compiler {compiler!r} cannot be run ({error.strerror})"
            missing = isinstance(error, FileNotFoundError)
            raise BackendError(f"there is no C++ compiler {compiler!r}" if missing else reason, FIX_COMPILER) from error
        if done.returncode:
            output = done.stderr.decode(errors="backslashreplace")
            if "No space left on device" in output:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), folder)
            line = next((line for line in output.splitlines() if "error" in line), output[:200]).strip()
            reason = line or f"exit code {done.returncode}"
            raise BackendError(f"{compiler} fails to build it ({reason})", NEWER_COMPILER)
        if not made.is_file() or not made.stat().st_size:
            raise BackendError(f"{compiler} reports no error, but makes no library", FIX_COMPILER)
        payload = made.read_bytes()
        write_atomically(library, payload + hashlib.sha256(payload).digest())
        library.chmod(0o644)
    build_seconds = time.perf_counter() - started


def _load(library: Path) -> Any:
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise BackendError(f"{library} cannot be loaded ({error})", "remove the file: it is built again") from error
    return torch.ops.bsmamba2
