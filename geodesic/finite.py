"""One check for every number of every config: NaN and infinity are refused."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields
from numbers import Real
from typing import Any


def check_finite(config: Any, error: type[ValueError] = ValueError) -> None:
    """Raises `error` where a field of the dataclass `config` holds NaN or infinity.

    Lists, tuples and dicts are searched to any depth. Comparisons let NaN through (`nan < 1` is
    false), so range checks alone do not refuse it. No field has a meaning for infinity: what has no
    bound is None.
    """
    for setting in fields(config):
        for place, value in _numbers(getattr(config, setting.name), setting.name):
            if not isinstance(value, int) and not math.isfinite(value):  # an int may be too large
                raise error(
                    f"{place}={value} of {type(config).__name__} must be finite; use a number, or "
                    "drop it for the default"
                )


def _numbers(value: Any, place: str) -> Iterator[tuple[str, Real]]:
    """Each number in `value`, and where it is, as `search.lr[0]`."""
    if isinstance(value, Real):
        yield place, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _numbers(item, f"{place}.{key}")
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _numbers(item, f"{place}[{i}]")
