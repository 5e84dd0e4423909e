"""The processes of a job that was launched with several."""

import os


def process_rank() -> tuple[int, int]:
    """Returns this process's rank and the number of processes, as set by torchrun or SLURM.

    Without either it returns (0, 1).
    """
    for rank, size in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
        if rank in os.environ and size in os.environ:
            return int(os.environ[rank]), int(os.environ[size])
    return 0, 1
