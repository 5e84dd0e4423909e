"""Where tensors are made, whatever `torch.set_default_device` says."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


def makes_tensors_on_cpu(function: Callable) -> Callable:
    """``function``, with the CPU as torch's default device if all tensors it is given are there.

    It then makes its own tensors beside them, and so does a ``loss_fn`` that names no device.
    """

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        given = [value for value in (*args, *kwargs.values()) if torch.is_tensor(value)]
        elsewhere = any(tensor.device.type != "cpu" for tensor in given)
        # The context costs time at every operation, so only where it is needed.
        if elsewhere or torch.get_default_device().type == "cpu":
            return function(*args, **kwargs)
        with torch.device("cpu"):
            return function(*args, **kwargs)

    return run
