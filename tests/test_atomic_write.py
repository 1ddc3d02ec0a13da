"""Atomic writes: a file is saved whole or not at all."""

import dataclasses
import errno
import subprocess

import pytest
import torch
from checkpoint_files import LAYOUTS, TWO_STEMS, assert_equal

from bsmamba2 import BSMamba2, load_checkpoint, save_checkpoint
from bsmamba2.atomic_write import write_atomically


@pytest.fixture
def model() -> BSMamba2:
    torch.manual_seed(0)
    return BSMamba2(TWO_STEMS)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("target", "error"),
    [
        ("os.fsync", OSError(errno.EIO, "input/output error")),
        ("os.fsync", OSError(errno.ENOSPC, "no space left on device")),
        ("pathlib.Path.replace", PermissionError(errno.EACCES, "denied")),
        ("pathlib.Path.replace", KeyboardInterrupt()),
    ],
)
def test_a_save_that_fails_leaves_the_old_file(layout, target, error, model, tmp_path, monkeypatch):
    path = tmp_path / "m"
    save_checkpoint(model, path)
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(target, fail)
    with pytest.raises(type(error)) as raised:
        save_checkpoint(BSMamba2(TWO_STEMS), path, layout=layout)
    monkeypatch.undo()
    if isinstance(error, OSError):
        assert str(path) in str(raised.value)
        assert "nothing was changed" in str(raised.value)
        assert raised.value.errno == error.errno
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]


@pytest.fixture
def full_disk(tmp_path):
    folder = tmp_path / "small disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a small disk cannot be mounted here: {error}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_full_disk(layout, model, full_disk):
    path = full_disk / "m"
    save_checkpoint(model, path)
    before = path.read_bytes()
    with pytest.raises(OSError, match=r"cannot save .*No space left") as raised:
        save_checkpoint(BSMamba2(dataclasses.replace(TWO_STEMS, dim=64)), path, layout=layout)
    assert raised.value.errno == errno.ENOSPC
    assert raised.value.filename == str(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in full_disk.iterdir()] == ["m"]


def test_saving_replaces_and_keeps_links_and_rights(model, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real" / "m")
    save_checkpoint(BSMamba2(TWO_STEMS), tmp_path / "link")
    save_checkpoint(model, str(tmp_path / "link"))
    assert (tmp_path / "link").is_symlink()
    assert_equal(load_checkpoint(tmp_path / "real" / "m").state_dict(), model.state_dict())
    (tmp_path / "plain").touch()
    assert (tmp_path / "real" / "m").stat().st_mode == (tmp_path / "plain").stat().st_mode
    with pytest.raises(FileNotFoundError, match="no folder"):
        save_checkpoint(model, tmp_path / "no folder" / "m")


@pytest.mark.parametrize("payload", ["déjà vu", "déjà vu".encode(), memoryview("déjà vu".encode())])
def test_text_is_written_as_utf_8_and_bytes_as_they_are(payload, tmp_path):
    write_atomically(tmp_path / "m", payload)
    assert (tmp_path / "m").read_text(encoding="utf-8") == "déjà vu"
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_that_cannot_flush_is_no_error(code, tmp_path, monkeypatch):
    def fsync(_: int) -> None:
        raise OSError(code, "not supported")

    monkeypatch.setattr("os.fsync", fsync)
    write_atomically(tmp_path / "m", b"content")
    assert (tmp_path / "m").read_bytes() == b"content"


def test_a_name_in_another_encoding_is_written_with_escapes(tmp_path):
    write_atomically(tmp_path / "m", "caf\udce9, café")
    assert (tmp_path / "m").read_text(encoding="utf-8") == "caf\\udce9, café"
