"""The errors that this package raises on purpose; any other error that escapes is a bug."""

from collections.abc import Iterable
from difflib import get_close_matches


class LearnedOptError(Exception):
    """The base of the errors below, so that one `except` catches them all."""


class ConfigError(LearnedOptError, ValueError):
    """A setting is unknown, of the wrong type, out of range, or at odds with another."""


class DataError(LearnedOptError, ValueError):
    """A data set is missing, damaged, or not in the layout that its loader reads."""


class WeightsError(LearnedOptError, ValueError):
    """A weights file is missing, damaged, or does not fit the rule it is loaded into."""


class OutputError(LearnedOptError, RuntimeError):
    """An output folder is in use, belongs to another config, or cannot be written."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns a suggestion for the end of a message about `name`, or "" if nothing is similar."""
    close = get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
