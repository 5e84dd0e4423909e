"""Reads and writes weights files: safetensors with the rule's name and config, without pickle."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from geodesic.files import user_path, write_atomic
from learned_opt.errors import ConfigError, WeightsError
from learned_opt.rules import UpdateRule, make_rule

FORMAT, VERSION = "learned-opt", 2  # the checksum of 1 left out the facts
DEFAULT = Path(__file__).parent / "weights" / "default.safetensors"
DEFAULT_SHA256 = "907bf79d6a4431c213a07fd4cbad4ff0e6aedac4180fcea89a4dd8cd2189655a"
# Bytes, hundreds of times what save_rule writes. A damaged size could make a reader allocate a lot.
MAX_HEADER = 1 << 20
HUB, HUB_FILE = "hf://", "weights.safetensors"
# Files of torch.save begin with one of these: they are zip archives, and before 1.6 pickles.
TORCH_SAVE = (b"PK\x03\x04", b"\x80\x02")


def digest(rule: str, config: dict, tensors: dict[str, Tensor], facts: dict | None = None) -> str:
    """Returns a checksum of a rule's name, config and tensors, and of its facts if given."""
    described = [rule, config] if facts is None else [rule, config, facts]
    sha = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.numpy().tobytes())
    return sha.hexdigest()


def save_rule(rule: UpdateRule, path: str | Path, facts: dict | None = None) -> None:
    """Writes a rule's weights to a safetensors file, with its name and config in the metadata.

    Args:
        rule: the rule.
        path: the file to write; missing folders are created.
        facts: JSON facts to store in the metadata, such as how the weights were trained.
    """
    tensors = {k: v.detach().cpu().clone() for k, v in rule.state_dict().items()}
    facts = json.loads(json.dumps(facts or {}))  # as they will be read back, with text as keys
    header = {
        "version": VERSION,
        "rule": rule.name,
        "config": rule.config,
        "sha256": digest(rule.name, rule.config, tensors, facts),
        "facts": facts,
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, save(tensors, {FORMAT: json.dumps(header, sort_keys=True)}))


def load_rule(weights: str | Path | None = None, revision: str | None = None) -> UpdateRule:
    """Returns the rule of a weights file, by default the shipped one, without gradients.

    Args:
        weights: the path of a file; or "hf://owner/name" for weights.safetensors in a repository of
            the Hugging Face Hub; or "hf://owner/name/path" for another file in a repository.
        revision: the full hash of a commit of that repository, so that the weights cannot change.

    Raises:
        WeightsError: the file is missing, truncated, altered, not written by learned-opt, or from a
            newer version. It is also raised if the rule of the file is not registered or does not
            fit the tensors, if the file cannot be downloaded, and if `revision` is missing.
    """
    if isinstance(weights, str) and weights.startswith(HUB):
        path = _download(weights, revision)
    elif revision is not None:
        raise WeightsError(f"revision={revision!r} goes with weights='{HUB}owner/name', "
                           f"not with {weights!r}; leave revision out")  # fmt: skip
    else:
        path = DEFAULT if weights is None else _given(weights)
    if not path.is_file():
        raise WeightsError(f"weights={str(path)!r} is not a file; give the path of a "
                           f".safetensors file that `learned-opt train` wrote, or "
                           f"'{HUB}owner/name'{_command(path)}")  # fmt: skip
    if weights is None and hashlib.sha256(path.read_bytes()).hexdigest() != DEFAULT_SHA256:
        raise WeightsError(f"the shipped weights {str(path)!r} were altered; reinstall "
                           "learned-opt")  # fmt: skip
    try:
        with path.open("rb") as file:
            beginning = file.read(8)
            header_size = int.from_bytes(beginning, "little")
        if beginning.startswith(TORCH_SAVE):
            raise WeightsError(f"weights={str(path)!r} is a checkpoint of torch.save, which could "
                               "run code when it is read; give the .safetensors file that "
                               "`learned-opt train` wrote")  # fmt: skip
        if header_size > MAX_HEADER:
            raise SafetensorError(f"its header would be {header_size} bytes, and the limit is "
                                  f"{MAX_HEADER}")  # fmt: skip
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            # Copies: mapped tensors change with the file, and crash if it is truncated.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"weights={str(path)!r} cannot be read ({error}): it is truncated or "
                           "not a safetensors file; copy it again") from None  # fmt: skip
    if FORMAT not in metadata:
        raise WeightsError(f"weights={str(path)!r} was not written by learned-opt: its metadata "
                           f"lacks {FORMAT!r}; give a file that `learned-opt train` "
                           "wrote")  # fmt: skip
    try:
        header = json.loads(metadata[FORMAT])
        version = header["version"]
        if type(version) is not int or version < 1:
            raise ValueError(f"version {version!r}")
    except (LookupError, TypeError, ValueError) as error:
        raise WeightsError(f"weights={str(path)!r} has a damaged header ({error!r}); "
                           "copy it again") from None  # fmt: skip
    if version > VERSION:
        raise WeightsError(f"weights={str(path)!r} has format version {version}, and this "
                           f"package reads up to {VERSION}; upgrade learned-opt")  # fmt: skip
    rule_name, config = header.get("rule"), header.get("config")
    facts = header.get("facts", {}) if version > 1 else None
    try:
        intact = digest(rule_name, config, tensors, facts) == header.get("sha256")
    except TypeError:  # a dtype that save_rule does not write
        intact = False
    if not intact:
        raise WeightsError(f"weights={str(path)!r} was altered: its checksum does not match; "
                           "copy it again")  # fmt: skip
    try:
        with torch.random.fork_rng(devices=[]):
            rule = make_rule(rule_name, **config)
        rule.load_state_dict(tensors, assign=True)  # float32, whatever torch's default dtype is
    except (ConfigError, LookupError, TypeError, ArithmeticError, RuntimeError) as error:
        raise WeightsError(f"weights={str(path)!r} do not fit their rule: {error!r}; use the "
                           "version of learned-opt that wrote them, import the module that "
                           "registers their rule, or train it again") from None  # fmt: skip
    return rule.requires_grad_(False)


def _given(weights: str | Path) -> Path:
    return user_path(weights, "weights", WeightsError)


def _command(path: Path) -> str:
    """Returns a hint how to make the missing file at `path`, if it is named as `train` names it."""
    if path.name != HUB_FILE:
        return ""
    return f"; make it with: learned-opt train --config CONFIG --output {path.parent}"


def _download(address: str, revision: str | None) -> Path:
    """Returns the local copy of a file of the Hugging Face Hub at one commit."""
    owner, _, rest = address.removeprefix(HUB).partition("/")
    name, _, file = rest.partition("/")
    if not owner or not name:
        raise WeightsError(f"weights={address!r} names no repository; write '{HUB}owner/name'")
    if re.fullmatch("[0-9a-f]{40}", revision or "") is None:
        raise WeightsError(f"revision is {revision!r}; give the full hash of a commit (40 digits) "
                           f"with weights={address!r}, so that they cannot change")  # fmt: skip
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise WeightsError(f"weights={address!r} needs huggingface_hub; run "
                           "pip install 'learned-opt[hub]'") from None  # fmt: skip
    try:
        return Path(hf_hub_download(f"{owner}/{name}", file or HUB_FILE, revision=revision))
    except Exception as error:  # errors of the Hub's own types, and of the connection
        raise WeightsError(f"weights={address!r} cannot be downloaded: {error}") from error
