"""The benchmark, which compares optimizers that are tuned on some seeds and reported on others.

`suite` runs a suite by the protocol that its config names: "training", or those of `validation` and
`going_on`. A protocol makes `cells`, one for each run. The `runner` gives them to `workers` and
keeps their records in `stores`. From the records come the tables and scores (`tables`, `scores`,
`stats`, `summary`) and the reports (`report`, `validation_report`, `going_on_report`).
"""

from learned_opt.benchmarking.config import BenchmarkConfig, BenchmarkTask
from learned_opt.benchmarking.entrants import NAMED, Entrant
from learned_opt.benchmarking.report import summary_table
from learned_opt.benchmarking.suite import benchmark

__all__ = ["NAMED", "BenchmarkConfig", "BenchmarkTask", "Entrant", "benchmark", "summary_table"]
