"""Training runs: data sets, worker processes, distributed training, the run folder; optional augmentation and Muon.

Begin with `job.JobConfig`, which has every parameter of a run. Its `start` method returns a `RunDir`, whose `steps`
method trains the model; the loop itself is in `bsmamba2.train`. `datasets` and `loader` read songs, and `ddp` and
`distributed` connect the processes of `torchrun`. `augmentation` and `muon` depart from the published recipe and are
off by default. The package needs `bsmamba2.kernels`, `bsmamba2.audio` and `bsmamba2.synth`; it needs PyYAML and
tensorboard only on request.
"""

from ..settings import read_parameters
from .job import JobConfig
from .run_dir import RunDir, RunError

__all__ = ["JobConfig", "RunDir", "RunError", "read_parameters"]
