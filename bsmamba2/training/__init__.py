"""Training runs: data sets, workers and processes, the run folder; optional: augmentation, Muon.

Begin with `job.JobConfig`, which has every parameter of a run. Its `start` returns a `RunDir`, whose `steps` train the
model; the loop itself is in `bsmamba2.train`. `datasets` and `loader` read songs, `ddp` and `distributed` connect the
processes of `torchrun`, and `augmentation` and `muon` depart from the published recipe and are off by default.
The package needs `bsmamba2.kernels`, `bsmamba2.audio` and `bsmamba2.synth`; PyYAML and tensorboard only on request.
"""

from ..settings import read_parameters
from .job import JobConfig
from .run_dir import RunDir, RunError

__all__ = ["JobConfig", "RunDir", "RunError", "read_parameters"]
