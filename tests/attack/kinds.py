"""The kinds of attack: on audio files and their names, checkpoints, parameter files, run folders and results."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import soundfile
import torch
from attack import Attack, Outcome, kind

from bsmamba2.checkpoints import BUNDLED_CHECKPOINT, bundled_checkpoint, load_checkpoint
from bsmamba2.cli.main import main as run_command
from bsmamba2.config import ModelConfig
from bsmamba2.kernels import accelerate
from bsmamba2.model import BSMamba2

RATE, SAMPLES = 44_100, 66_150
SONGS: dict[str, bytes] = {}  # suffix → a song of 1.5 s
TINY = Path()  # a small checkpoint with random weights
RUN = Path()  # folder of a training run of three steps, with states after the last two
TRAIN = ["train", "--preset", "small", "--dim", "16", "--depth", "1", "--songs", "1", "--val-songs", "1"]
TRAIN += ["--seconds-per-song", "1.5", "--segment", "0.5", "--batch", "1", "--validation-windows", "1"]
TRAIN += ["--device", "cpu", "--save-every", "1"]
STEPS = ["--steps", "3"]
MARK = "a-program-ran"  # file that the programs in hostile input make


def prepare(root: Path) -> None:
    """Make the inputs that attacks are made of, and load the modules of every command."""
    global TINY, RUN
    accelerate(load_checkpoint(bundled_checkpoint()))  # builds the kernel, outside the attacks' limits
    time = np.arange(SAMPLES) / RATE
    sound = (0.3 * np.sin(2 * np.pi * 440 * time) * np.sin(5 * time))[:, None].repeat(2, 1).astype("float32")
    for suffix, options in {
        "wav": {"subtype": "PCM_16"}, "rf64": {"format": "RF64", "subtype": "PCM_16"},
        "w64": {"format": "W64", "subtype": "PCM_16"}, "aiff": {"subtype": "PCM_16"}, "caf": {"subtype": "PCM_16"},
        "au": {"subtype": "PCM_16"}, "flac": {}, "ogg": {"format": "OGG", "subtype": "VORBIS"},
        "mp3": {"format": "MP3"},
    }.items():  # fmt: skip
        soundfile.write(root / f"song.{suffix}", sound, RATE, **options)
    for suffix, codec in {"opus": "libopus", "m4a": "aac", "webm": "libopus"}.items():
        _encode(root / f"song.{suffix}", codec, sound)
    for path in root.glob("song.*"):
        SONGS[path.suffix[1:]] = path.read_bytes()
        path.unlink()
    TINY = root / "tiny.pt"
    config = ModelConfig.preset("small", dim=16, depth=1)
    torch.save(BSMamba2(config).state_dict(), TINY)
    RUN = root / "run"
    if not (child := os.fork()):  # in a process of its own, because training starts threads, and attacks are forks
        os._exit(run_command([*TRAIN, *STEPS, "--output-dir", str(RUN)]))
    assert os.waitpid(child, 0)[1] == 0, "the run that is attacked could not be made"


def _encode(path: Path, codec: str, sound: np.ndarray) -> None:
    rate = 48_000 if codec == "libopus" else RATE
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.layout = "stereo"
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(sound.T), format="fltp", layout="stereo")
        frame.rate = rate
        resampler = av.AudioResampler(stream.format, "stereo", rate, frame_size=stream.codec_context.frame_size or 960)
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))


def separate(path: Path, samples: float | None = None, *options: str) -> Attack:
    """Separate a file; when that succeeds, the vocals must be `samples` long (at the file's own rate)."""

    def check(outcome: Outcome) -> str:
        if outcome.code or samples is None:
            return ""
        results = list((outcome.folder / "out").rglob("*.vocals.wav"))
        frames = soundfile.info(results[0]).frames if results else 0
        return "" if frames >= samples else f"{path.name}: {frames} of {samples:.0f} samples came out, without a word"

    arguments = ["separate", str(path), "-o", "out", "--segment", "1", "--overlap", "0", *options]
    return Attack(arguments, [path.name], check)


def resume(output_dir: Path, *names: str) -> Attack:
    """Resume the training run."""
    return Attack([*TRAIN, *STEPS, "--output-dir", str(output_dir)], [*names])


def it_ran(outcome: Outcome) -> str:
    """Whether a program in the input has left its mark in the attack's folder, where the command runs."""
    return "a program in the input ran" if (outcome.folder / MARK).exists() else ""


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def pick(rng: np.random.Generator, options: list[str]) -> str:
    return options[int(rng.integers(len(options)))]


# --- audio files ----------------------------------------------------------------------------------------------


@kind("Song cut short", 24)
def _(rng: np.random.Generator, folder: Path) -> Attack:
    suffix = pick(rng, sorted(SONGS))
    content = SONGS[suffix]
    return separate(write(folder / f"a.{suffix}", content[: int(len(content) * rng.uniform(0.02, 0.99))]), SAMPLES)


@kind("Two songs in one file", 12)
def _(rng: np.random.Generator, folder: Path) -> Attack:
    suffix = pick(rng, ["ogg", "opus", "mp3", "flac"])
    return separate(write(folder / f"a.{suffix}", SONGS[suffix] * 2), 2 * SAMPLES)


@kind("Bytes of a song changed", 20)
def _(rng: np.random.Generator, folder: Path) -> Attack:
    suffix = pick(rng, sorted(SONGS))
    content = bytearray(SONGS[suffix])
    for place in rng.integers(len(content), size=int(rng.integers(1, 20))):
        content[place] = rng.integers(256)
    compressed = suffix in ("mp3", "m4a", "webm")  # their frames may be damaged where no checksum shows it
    return separate(write(folder / f"a.{suffix}", bytes(content)), None if compressed else SAMPLES)


@kind("Header of a song changed", 20)
def _(rng: np.random.Generator, folder: Path) -> Attack:
    suffix = pick(rng, sorted(SONGS))
    content = bytearray(SONGS[suffix])
    content[int(rng.integers(4, 64))] = rng.integers(256)
    return separate(write(folder / f"a.{suffix}", bytes(content)))


@kind("Noise named as a song", 10)
def _(rng: np.random.Generator, folder: Path) -> Attack:
    suffix, start = pick(rng, sorted(SONGS)), int(rng.integers(0, 40))
    noise = rng.integers(256, size=int(10 ** rng.uniform(0, 6)), dtype=np.uint8).tobytes()
    return separate(write(folder / f"a.{suffix}", SONGS[suffix][:start] + noise))


@kind("Headers of MP3 frames without sound", 2)
def _(rng: np.random.Generator, folder: Path) -> Attack:
    return separate(write(folder / "a.mp3", bytes.fromhex("fffb9064") * int(rng.integers(10_000, 1_000_000))))


@kind("Up to 255 channels", 1)
def _(rng: np.random.Generator, folder: Path) -> Attack:
    channels = int(rng.integers(9, 256))
    soundfile.write(folder / "a.wav", np.zeros((50, channels)), RATE, subtype="PCM_16")
    attack = separate(folder / "a.wav", 50)
    attack.seconds = 40  # up to 128 passes of the model
    return attack


@kind("Song that is not a regular file", 6)
def _(rng: np.random.Generator, folder: Path) -> Attack:
    path = folder / "a.wav"
    which = int(rng.integers(3))
    if which == 0:
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero" if which == 1 else path)
    return separate(path)


@kind("Song with an unusual name", 12)
def _(rng: np.random.Generator, folder: Path) -> Attack:
    names = ["..wav", ".wav", "a\nb.wav", "\x1b[31m.wav", "-o.wav", "a" * 240 + ".wav", "\udcff\udcfe.wav", "~.wav"]
    name = pick(rng, names)
    path = write(folder / name, SONGS["wav"])

    def check(outcome: Outcome) -> str:
        others = {path.name for path in folder.iterdir()} - {name, "out"}
        return f"written to {others}" if others else ""

    attack = separate(path, SAMPLES)
    return Attack(attack.arguments, [name, ascii(name)[1:-1], name[:20].encode("unicode_escape").decode()], check)


# --- checkpoints ----------------------------------------------------------------------------------------------


def load(path: Path) -> Attack:
    """Separate a song with a hostile checkpoint."""
    song = write(path.parent / "song.wav", SONGS["wav"])
    attack = separate(song, None, "--checkpoint", str(path))
    attack.names = [path.name]
    return attack


def safetensors(header: dict[str, object], data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@kind("Small checkpoint of an absurd size", 10)
def _(rng: np.random.Generator, folder: Path) -> Attack:
    number = int(10 ** rng.uniform(3, 12))
    tensor = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    which = int(rng.integers(4))
    if which == 0:
        name = pick(rng, [f"masks.{number}.0.weight", f"mask_estim.{number}.0.weight", f"layers.{number}.0.weight"])
        return load(write(folder / "a.ckpt", safetensors({name: tensor}, bytes(4))))
    if which == 1:
        config = json.loads(ModelConfig.preset("small").to_json()) | {
            pick(rng, ["dim", "depth", "d_state", "expand", "mask_expand", "channels", "sample_rate"]): number
        }
        entries = {"bsmamba2.format": "2", "bsmamba2.config": json.dumps(config)}
        return load(write(folder / "a.ckpt", safetensors({"__metadata__": entries, "a": tensor}, bytes(4))))
    if which == 2:
        state = torch.load(TINY)
        torch.save({name: torch.zeros(1).expand([number % 100_000, 1000]) for name in state}, folder / "a.ckpt")
        return load(folder / "a.ckpt")
    torch.save({"state_dict": {}}, folder / "whole.ckpt")
    with zipfile.ZipFile(folder / "whole.ckpt") as whole, zipfile.ZipFile(folder / "a.ckpt", "w", 8) as bomb:
        for name in whole.namelist():
            bomb.writestr(name, b"N" * (400 << 20) if name.endswith("data.pkl") else whole.read(name))
    return load(folder / "a.ckpt")


@kind("Nested pickle", 8)
def _(rng: np.random.Generator, folder: Path) -> Attack:
    which = int(rng.integers(3))
    if which == 0:  # every list holds the one before it many times
        code = b"\x80\x02]q\x00" + b"".join(
            b"]q" + bytes([n]) + b"(" + b"h" + bytes([n - 1]) + (b"h" + bytes([n - 1])) * 9 + b"e" for n in range(1, 60)
        ) + b"."  # fmt: skip
    elif which == 1:
        code = b"\x80\x02" + b")" + b"\x85" * int(10 ** rng.uniform(3, 6)) + b"."
    else:
        code = b"\x80\x02" + b"(" * int(10 ** rng.uniform(3, 6)) + b"."
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a/data.pkl", code)
        archive.writestr("a/version", "3\n")
        archive.writestr("a/byteorder", "little")
    return load(write(folder / "a.ckpt", buffer.getvalue() if rng.random() < 0.7 else code))


class _Call:
    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


def hostile_pickle(rng: np.random.Generator) -> object:
    calls = [
        _Call(os.system, f"touch {MARK}"),
        _Call(eval, f"open('{MARK}', 'w')"),
        _Call(exec, f"import os; os.mkdir('{MARK}')"),
    ]
    return calls[int(rng.integers(len(calls)))]


@kind("Checkpoint that runs a program", 8)
def _(rng: np.random.Generator, folder: Path) -> Attack:
    state = torch.load(TINY)
    place = pick(rng, ["beside", "within", "instead"])
    call = hostile_pickle(rng)
    content = {"beside": {"state_dict": state, "x": call}, "within": state | {"x": call}, "instead": call}[place]
    torch.save(content, folder / "a.ckpt", _use_new_zipfile_serialization=bool(rng.integers(2)))
    attack = load(folder / "a.ckpt")
    attack.check = it_ran
    return attack


@kind("Bit of a checkpoint flipped", 8)
def _(rng: np.random.Generator, folder: Path) -> Attack:
    ours = rng.random() < 0.5  # an archive of torch has bytes that mean nothing
    content = bytearray((BUNDLED_CHECKPOINT if ours else TINY).read_bytes())
    content[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
    attack = load(write(folder / "a.ckpt", bytes(content)))
    attack.check = lambda outcome: "the flipped bit was not noticed" if ours and not outcome.code else ""
    return attack


@kind("Checkpoint cut short, or noise", 8)
def _(rng: np.random.Generator, folder: Path) -> Attack:
    content = BUNDLED_CHECKPOINT.read_bytes() if rng.random() < 0.5 else TINY.read_bytes()
    keep = int(len(content) * rng.uniform(0, 0.99))
    noise = rng.integers(256, size=100, dtype=np.uint8).tobytes() if rng.random() < 0.3 else b""
    return load(write(folder / "a.ckpt", content[:keep] + noise))


# --- training -------------------------------------------------------------------------------------------------


@kind("Hostile parameter file", 12)
def _(rng: np.random.Generator, folder: Path) -> Attack:
    bombs = "a0: &a0 [1, 1]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
    texts = [
        bombs, bombs + "steps: *a39\n", "steps: " + "[" * 5000, "steps: 1" + "0" * 400, "steps: .nan", "lr: -.inf",
        "? [a, b]\n: 1", "steps: !!python/object/apply:os.system ['touch " + MARK + "']", "- 1", "\x00", "steps: {}",
        "stems: []", f"'import os; os.system(\"touch {MARK}\")': 1", "output_dir: /dev/null/x", "data: /dev/zero",
        "init: /dev/zero",
    ]  # fmt: skip
    path = write(folder / "params.yaml", pick(rng, texts).encode())
    names = [path.name, "steps", "lr", "stems", "import os", "/dev/null", "/dev/zero", "a0"]
    arguments = [*TRAIN, "--params", str(path), "--output-dir", "new"]
    return Attack(arguments, names, it_ran)


def attacked_run(folder: Path) -> tuple[Path, Path]:
    """A copy of the run, and its newest state."""
    shutil.copytree(RUN, folder / "run")
    return folder / "run", max((folder / "run").glob("state-*.pt"))


def ends_as_before(outcome: Outcome) -> str:
    """Whether a run that ended has the weights of the run that nobody attacked, bit for bit."""
    same = (
        outcome.code
        or (outcome.folder / "run/last.safetensors").read_bytes() == (RUN / "last.safetensors").read_bytes()
    )
    return "" if same else "the resumed run ended with other weights"


@kind("Bit of a training state flipped", 8)
def _(rng: np.random.Generator, folder: Path) -> Attack:
    run, state = attacked_run(folder)
    if rng.random() < 0.7:  # the one before: the last step is done again
        state.unlink()
        (run / "last.safetensors").unlink()
        state = run / "state-00000002.pt"
    content = bytearray(state.read_bytes())
    content[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
    attack = resume(run, write(state, bytes(content)).name)
    attack.check = ends_as_before
    return attack


@kind("Training state that is something else", 6)
def _(rng: np.random.Generator, folder: Path) -> Attack:
    run, state = attacked_run(folder)
    contents = [None, 1, "x", [], {}, {"step": "x"}, {"model": {}}, torch.zeros(3), {"trainer": {"step": -1}}]
    content = hostile_pickle(rng) if rng.random() < 0.3 else contents[int(rng.integers(len(contents)))]
    if rng.random() < 0.3:
        write(state, pickle.dumps(content))
    else:
        torch.save(content, state)
    attack = resume(run, state.name)
    attack.check = it_ran
    return attack


@kind("Link, pipe or device in a run's folder", 8)
def _(rng: np.random.Generator, folder: Path) -> Attack:
    run, state = attacked_run(folder)
    precious = write(folder / "precious", b"precious")
    path = pick(rng, ["lock", "best.safetensors", "last.safetensors", "steps.jsonl", state.name])
    (run / path).unlink(missing_ok=True)
    which = int(rng.integers(4))
    if which == 0:
        os.mkfifo(run / path)
    elif which == 1:
        (run / path).mkdir()
    else:
        (run / path).symlink_to("/dev/zero" if which == 2 else precious)
    attack = resume(run, path, "run")
    attack.check = lambda _: "" if precious.read_bytes() == b"precious" else "the target of a link was changed"
    return attack


@kind("Hostile stems in a training folder", 6)
def _(rng: np.random.Generator, folder: Path) -> Attack:
    for song in range(3):
        for stem in ("vocals", "drums", "bass", "other"):
            path = folder / "data" / f"song {song}" / f"{stem}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path, SONGS["wav"])
    bad = folder / "data" / "song 1" / "drums.wav"
    bad.unlink()
    which = int(rng.integers(4))
    if which == 0:
        os.mkfifo(bad)
    elif which == 1:
        write(bad, SONGS["flac"][:18] + bytes(8) + SONGS["flac"][26:])
    elif which == 2:
        write(bad, SONGS[pick(rng, sorted(SONGS))][: int(rng.integers(100, 5000))])
    else:
        bad.symlink_to("/dev/zero")
    bad_file = ["--on-bad-file", pick(rng, ["stop", "skip"])]
    arguments = [*TRAIN, *STEPS, "--data", str(folder / "data"), *bad_file, "--output-dir", str(folder / "new")]
    return Attack(arguments, ["drums.wav"], setup=lambda: os.environ.update(XDG_CACHE_HOME=str(folder / "cache")))


# --- evaluation -----------------------------------------------------------------------------------------------


@kind("Damaged evaluation results", 3)
def _(rng: np.random.Generator, folder: Path) -> Attack:
    arguments = ["evaluate", "--checkpoint", str(TINY), "--songs", "1", "--seconds", "1.5", "--segments", ""]
    arguments += ["-o", "scores"]
    if not (child := os.fork()):
        os.chdir(folder)
        for number in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
        os._exit(run_command(arguments))
    os.waitpid(child, 0)
    rows = sorted(path for path in (folder / "scores").rglob("*.json") if path.is_file())
    if rows:
        row = rows[int(rng.integers(len(rows)))]
        content = row.read_bytes()
        contents = [b"", b"{}", b"[]", b"[" * 100_000, b"null", b'{"usdr": 1e999}', content[:-5], b"\xff" + content,
                    content.replace(b": ", b': "x", "y": ', 1)]  # fmt: skip
        write(row, contents[int(rng.integers(len(contents)))])
        if rng.random() < 0.2:
            row.unlink()
            os.mkfifo(row)
    return Attack(arguments, ["scores"])
