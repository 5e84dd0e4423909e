"""Refuses NaN and infinity in any number of any config."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields
from numbers import Real
from typing import Any


def check_finite(config: Any, error: type[ValueError] = ValueError) -> None:
    """Raises `error` if a field of the dataclass `config` contains NaN or infinity.

    Lists, tuples and dicts are searched to any depth. Range checks alone do not catch NaN, because
    `nan < 1` is false. No field has a meaning for infinity; a missing bound is written as None.
    """
    for setting in fields(config):
        for place, value in _numbers(getattr(config, setting.name), setting.name):
            if not isinstance(value, int) and not math.isfinite(value):  # an int may be too large
                raise error(
                    f"{place}={value} of {type(config).__name__} must be finite; use a number, or "
                    "leave it out to get the default"
                )


def _numbers(value: Any, place: str) -> Iterator[tuple[str, Real]]:
    """Yields each number in `value` with its place, such as `search.lr[0]`."""
    if isinstance(value, Real):
        yield place, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _numbers(item, f"{place}.{key}")
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _numbers(item, f"{place}[{i}]")
