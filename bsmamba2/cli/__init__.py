"""Command line: the console script `bsmamba2`, also run as `python -m bsmamba2`.

One file per command (`separate`, `evaluate`, `train`, `cost`, `backends`), each with `add_arguments(parser)` and
`run(args)`, which returns the exit code: 0 for success, 1 when some of the work failed (the rest was done), 2 for wrong
arguments. Shared: `model_arguments` (which model, and how it computes) and `console` (messages, progress, errors).
Begin with `main`.
"""
