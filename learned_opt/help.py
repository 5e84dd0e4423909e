"""The `--help` of a command, with the settings of its config from the dataclasses' docstrings."""

from __future__ import annotations

import inspect
import json
import textwrap
import types
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from docstring_parser import parse

WIDTH = 88
NAMES = {int: "whole number", float: "number", str: "text", bool: "true or false", Any: "any"}


class Option(NamedTuple):
    """A flag, the name of its value, and its description."""

    flag: str
    value: str
    text: str


def command_help(
    usage: str, description: str, options: Sequence[Option], config_class: type
) -> str:
    """Returns the text that `--help` prints.

    Args:
        usage: the command line in short.
        description: what the command does.
        options: the flags that are not settings of the config.
        config_class: the dataclass of the config.
    """
    parts = [f"usage: {usage}", textwrap.fill(description, WIDTH), _listed(options)]
    parts.append("Settings. Each can be a flag, or a key of the file that --config names:")
    parts.append(_listed(list(_options(config_class))))
    for name, part, several in _parts(config_class):
        summary = parse(inspect.getdoc(part) or "").short_description or ""
        where = f"Keys of each entry of {name}, in the file" if several else f"Settings of {name}"
        prefix = "" if several else f"--{name}."
        parts += [textwrap.fill(f"{where}: {summary}", WIDTH), _listed([*_options(part, prefix)])]
    return "\n\n".join(parts)


def _listed(options: Sequence[Option]) -> str:
    blocks = []
    for flag, value, text in options:
        filled = textwrap.fill(text, WIDTH - 6)
        blocks.append(f"  {flag} {value}".rstrip() + "\n" + textwrap.indent(filled, " " * 6))
    return "\n".join(blocks)


def _options(config_class: type, prefix: str = "--") -> Iterator[Option]:
    """Yields the settings of a dataclass, except those that are dataclasses themselves."""
    hints, texts = get_type_hints(config_class), _texts(config_class)
    for field in fields(config_class):
        hint = hints[field.name]
        if is_dataclass(hint):
            continue
        default = _default(field)
        text = texts.get(field.name, "").rstrip(".") or field.name.replace("_", " ")
        if default not in (MISSING, None, "", (), [], {}):
            text = f"{text} (default: {_readable(default)})"
        yield Option(f"{prefix}{field.name}", f"<{_kind(hint)}>", text)


def _parts(config_class: type) -> Iterator[tuple[str, type, bool]]:
    """Yields each dataclass within a dataclass once, as (dotted name, class, whether in a list).

    Settings of dataclasses in a list have no flags.
    """
    seen: set[type] = set()

    def walk(cls: type, prefix: str, listed: bool) -> Iterator[tuple[str, type, bool]]:
        for name, hint in get_type_hints(cls).items():
            for part in _dataclasses(hint):
                if part not in seen:
                    seen.add(part)
                    several = listed or get_origin(hint) is list
                    yield f"{prefix}{name}", part, several
                    yield from walk(part, f"{prefix}{name}.", several)

    yield from walk(config_class, "", False)


def _dataclasses(hint: Any) -> list[type]:
    if is_dataclass(hint):
        return [hint]  # type: ignore[list-item]
    return [part for inner in get_args(hint) for part in _dataclasses(inner)]


def _texts(config_class: type) -> dict[str, str]:
    """Returns the description of each attribute in the docstring of a dataclass."""
    texts = {}
    for parameter in parse(inspect.getdoc(config_class) or "").params:
        for name in parameter.arg_name.split(", "):
            texts[name] = " ".join((parameter.description or "").split())
    return texts


def _default(field: Field) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _kind(hint: Any) -> str:
    """Returns a type in words."""
    if hint in NAMES:
        return NAMES[hint]
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return ", ".join(map(_readable, inner[:-1])) + f" or {_readable(inner[-1])}"
    if origin in (Union, types.UnionType):
        names = ["none" if part is types.NoneType else _kind(part) for part in inner]
        return " or ".join(dict.fromkeys(names))
    if origin in (tuple, list):
        if origin is list or inner[-1] is ...:
            kind = _kind(inner[0])
            return f"list of {kind}{'s' if kind in NAMES.values() else ''}"
        return f"[{', '.join(map(_kind, inner))}]"
    return "settings by name"  # a dict or a dataclass


def _readable(value: Any) -> str:
    """Returns a value as YAML writes it, or the name of a dataclass."""
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_readable, value))}]"
    if is_dataclass(value):
        name = getattr(value, "label", "") or getattr(value, "name", "")
        return name or "as its own defaults"
    if value is None:
        return "none"
    if isinstance(value, str):
        return value or '""'
    return json.dumps(value)
