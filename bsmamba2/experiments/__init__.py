"""Experiments on the model: grids of runs, other sequence layers, the cost of training, and benchmarks.

`sweep` runs a notebook once for every point of a grid; `sequence_layers` replaces the Mamba-2 mixer, and `silence`
compares such models; `dynamics` changes Δ in a trained model; `cost` counts operations and memory of training;
`benchmark` measures time and memory, and `gpu_check` tests claims about GPUs. All but `gpu_check` run on a CPU; a sweep
needs papermill (and distributed for a cluster). Run these experiments with the notebooks `sweep`, `silence` and
`benchmark`. Begin with `sweep.expand_grid` or `cost.training_cost`.
"""
