"""Synthesised songs in shared memory: the processes of one machine share the work and the memory.

Book: "Scaling up".
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..synth import Song, synthesise_songs
from .distributed import all_gather_object, local_rank_and_size, rank

_WRITE_CHUNK = 16
"""Songs that a process holds while it writes them to files; a heap may keep for good what it once had."""


def shared_songs(count: int, **options: Any) -> list[Song]:
    """`synthesise_songs(count, **options)`, made once per machine and mapped by all of its processes.

    Each makes its part and writes it to temporary files; all map all files, whose pages the machine keeps once.
    On Windows, where a mapped file cannot be removed, each process makes all of them.

    Raises:
        OSError: when the files cannot be written, a full disk for one; TMPDIR names their folder.
    """
    local, processes = local_rank_and_size()
    if os.name == "nt" or max(all_gather_object(processes)) == 1:
        return synthesise_songs(count, **options)
    first = rank() - local  # of this machine's
    folder = Path(all_gather_object(tempfile.mkdtemp(prefix="bsmamba2-") if local == 0 else "")[first])
    songs: dict[int, Song] = {}  # by number, without their stems
    try:
        for start in range(local, count, _WRITE_CHUNK * processes):
            stop = min(count, start + _WRITE_CHUNK * processes)
            made = synthesise_songs(stop, first=start, every=processes, **options)
            for number, song in zip(range(start, stop, processes), made, strict=True):
                np.save(folder / f"{number}.npy", song.stems.numpy())
                songs[number] = dataclasses.replace(song, stems=torch.empty(0))
        for part in all_gather_object(songs)[first : first + processes]:
            songs |= part
        stems = [torch.from_numpy(np.load(folder / f"{number}.npy", mmap_mode="c")) for number in range(count)]
        all_gather_object(None)  # all have mapped them
    except OSError as error:
        error.add_note(f"while songs were written to {folder}; TMPDIR names another place")
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # a network's file system may keep what is mapped a while longer
    return [dataclasses.replace(songs[number], stems=stems[number]) for number in range(count)]
