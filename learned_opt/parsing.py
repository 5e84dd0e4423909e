"""Makes configs from plain values, which are YAML, flags or dicts of settings."""

from __future__ import annotations

from typing import Any, TypeVar

from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

C = TypeVar("C")


def make_parser(config_class: type) -> ArgumentParser:
    """Returns a parser of the settings of a config, which raises ArgumentError."""
    # A `class_path` in `rule_config` or `kwargs` is data: a config must not run what it names.
    set_parsing_settings(instantiate_subclass_spec_in_any=False)
    parser = ArgumentParser(exit_on_error=False, add_help=False)
    parser.add_class_arguments(config_class, as_group=False)
    return parser


def config_from(config_class: type[C], values: dict[str, Any]) -> C:
    """Returns the config of a dict of settings.

    Raises:
        ValueError: a setting is unknown, of a wrong type or invalid.
    """
    parser = make_parser(config_class)
    try:
        return config_class(**vars(parser.instantiate(parser.parse_object(values))))
    except ArgumentError as error:
        raise ValueError(str(error)) from error
