"""Tasks to learn from and to compare optimizers on. A kind of task is known once it is imported."""

from learned_opt.tasks import (  # noqa: F401
    autoencoder,
    conv,
    diabetes,
    logistic,
    matrix_factorization,
    mlp,
    own,
    quadratic,
    sequence,
    workloads,
)
