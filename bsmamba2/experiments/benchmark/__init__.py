"""Benchmark of the model's parts: time and memory of every backend, of baselines, and of the machine's own peak.

settings → groups of cases → a trial of each in a process of its own → rounds → measurements → tables

Begin with `settings.Settings` and `measuring.run`; `candidates` makes the jobs, `tables` reads the results back and
arranges them. transformers and BS-RoFormer take part where they are installed.
"""

from .candidates import groups
from .measuring import run
from .settings import BASELINES, DTYPES, FORWARD, Case, Measurement, Settings, Skipped
from .tables import growth_table, load, loading_table, machine, results_table

__all__ = [
    "BASELINES",
    "DTYPES",
    "FORWARD",
    "Case",
    "Measurement",
    "Settings",
    "Skipped",
    "groups",
    "growth_table",
    "load",
    "loading_table",
    "machine",
    "results_table",
    "run",
]
