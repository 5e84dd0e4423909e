"""Ordinary training jobs for benchmarks, with an evaluation mode and three splits of data.

Their modules have state and draw random numbers. A family therefore cannot batch them over tasks,
and meta-training does not use them.
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
