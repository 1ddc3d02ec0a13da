"""Experiments on the model: grids of runs, other sequence layers, the cost of training, and benchmarks.

`sweep` runs a notebook once for every point of a grid; `sequence_layers` replaces the Mamba-2 mixer, and `silence`
compares such models; `cost` counts operations and memory of training; `benchmark` measures time and memory, and
`gpu_check` what concerns a GPU. The others run on a CPU; a sweep needs papermill (and distributed for a cluster). The
notebooks `sweep`, `silence` and `benchmark` are the way to run them. Begin with `sweep.expand_grid` or
`cost.training_cost`.
"""
