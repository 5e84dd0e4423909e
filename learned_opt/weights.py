"""Weights files: safetensors, with the rule's name and config in the metadata. No pickle."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from learned_opt.errors import ConfigError, WeightsError
from learned_opt.rules import UpdateRule, make_rule

FORMAT, VERSION = "learned-opt", 1
DEFAULT = Path(__file__).parent / "weights" / "default.safetensors"


def digest(rule: str, config: dict, tensors: dict[str, Tensor]) -> str:
    """Checksum of all that a rule is made of."""
    sha = hashlib.sha256(json.dumps([rule, config], sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.numpy().tobytes())
    return sha.hexdigest()


def save_rule(rule: UpdateRule, path: str | Path, facts: dict | None = None) -> None:
    """Writes a rule's meta-parameters.

    Args:
        facts: JSON facts to keep with them, such as how they were trained.
    """
    tensors = {k: v.detach().cpu().clone() for k, v in rule.state_dict().items()}
    header = {
        "version": VERSION,
        "rule": rule.name,
        "config": rule.config,
        "sha256": digest(rule.name, rule.config, tensors),
        "facts": facts or {},
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(save(tensors, {FORMAT: json.dumps(header, sort_keys=True)}))
    temporary.replace(path)


def load_rule(path: str | Path | None = None, revision: str | None = None) -> UpdateRule:
    """The rule in a weights file, by default the shipped one.

    Raises:
        WeightsError: the file is missing, truncated, altered, not one of ours, from a newer
            version, or of a rule that is not registered or does not fit.
    """
    path = DEFAULT if path is None else Path(path)
    if not path.is_file():
        raise WeightsError(f"weights={str(path)!r} is not a file; give the path of a "
                           ".safetensors file that `learned-opt train` wrote")  # fmt: skip
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"weights={str(path)!r} cannot be read ({error}): it is truncated or "
                           "no safetensors file; copy it anew") from None  # fmt: skip
    if FORMAT not in metadata:
        raise WeightsError(f"weights={str(path)!r} was not written by learned-opt: its metadata "
                           f"lacks {FORMAT!r}")  # fmt: skip
    try:
        header = json.loads(metadata[FORMAT])
        version = int(header["version"])
    except (LookupError, TypeError, ValueError) as error:
        raise WeightsError(f"weights={str(path)!r} has a damaged header ({error!r}); "
                           "copy it anew") from None  # fmt: skip
    if version > VERSION:
        raise WeightsError(f"weights={str(path)!r} has format version {version}, this "
                           f"package reads up to {VERSION}; upgrade learned-opt")  # fmt: skip
    rule_name, config = header.get("rule"), header.get("config")
    try:
        intact = digest(rule_name, config, tensors) == header.get("sha256")
    except TypeError:  # a dtype that save_rule does not write
        intact = False
    if not intact:
        raise WeightsError(f"weights={str(path)!r} was altered: its checksum does not match; "
                           "copy it anew")  # fmt: skip
    try:
        with torch.random.fork_rng(devices=[]):
            rule = make_rule(rule_name, **config)
        rule.load_state_dict(tensors)
    except (ConfigError, LookupError, TypeError, ArithmeticError, RuntimeError) as error:
        raise WeightsError(f"weights={str(path)!r} do not fit: {error!r}") from None
    return rule.requires_grad_(False)
