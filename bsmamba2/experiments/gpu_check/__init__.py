"""GPU check: the book's claims about GPUs, tested on one GPU in at most eight minutes.

    python -m bsmamba2.experiments.gpu_check                        on the GPU
    python -m bsmamba2.experiments.gpu_check --device cpu --tiny    tests the check itself, at toy size

environment → self-tests → kernels' tests → parts of the model → training step → loading → separation → training

`parts` measures, `runner` runs one part after the other. Each is skipped with a reason where something is missing, and
cut short at the end of its time; the results are written after each. Needs PyTorch, NumPy and safetensors; mamba-ssm
and Triton for the fused kernels, pytest and hypothesis for their tests, soundfile, av and soxr for loading and
training. No network. **Not run on a GPU yet.**
"""
