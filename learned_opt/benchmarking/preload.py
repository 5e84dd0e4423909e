"""What every worker process needs: imported once, by the process that they are forks of."""

import torch._dynamo  # noqa: F401  the first optimizer imports it, which takes a second

import learned_opt.benchmarking.cells
import learned_opt.tasks  # noqa: F401
