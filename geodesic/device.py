"""Keeps new tensors on the CPU, whatever `torch.set_default_device` says."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


def makes_tensors_on_cpu(function: Callable) -> Callable:
    """Wraps ``function`` so that new tensors go to the CPU if all its tensor arguments are there.

    This covers the tensors that ``function`` makes itself and those of a ``loss_fn`` that names no
    device.
    """

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        given = [value for value in (*args, *kwargs.values()) if torch.is_tensor(value)]
        elsewhere = any(tensor.device.type != "cpu" for tensor in given)
        # The context slows down every operation, so it is entered only when it is needed.
        if elsewhere or torch.get_default_device().type == "cpu":
            return function(*args, **kwargs)
        with torch.device("cpu"):
            return function(*args, **kwargs)

    return run
