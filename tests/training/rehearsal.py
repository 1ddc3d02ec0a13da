"""Rehearse the published training on a folder of MUSDB18-HQ's layout, with the commands of "Installation".

    python tests/training/rehearsal.py FOLDER

FOLDER is new, and needs 2.6 GB: 100 songs to train with and 50 to test with, of 20 s each. Only the size of the model
and the number of steps and examples are small (`SMALLER`). The training is killed once and resumed. Then it measures
how fast a worker of the loader reads examples. On a machine without a GPU it runs on the CPU, in ten minutes. It needs
the package tensorboard.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from itertools import islice
from multiprocessing import active_children
from pathlib import Path

import soundfile
import torch

from bsmamba2 import load_checkpoint
from bsmamba2.settings import read_parameters
from bsmamba2.synth import STEMS, synthesise_songs
from bsmamba2.training.datasets import VALIDATION
from bsmamba2.training.job import JobConfig

ROOT = Path(__file__).parents[2]
TRAIN = (
    "torchrun --standalone --nproc-per-node 2 -m bsmamba2 train"
    " --params notebooks/params/train_paper.yaml --data musdb18hq --tensorboard"
)
EVALUATE = "bsmamba2 evaluate musdb18hq --checkpoint runs/paper/best.safetensors -o scores"
SEPARATE = "bsmamba2 separate song.mp3 --checkpoint runs/paper/best.safetensors -o runs/paper/separated"
SMALLER = {
    TRAIN: "--preset small --dim 16 --depth 1 --batch 1 --grad-accum-steps 2 --steps 4 --save-every 2"
    " --validate-every 2 --validation-windows 28",
    EVALUATE: "--segments ''",
    SEPARATE: "",
}
"""The commands in their order, and the options that make them small."""
MODULES = {"bsmamba2": "bsmamba2", "torchrun": "torch.distributed.run", "papermill": "papermill"}


def make_musdb(folder: Path, train: int = 100, test: int = 50, seconds: float = 20.0) -> None:
    """Songs in `musdb18hq/`, 16 bits as there, 14 of them with the names of those that validate; and `song.mp3`."""
    pool = synthesise_songs(4, seed=5, seconds=seconds)
    generator = torch.Generator().manual_seed(0)
    names = [*sorted(VALIDATION)[: train // 7], *(f"Artist {number} - Song" for number in range(train))][:train]
    for split, name in [("train", name) for name in names] + [("test", f"Other {i} - Song") for i in range(test)]:
        stems = {}
        for number, stem in enumerate(STEMS):
            song, shift = torch.randint(1 << 30, (2,), generator=generator).tolist()
            stems[stem] = 0.5 * pool[song % len(pool)].stems[number].roll(shift, -1)
        (folder / "musdb18hq" / split / name).mkdir(parents=True)
        for stem, audio in {**stems, "mixture": sum(stems.values(), torch.zeros(1))}.items():
            file = folder / "musdb18hq" / split / name / f"{stem}.wav"
            soundfile.write(file, audio.T.numpy(), 44_100, subtype="PCM_16")
    soundfile.write(folder / "song.mp3", pool[0].mixture.T.numpy(), 44_100)
    (folder / "notebooks").symlink_to(ROOT / "notebooks")


def start(command: str, folder: Path) -> subprocess.Popen:
    """A command of a page, as a process in `folder`; on a machine with one GPU, one process trains."""
    if torch.cuda.device_count() == 1:
        command = command.replace("--nproc-per-node 2", "--nproc-per-node 1")
    program, *arguments = shlex.split(command)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    return subprocess.Popen([sys.executable, "-m", MODULES[program], *arguments], cwd=folder, env=environment)


def kill_tree(pid: int) -> None:
    """SIGKILL for a process, those that it started, and theirs: what a power cut leaves."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    os.kill(pid, signal.SIGKILL)
    for child in children:
        kill_tree(int(child))


def lines(folder: Path) -> list[dict]:
    """The log of the training run."""
    log = folder / "runs" / "paper" / "steps.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def published(data: str) -> JobConfig:
    """The published training on a folder, with one worker."""
    parameters = read_parameters(Path("notebooks/params/train_paper.yaml"))
    return JobConfig.from_mapping({**parameters, "data": data, "workers": 1})


def examples_per_second(data: str, batches: int = 30) -> float:
    """How many published examples one worker reads and hands over, per second of its time on a processor."""
    job = published(data)
    loaded = iter(job.batches(job.windows()[0]))
    list(islice(loaded, 6))  # from now on the worker always reads ahead
    (worker,) = (process.pid for process in active_children())
    started = processor_seconds(worker)
    list(islice(loaded, batches))
    return batches * job.batch / (processor_seconds(worker) - started)


def processor_seconds(pid: int | None) -> float:
    """How long a process has run so far, with the system's work for it."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main(folder: Path) -> None:
    assert find_spec("tensorboard"), "first: pip install tensorboard"
    folder.mkdir(parents=True)
    os.chdir(folder)
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    timed("songs", lambda: make_musdb(folder))
    commands = [f"{command} {options}" for command, options in SMALLER.items()]
    training = start(commands[0], folder)
    while len(lines(folder)) < 3:
        assert training.poll() is None, "the training has stopped by itself"
        time.sleep(0.05)
    kill_tree(training.pid)
    training.wait()
    first = lines(folder)
    for command in commands:
        assert timed(command, start(command, folder).wait) == 0
    log, run = lines(folder), folder / "runs" / "paper"
    assert [line["step"] for line in log] == [1, 2, 3, 4]
    assert log[:2] == first[:2]
    assert log[2]["loss"] == first[2]["loss"] or torch.cuda.is_available()  # the repeated step: the same bits
    assert [("usdr" in line) for line in log] == [False, True, False, True]
    assert {path.name for path in run.glob("*.safetensors")} == {"best.safetensors", "last.safetensors"}
    assert list((run / "tensorboard").glob("events.out.*"))
    assert load_checkpoint(run / "best.safetensors").config.dim == 16
    _, (vocals, *_) = published("musdb18hq").windows()
    assert {track.name for track, _ in vocals} == VALIDATION
    rows = json.loads((folder / "scores" / "evaluation.json").read_text())["rows"]
    assert len({row["track"] for row in rows}) == 50
    assert (folder / "runs" / "paper" / "separated" / "song.vocals.wav").exists()
    for song in sorted((folder / "musdb18hq" / "train").iterdir())[:20]:
        (folder / "flac" / song.name).mkdir(parents=True)
        for stem in STEMS:
            audio, rate = soundfile.read(song / f"{stem}.wav", dtype="int16")
            soundfile.write(folder / "flac" / song.name / f"{stem}.flac", audio, rate)
    for data in ("musdb18hq", "flac"):
        print(f"{data}: one worker reads {examples_per_second(data):.0f} examples per second of processor time")
    print("rehearsed: killed after step", len(first), "and resumed; best, last, evaluation and separation are there")


def timed(name: str, call: Callable) -> object:
    started = time.monotonic()
    result = call()
    print(f"{time.monotonic() - started:.0f} s: {name}", flush=True)
    return result


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
