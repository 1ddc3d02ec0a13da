"""Training runs: data sets, workers and processes, the run folder; optional: augmentation, Muon.

Begin with `job.JobConfig`, every parameter of a run: `start` gives a `RunDir`, whose `steps` train. The loop itself is
`bsmamba2.train`. `datasets` and `loader` read songs, `ddp` and `distributed` join the processes of `torchrun`,
`augmentation` and `muon` depart from the published recipe and are off by default.
It needs `bsmamba2.kernels`, `bsmamba2.audio` and `bsmamba2.synth`; PyYAML and tensorboard only where asked for.
"""

from ..settings import read_parameters
from .job import JobConfig
from .run_dir import RunDir, RunError

__all__ = ["JobConfig", "RunDir", "RunError", "read_parameters"]
