"""Imports what every worker process needs, once, in the process from which they are forked."""

import torch._dynamo  # noqa: F401  the first optimizer imports it, which takes a second

import learned_opt.benchmarking.cells
import learned_opt.tasks  # noqa: F401
