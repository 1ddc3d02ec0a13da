"""The C++ extension: built once, verified before it is loaded, and the true cause where that fails."""

from __future__ import annotations

import fcntl
import os
import sys
import threading
from pathlib import Path

import pytest
import torch

from bsmamba2.kernels import BackendError, extension, self_test

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="built on Linux only")
OUTPUT = 'while [ "$1" != -o ]; do shift; done; '
LIBRARY = b"stands for a library" * 99


class Cache:
    """A cache folder with a compiler that writes `LIBRARY` and counts; what is loaded is noted and not loaded."""

    def __init__(self, root: Path) -> None:
        self.root, self.folder = root, root / "bsmamba2"
        self.compiler, self.counter = root / "compiler", root / "counter"
        (root / "source").write_bytes(LIBRARY)
        self.loaded: list[Path] = []
        self.script(f'{OUTPUT}echo >> "{self.counter}"; cp "{root}/source" "$2"')

    def script(self, text: str) -> None:
        self.compiler.write_text(f"#!/bin/sh\n{text}\n")
        self.compiler.chmod(0o755)

    @property
    def builds(self) -> int:
        return len(self.counter.read_text()) if self.counter.exists() else 0

    def load(self) -> Path:
        extension.load_extension.__wrapped__()
        return self.loaded[-1]

    def half_made(self) -> list[str]:
        return [path.name for path in self.folder.glob("*") if path.suffix != ".so"] + [
            path.name for path in self.folder.glob(".*")
        ]


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cache:
    made = Cache(tmp_path)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", str(made.compiler))
    monkeypatch.setattr(extension, "build_seconds", None)
    monkeypatch.setattr(extension, "kept_in", None)
    monkeypatch.setattr(self_test, "_warned", set())

    def load(path: str) -> None:
        assert Path(path).read_bytes()[:-32] == LIBRARY
        made.loaded.append(Path(path))

    monkeypatch.setattr(torch.ops, "load_library", load)
    return made


def test_it_is_built_once_in_a_private_folder(cache: Cache) -> None:
    library = cache.load()
    assert cache.load() == library
    assert library.parent == cache.folder == extension.kept_in == extension.cache_folder()
    assert cache.builds == 1
    assert cache.folder.stat().st_mode & 0o777 == 0o700
    assert not cache.half_made()


@pytest.mark.parametrize("size", [0, 1, 31, 32, 33, 1000, len(LIBRARY) + 31])
def test_a_library_cut_short_is_built_again(cache: Cache, size: int) -> None:
    library = cache.load()
    with library.open("r+b") as file:
        file.truncate(size)
    cache.load()
    assert cache.builds == 2
    cache.load()
    assert cache.builds == 2


@pytest.mark.parametrize("place", [0, 700, -33, -32, -1])
def test_one_flipped_bit_is_noticed(cache: Cache, place: int) -> None:
    library = cache.load()
    payload = bytearray(library.read_bytes())
    payload[place] ^= 4
    library.write_bytes(payload)
    cache.load()
    assert cache.builds == 2


@pytest.mark.parametrize("kind", ["link", "folder", "fifo", "group can write it", "all can write it"])
def test_what_is_not_our_own_file_is_not_loaded(cache: Cache, kind: str) -> None:
    library = cache.load()
    payload = library.read_bytes()
    if "can write" in kind:
        library.chmod(0o664 if "group" in kind else 0o646)
    else:
        library.unlink()
    if kind == "link":
        (cache.root / "elsewhere.so").write_bytes(payload)
        library.symlink_to(cache.root / "elsewhere.so")
    if kind == "folder":
        library.mkdir()
        with pytest.warns(RuntimeWarning, match="cannot be used"):
            cache.load()
    if kind == "fifo":
        os.mkfifo(library)
    cache.load()
    assert cache.builds >= 2
    if kind != "folder":
        assert library.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o720, 0o702, 0o1777])
def test_a_folder_that_others_could_write_is_emptied_and_closed(cache: Cache, mode: int) -> None:
    library = cache.load()
    cache.folder.chmod(mode)
    assert cache.load() == library
    assert cache.builds == 2, "others could have put it there"
    assert cache.folder.stat().st_mode & 0o7777 == 0o700


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("what", ["folder", "library"])
def test_what_belongs_to_another_user_is_not_loaded(cache: Cache, what: str) -> None:
    library = cache.load()
    os.chown(cache.folder if what == "folder" else library, 12345, -1)
    if what == "folder":
        with pytest.warns(RuntimeWarning, match="another user owns it"):
            assert cache.load() != library
    else:
        assert cache.load() == library
        assert library.stat().st_uid == 0
    assert cache.builds == 2


def test_a_link_in_place_of_the_folder_is_not_followed(cache: Cache) -> None:
    (cache.root / "elsewhere").mkdir()
    cache.folder.symlink_to(cache.root / "elsewhere")
    with pytest.warns(RuntimeWarning, match=r"bsmamba2 cannot be used \(it is a link or a file\)"):
        cache.load()
    assert not list((cache.root / "elsewhere").iterdir())


def test_what_killed_builds_left_is_removed(cache: Cache) -> None:
    cache.folder.mkdir(mode=0o700)
    for name in ("build-abc", "build-def"):
        (cache.folder / name).mkdir()
        (cache.folder / name / "half.o").write_bytes(b"half")
    (cache.folder / ".bsmamba2-0123.tmp").write_bytes(b"half")
    cache.load()
    assert not cache.half_made()


def test_a_build_waits_for_another_and_takes_what_it_made(cache: Cache) -> None:
    library = cache.load()
    payload = library.read_bytes()
    library.unlink()
    (cache.folder / "build-of-another").mkdir()
    descriptor = os.open(cache.folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    waiting = threading.Thread(target=cache.load)
    waiting.start()
    waiting.join(0.6)
    assert waiting.is_alive()
    assert (cache.folder / "build-of-another").exists()
    library.write_bytes(payload)
    library.chmod(0o644)
    os.close(descriptor)
    waiting.join(20)
    assert not waiting.is_alive()
    assert cache.builds == 1


# --- where it cannot be built -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "why", "fix"),
    [
        (None, "there is no C\\+\\+ compiler", "apt install g\\+\\+"),
        ("echo 'x.cpp: error: no such thing' >&2; exit 1", "fails to build it .*error: no such thing", "g\\+\\+ 11"),
        ("printf 'x.cpp: error: \\344\\377 is wrong\\n' >&2; exit 1", "error: .*xe4.*xff is wrong", "g\\+\\+ 11"),
        ("exit 3", "fails to build it \\(exit code 3\\)", "g\\+\\+ 11"),
        ("exit 0", "makes no library", "CXX"),
        (OUTPUT + ': > "$2"', "makes no library", "CXX"),
        (OUTPUT + 'mkdir "$2"', "makes no library", "CXX"),
    ],
)
def test_a_compiler_that_is_not_there_or_fails(cache: Cache, script: str | None, why: str, fix: str) -> None:
    if script is None:
        cache.compiler.unlink()
    else:
        cache.script(script)
    with pytest.raises(BackendError, match=f"{why}.*To fix this: .*{fix}"):
        cache.load()
    assert not cache.half_made()


def test_a_compiler_that_makes_rubbish(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(cache.root))
    monkeypatch.setenv("CXX", str(cache.compiler))
    with pytest.raises(BackendError, match=r"cannot be loaded.*To fix this: .*remove the file"):
        extension.load_extension.__wrapped__()
    assert not cache.half_made()


@pytest.mark.parametrize(
    ("mode", "text", "why"), [(0o644, "#!/bin/sh\n", "Permission denied"), (0o755, "rubbish", "Exec format error")]
)
def test_a_compiler_that_cannot_be_run(cache: Cache, mode: int, text: str, why: str) -> None:
    cache.compiler.write_text(text)
    cache.compiler.chmod(mode)
    with pytest.raises(BackendError, match=f"compiler.*cannot be run \\({why}\\).*CXX"):
        cache.load()


def test_the_compiler_may_be_a_command_with_arguments(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    wrapper, noted = cache.root / "a wrapper", cache.root / "noted"
    wrapper.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > "{noted}"\nexec "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("CXX", f" '{wrapper}'  {cache.compiler} -march=x '; touch {cache.root}/ran'")
    library = cache.load()
    assert noted.read_text().splitlines()[:3] == [str(cache.compiler), "-march=x", f"; touch {cache.root}/ran"]
    assert not (cache.root / "ran").exists()  # no shell reads it
    monkeypatch.setenv("CXX", str(wrapper.rename(cache.root / "with a space")))  # a program, not three words
    cache.script("exit 3")
    with pytest.raises(BackendError, match=r"with a space.* fails to build it"):
        cache.load()
    assert library.exists()
    monkeypatch.setenv("CXX", "ccache 'g++")
    with pytest.raises(BackendError, match=r"CXX=.*is not a command \(No closing quotation\)"):
        cache.load()


def test_a_full_disk_is_named_as_such(cache: Cache) -> None:
    cache.script("echo 'fatal error: error writing to a.s: No space left on device' >&2; exit 1")
    with (
        pytest.warns(RuntimeWarning, match=r"bsmamba2 cannot be used \(No space left on device\)"),
        pytest.raises(BackendError, match=r"nor can a temporary folder \(No space left on device\)"),
    ):
        cache.load()


@pytest.mark.parametrize("home", ["/dev/null", "/proc/1/nope", "/dev/null/below", None])
def test_without_a_folder_it_is_built_for_this_process(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, home: str | None
) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if home is None:
        monkeypatch.setattr(Path, "home", staticmethod(lambda: (_ for _ in ()).throw(RuntimeError("no home"))))
    else:
        monkeypatch.setenv("HOME", home)
    with pytest.warns(RuntimeWarning, match="built for this process only") as warned:
        library = cache.load()
    said = str(warned[0].message)
    assert f"because {home or '~'}/.cache" in said
    assert "TORCH_EXTENSIONS_DIR" in said
    assert "compiler" not in said
    assert not library.parent.exists(), "what is loaded needs no file"
    assert extension.kept_in is None
    assert extension.build_seconds is not None


def test_without_any_folder_the_reason_is_the_folder(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache.root / "file").write_text("")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(cache.root / "file" / "below"))
    monkeypatch.setattr(extension.tempfile, "tempdir", str(cache.root / "file"))
    with pytest.raises(BackendError, match=r"below/bsmamba2 cannot be used.*temporary folder.*TORCH_EXTENSIONS_DIR"):
        cache.load()


def test_on_another_system_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(BackendError, match="Linux only so far, not on darwin"):
        extension.load_extension.__wrapped__()
