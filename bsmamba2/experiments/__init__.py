"""Experiments on the model: grids of runs, other sequence layers, the cost of training, and benchmarks.

`sweep` runs a notebook once for every point of a grid. `sequence_layers` replaces the Mamba-2 mixer, and `silence`
compares the resulting models. `dynamics` changes Δ in a trained model. `cost` counts operations and memory in
training, `benchmark` measures time and memory, and `gpu_check` tests claims about GPUs. All of them run on a
CPU, `gpu_check` only at toy size (`--device cpu --tiny`). A sweep needs papermill (and distributed for a cluster).
The notebooks `sweep`, `silence` and `benchmark` run these experiments. Begin with `sweep.expand_grid` or
`cost.training_cost`.
"""
