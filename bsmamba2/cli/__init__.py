"""Command line: the console script `bsmamba2`, also run as `python -m bsmamba2`.

One file per command (`separate`, `evaluate`, `train`, `cost`, `backends`), each with `add_arguments(parser)` and
`run(args)`, which returns the exit code: 0 for success, 1 when some of the work failed or its output was lost, 2 for
wrong arguments. Shared: `model_arguments` (checkpoint, device, backend) and `console` (messages, progress, errors).
Start with `main`.
"""
