"""Attack the commands with hostile and unlucky input: `python tests/attack/attack.py --help`.

Every attack runs one command in a process of its own with the input in a folder of its own, at most 10 seconds of
processor time, 1 GB more memory than the module's own, and files of 200 MB. An attack is survived when

    the command ends in time, by itself, with exit code 0, 1 or 2 and no traceback;
    after a failure, one short line on standard error names the input;
    no other program was started, no connection opened, and nothing outside the attack's folder changed;
    the attack's own condition holds (a song comes out whole or not at all, for example).

Attacks are drawn from a seed, so that a failure can be repeated. Linux only: it needs fork and resource limits.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import numpy as np
import torch

from bsmamba2.cli.main import main as run_command

RESULTS = Path(__file__).parents[2] / "book" / "data" / "attack.json"
SECONDS, WALL_SECONDS, BYTES, FILE_BYTES = 10, 60, 1 << 30, 200 << 20


@dataclass
class Attack:
    """A command on hostile input.

    Attributes:
        arguments: of `bsmamba2`.
        names: the message of a failure must contain one of them.
        check: returns the fault of an outcome, "" for none.
        setup: called in the attack's process before the command.
        seconds: limit of processor time.
        rival: arguments of a second command, which runs at the same time.
        program: a program that the command may start.
        command: what is run, if not `bsmamba2`.
    """

    arguments: list[str]
    names: list[str]
    check: Callable[[Outcome], str] = lambda outcome: ""
    setup: Callable[[], None] = lambda: None
    seconds: int = SECONDS
    rival: list[str] = field(default_factory=list)
    program: str = ""
    command: Callable[[list[str]], int] = run_command


@dataclass
class Outcome:
    """The end of an attack: exit code (None after the time limit), output, and forbidden actions."""

    folder: Path
    code: int | None
    stdout: str
    stderr: str
    forbidden: list[str]
    rival: Outcome | None = None


@dataclass
class Kind:
    """A kind of attack: `make(rng, folder)` draws one, `count` times."""

    title: str
    count: int
    make: Callable[[np.random.Generator, Path], Attack]
    faults: list[str] = field(default_factory=list)


KINDS: list[Kind] = []


def kind(title: str, count: int) -> Callable[[Callable[[np.random.Generator, Path], Attack]], None]:
    """Decorator: add a kind of attack."""

    def add(make: Callable[[np.random.Generator, Path], Attack]) -> None:
        KINDS.append(Kind(title, count, make))

    return add


def fault_of(attack: Attack, folder: Path) -> str:
    """Run an attack in a child process; returns its fault, "" when it is survived."""
    neighbours = set(folder.parent.iterdir())
    commands = [attack.arguments, attack.rival] if attack.rival else [attack.arguments]
    with contextlib.ExitStack() as stack:
        started = []
        for arguments in commands:
            logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            if not (child := os.fork()):
                _run_child(attack, arguments, folder, logs)
            started.append((child, logs))
        outcomes = [_wait(child, folder, logs) for child, logs in started]
    outcomes[0].rival = outcomes[-1] if attack.rival else None
    for outcome in outcomes:
        if fault := _general_fault(attack, outcome):
            return fault
    if set(folder.parent.iterdir()) != neighbours:
        return f"written outside its folder: {set(folder.parent.iterdir()) ^ neighbours}"
    return attack.check(outcomes[0])


def _general_fault(attack: Attack, outcome: Outcome) -> str:
    if outcome.code is None:
        return f"not ended after {WALL_SECONDS} s"
    if outcome.code < 0:
        return f"killed by {signal.Signals(-outcome.code).name}"
    if outcome.forbidden:
        return outcome.forbidden[0]
    if "Traceback" in outcome.stderr or outcome.code not in (0, 1, 2):
        return f"exit code {outcome.code}: " + outcome.stderr.strip().splitlines()[-1][:300]
    if outcome.code and not any(name in outcome.stderr for name in attack.names):
        return f"the message names none of {attack.names}: {outcome.stderr[:300]!r}"
    if max(map(len, outcome.stderr.splitlines()), default=0) > 2000:
        return f"a line of {max(map(len, outcome.stderr.splitlines()))} characters"
    return ""


def _run_child(attack: Attack, arguments: list[str], folder: Path, logs: Path) -> None:
    """The child's side: limits, an audit of forbidden actions, the command; never returns."""
    code = 70
    try:
        os.setsid()
        os.chdir(folder)
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(logs / name, os.O_CREAT | os.O_WRONLY), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, used + BYTES))
        resource.setrlimit(resource.RLIMIT_CPU, (attack.seconds, attack.seconds + 2))
        resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
        attack.setup()
        _audit(folder, logs, attack.program)
        code = attack.command(arguments)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


# Audit events that change files, and the positions of the paths among their arguments.
CHANGES = {
    "os.rename": (0, 1), "os.link": (0, 1), "os.remove": (0,), "os.mkdir": (0,), "os.rmdir": (0,), "os.truncate": (0,),
    "os.symlink": (1,), "os.chmod": (0,), "shutil.rmtree": (0,),
}  # fmt: skip


def _audit(folder: Path, logs: Path, program: str) -> None:
    """Record every program started, connection opened, and change to files elsewhere."""
    report = os.open(logs / "forbidden", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    temporary = tuple(f"{tempfile.gettempdir()}/{name}" for name in ("bsmamba2", "torchinductor_"))
    own = [str(Path(name).expanduser()) for name in ("~/.cache", "~/.config/matplotlib")]  # Triton's, matplotlib's
    allowed = (str(folder), *temporary, *own, "/dev/null", "/dev/shm")
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

    def hook(event: str, args: tuple[object, ...]) -> None:
        if event in ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect", "os.fork"):
            if not program or Path(str(args[0])).name != program:
                os.write(report, f"{event} {args!r:.200}\n".encode())
            return
        paths = [args[number] for number in CHANGES.get(event, ())]
        if event == "open" and isinstance(args[2], int) and args[2] & writing:
            paths = [args[0]]
        for path in paths:
            if not isinstance(path, str | bytes | os.PathLike):
                continue
            named = Path(os.fsdecode(path))
            if event != "open":  # of a link itself, not of its target
                place = str(Path(os.path.realpath(named.parent), named.name))
            else:
                place = os.path.realpath(named)
            if not place.startswith(allowed):
                os.write(report, f"{event} outside its folder: {place}\n".encode(errors="backslashreplace"))

    sys.addaudithook(hook)


def killed(arguments: list[str], folder: Path, change: int) -> None:
    """Run a command in a folder, in a process that is killed just before its `change`-th change of a name."""
    if not (child := os.fork()):
        numbers = count(1)

        def hook(event: str, _: tuple[object, ...]) -> None:
            if event in ("os.rename", "os.link", "os.remove") and next(numbers) == change:
                os.kill(os.getpid(), signal.SIGKILL)

        os.chdir(folder)
        for number in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
        sys.addaudithook(hook)
        os._exit(run_command(arguments))
    os.waitpid(child, 0)


def _wait(child: int, folder: Path, logs: Path) -> Outcome:
    """Wait for a child, and end it and its children after the time limit."""
    end = time.monotonic() + WALL_SECONDS
    status: int | None = None
    while status is None and time.monotonic() < end:
        pid, raw = os.waitpid(child, os.WNOHANG)
        if pid:
            status = os.waitstatus_to_exitcode(raw)
        else:
            time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    if status is None:
        os.waitpid(child, 0)
    texts = [
        (logs / name).read_bytes().decode(errors="backslashreplace") if (logs / name).exists() else ""
        for name in ("stdout", "stderr", "forbidden")
    ]
    return Outcome(folder, status, texts[0], texts[1], texts[2].splitlines())


def main() -> int:
    """Run all kinds; 0 when every attack was survived."""
    sys.path.insert(0, str(Path(__file__).parent))
    import kinds
    import shared_folders  # noqa: F401  (its kinds)

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of the attacks (0)")
    parser.add_argument("--kind", default="", help="only the kinds whose title contains this")
    parser.add_argument("--write", action="store_true", help=f"write the table to {RESULTS.name}, for the book")
    parser.add_argument("--keep", type=Path, help="folder in which the input of failed attacks stays")
    args = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="attack-") as root:
        kinds.prepare(Path(root))
        for number, each in enumerate(KINDS):
            if args.kind.lower() not in each.title.lower():
                continue
            start = time.monotonic()
            for attempt in range(each.count):
                folder = Path(root, f"{number}-{attempt}")
                folder.mkdir()
                fault = fault_of(each.make(np.random.default_rng([args.seed, number, attempt]), folder), folder)
                if fault:
                    each.faults.append(fault)
                    print(f"    {each.title}, attack {attempt}: {fault}")
                    if args.keep:
                        shutil.copytree(folder, args.keep / folder.name, symlinks=True, dirs_exist_ok=True)
                shutil.rmtree(folder)
            survived, seconds = each.count - len(each.faults), time.monotonic() - start
            print(f"{each.title}: {each.count} tried, {survived} survived, {seconds:.0f} s", flush=True)
    if args.write:
        rows = [{"kind": each.title, "tried": each.count, "survived": each.count - len(each.faults)} for each in KINDS]
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"{time.monotonic() - began:.0f} s, seed {args.seed}")
    return 1 if any(each.faults for each in KINDS) else 0


if __name__ == "__main__":
    import attack  # this file under the name that `kinds` imports

    sys.exit(attack.main())
