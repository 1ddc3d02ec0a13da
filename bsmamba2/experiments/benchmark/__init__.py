"""Benchmark of the model's parts: time and memory of every backend and of baselines, and the machine's peak.

settings → groups of cases → a trial of each in its own process → rounds → measurements → tables

Begin with `settings.Settings` and `measuring.run`; `candidates` makes the jobs, and `tables` reads the results
and arranges them in tables. transformers and BS-RoFormer take part if they are installed.
"""
