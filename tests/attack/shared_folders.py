"""Attacks on things that processes share: names of results, half-finished work, the kernel's cache, sweeps."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import kinds
import numpy as np
import soundfile
from attack import Attack, Outcome, killed, kind
from kinds import MARK, RATE, SAMPLES, ends_as_before, it_ran, pick, resume, separate, write

from bsmamba2.experiments import sweep
from bsmamba2.kernels import cpu, extension


def results(folder: Path) -> list[int]:
    """Lengths of the results of `song.wav`; hidden files count as -1, unless they are empty."""
    files = sorted(path for path in (folder / "out").rglob("*") if path.is_file() and path.stat().st_size)
    return [-1 if path.name.startswith(".") else soundfile.info(path).frames for path in files]


@kind("Two processes and one name of a result", 6)
def _(rng: np.random.Generator, folder: Path) -> Attack:
    longer = SAMPLES + int(rng.integers(1, 40_000))
    for name, samples in (("a", SAMPLES), ("b", longer)):
        (folder / name).mkdir()
        soundfile.write(folder / name / "song.wav", np.full((samples, 2), 0.1), RATE)

    def check(outcome: Outcome) -> str:
        codes = sorted([outcome.code, outcome.rival.code])
        of = longer if outcome.code else SAMPLES
        return "" if codes == [0, 1] and results(folder) == [of, of] else f"codes {codes}, results {results(folder)}"

    attack = separate(folder / "a" / "song.wav")
    return Attack(attack.arguments, ["song"], check, rival=separate(folder / "b" / "song.wav").arguments)


@kind("Process killed between two changes of names", 8)
def _(rng: np.random.Generator, folder: Path) -> Attack:
    if rng.random() < 0.5:
        attack = separate(write(folder / "song.wav", kinds.SONGS["wav"]), None, "--overwrite")
        attack.check = lambda outcome: "" if results(folder) == [SAMPLES] * 2 else f"results {results(folder)}"
    else:
        attack = resume(folder / "run", "run")
        attack.check = ends_as_before
    killed(attack.arguments, folder, int(rng.integers(1, 8)))
    return attack


@kind("Damaged or open cache of the kernel", 8)
def _(rng: np.random.Generator, folder: Path) -> Attack:
    library = folder / "cache" / "bsmamba2" / extension._command()[1]
    library.parent.mkdir(mode=0o700, parents=True)
    content = bytearray((extension.cache_folder() / library.name).read_bytes())
    which = pick(rng, ["cut", "bit", "empty", "link", "open folder", "open file"])
    if which == "cut":
        del content[int(rng.integers(1, len(content))) :]
    elif which == "bit":
        content[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
    elif which == "empty":
        content.clear()
    if which == "link":
        library.symlink_to(write(folder / "library", bytes(content)))
    else:
        write(library, bytes(content)).chmod(0o666 if which == "open file" else 0o644)
    library.parent.chmod(0o777 if which == "open folder" else 0o700)

    def setup() -> None:  # the library is found, must not be loaded, and cannot be built
        os.environ.update(TORCH_EXTENSIONS_DIR=str(folder / "cache"), CXX="no-compiler")
        extension.load_extension.cache_clear()
        cpu.self_test_error.cache_clear()

    song = separate(write(folder / "song.wav", kinds.SONGS["wav"]), None, "--backend", "cpu")

    def check(outcome: Outcome) -> str:
        return "" if outcome.code == 2 else f"{which}: the library was loaded"

    return Attack(song.arguments, ["no-compiler"], check, setup, program="no-compiler")


@kind("Hostile grid of a sweep", 8)
def _(rng: np.random.Generator, folder: Path) -> Attack:
    keys = ["../../x", "lr/../..", f"__import__('os').system('touch {MARK}')", "lr\nopen('x', 'w')", "output_dir", "",
            f"lr=1; open('{MARK}', 'w')", "no_such_parameter", "class\x00", "\u202elr"]  # fmt: skip
    key = pick(rng, keys)

    def command(arguments: list[str]) -> int:
        try:
            points = sweep.expand_grid({key: [1, "../y"], "lr": ["../../z", 2]}, {}, folder / "sweep")
            list(sweep.run_grid(points, Path(__file__).parents[2] / "notebooks" / "train.ipynb"))
        except ValueError as error:
            print(f"grid: {error}".encode("unicode_escape").decode(), file=sys.stderr)
            return 2
        return 0

    def check(outcome: Outcome) -> str:
        return it_ran(outcome) or ("" if outcome.code == 2 and not list(folder.iterdir()) else f"{key!r} was taken")

    return Attack([], ["grid"], check, command=command)
