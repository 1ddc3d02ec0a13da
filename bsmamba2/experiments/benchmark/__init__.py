"""Benchmark of the model's parts: time and memory of every backend, of baselines, and of the machine's own peak.

settings → groups of cases → a trial of each in its own process → rounds → measurements → tables

Begin with `settings.Settings` and `measuring.run`; `candidates` makes the jobs, `tables` reads the results back and
arranges them. transformers and BS-RoFormer take part if they are installed.
"""
