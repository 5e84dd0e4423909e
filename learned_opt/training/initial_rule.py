"""Makes the rule that meta-training begins with."""

from __future__ import annotations

import hashlib

import torch

from geodesic.files import user_path
from learned_opt.config import TrainConfig
from learned_opt.errors import ConfigError
from learned_opt.rules import UpdateRule, make_rule
from learned_opt.rules.base import trainable
from learned_opt.weights import DEFAULT, load_rule

SHIPPED = "shipped"


def start(config: TrainConfig) -> UpdateRule:
    """Returns the rule of the config.

    It is initialized by the seed, then the weights of `start_from` are loaded, and the
    meta-parameters of `frozen` do not require gradients.

    Raises:
        ConfigError: the rule cannot be made, the weights are of another rule or config, a prefix in
            `frozen` matches no meta-parameter, or all meta-parameters are frozen.
        WeightsError: `start_from` cannot be read.
    """
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        rule = make_rule(config.rule, **config.rule_config)
    if config.start_from is not None:
        loaded = load_rule(None if config.start_from == SHIPPED else config.start_from)
        part = part_like(rule, loaded, f"start_from={config.start_from!r}")
        part.load_state_dict(loaded.state_dict())
    names = [name for name, _ in rule.named_parameters()]
    for beginning in config.frozen:
        if not any(name.startswith(beginning) for name in names):
            raise ConfigError(
                f"frozen has {beginning!r}, with which no meta-parameter begins; use prefixes of "
                f"{names}"
            )
    for name, p in rule.named_parameters():
        p.requires_grad_(not name.startswith(config.frozen))
    if not trainable(rule):
        raise ConfigError(f"frozen={config.frozen} leaves nothing to train; freeze less")
    return rule


def part_like(rule: UpdateRule, other: UpdateRule, said: str) -> UpdateRule:
    """Returns the part of `rule` that the weights of `other` fit: the rule itself, or its base.

    Raises:
        ConfigError: they fit neither. The message begins with `said`.
    """
    worn = getattr(rule, "base", rule)
    part = worn if other.name == worn.name else rule
    if (part.name, part.config) != (other.name, other.config):
        raise ConfigError(
            f"{said} is {other.name} with {other.config}, not {part.name} with {part.config}; "
            "set rule and rule_config to match it"
        )
    return part


def origin(start_from: str | None) -> str | None:
    """Returns a checksum of the weights of `start_from`, which does not depend on their folder."""
    if start_from is None:
        return None
    path = DEFAULT if start_from == SHIPPED else user_path(start_from, "start_from", ConfigError)
    return "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
