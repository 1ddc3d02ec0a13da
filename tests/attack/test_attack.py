"""The attack script itself: planted changes outside an attack's folder are reported, those inside are not."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="needs fork and Linux's limits"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork"),
]


def inside() -> None:
    Path("a").write_text("x")
    Path("a").rename("b")
    os.truncate("b", 0)
    Path("link").symlink_to("/etc/passwd")
    Path("link").unlink()
    Path("b").unlink()
    Path("d").mkdir()
    Path("d").rmdir()


def through_a_link() -> None:
    Path("up").symlink_to("../outside")
    Path("up/new").mkdir()


@pytest.mark.parametrize(
    ("act", "fault"),
    [
        (inside, ""),
        (lambda: Path("../outside/new").mkdir(), "os.mkdir outside"),
        (lambda: Path("../outside/x").rename("y"), "os.rename outside"),
        (lambda: os.truncate("../outside/x", 1), "os.truncate outside"),
        (lambda: Path("../outside/x").unlink(), "os.remove outside"),
        (lambda: Path("../outside/d").rmdir(), "os.rmdir outside"),
        (lambda: shutil.rmtree("../outside"), "shutil.rmtree outside"),
        (lambda: Path("../outside/x").write_text("x"), "open outside"),
        (lambda: subprocess.run(["true"]), "subprocess.Popen"),
        (through_a_link, "os.mkdir outside"),
        (lambda: sys.exit(3), "exit code 3"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "killed by SIGKILL"),
    ],
)
def test_a_planted_fault_is_reported(act: Callable[[], object], fault: str, tmp_path: Path) -> None:
    from attack import Attack, fault_of

    (tmp_path / "outside" / "d").mkdir(parents=True)
    (tmp_path / "outside" / "x").write_text("abc")
    folder = tmp_path / "attacked"
    folder.mkdir()

    def command(_: list[str]) -> int:
        print("x", file=sys.stderr)
        act()
        return 0

    found = fault_of(Attack([], ["x"], command=command), folder)
    assert found.startswith(fault)
    assert bool(found) == bool(fault)
