"""Networks as people train them, for benchmarks: with an evaluation mode and three splits of data.

Their modules keep state and draw random numbers, so that no family can batch them over tasks and no
meta-training uses them.
"""

from learned_opt.tasks.workloads import (  # noqa: F401
    continued,
    graph,
    images,
    language,
    patches,
    tabular,
    unusual,
)
