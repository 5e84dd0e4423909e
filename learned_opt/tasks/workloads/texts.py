"""Texts in three splits: files, and docstrings and source code of Python's standard library."""

from __future__ import annotations

import ast
import sysconfig
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from learned_opt.tasks.base import generator
from learned_opt.tasks.data import find_data
from learned_opt.tasks.text import UNKNOWN, check_length, read_text

SHARES = (0.8, 0.1, 0.1)  # the shares of a text for training, validation and test, in this order
DOCS, SOURCE = "python-docs", "python-source"
PACKAGES = ("asyncio", "collections", "concurrent", "email", "html", "http", "importlib", "json",
            "logging", "multiprocessing", "unittest", "urllib", "xml")  # fmt: skip


@dataclass(frozen=True)
class Corpus:
    """A text as int64 tokens in [0, vocabulary), in consecutive splits."""

    train: Tensor
    validation: Tensor
    test: Tensor
    vocabulary: int


@lru_cache(maxsize=4)
def load_corpus(
    name: str, data_root: str | Path | None = None, level: str = "char", vocabulary: int = 96
) -> Corpus:
    """Returns a corpus by name.

    Args:
        name: "python-docs", the docstrings of this Python's standard library; "python-source", the
            source code of some of its packages; or a UTF-8 file under `data_root`. The first two
            differ between versions of Python.
        data_root: the folder of the file, see find_data.
        level: "char" for characters; "word" for what white space separates; "ascii" for characters
            numbered by their codes, so that all texts share their numbers.
        vocabulary: the largest number of different tokens; the rarest ones of the training split
            become one token.

    Raises:
        DataError: the file is missing, not UTF-8, or too short.
    """
    text = {DOCS: _docs, SOURCE: _source}.get(name, lambda: _file(name, data_root))()
    symbols = text.split() if level == "word" else list(text)
    ends = [round(len(symbols) * share) for share in (SHARES[0], SHARES[0] + SHARES[1])]
    splits = symbols[: ends[0]], symbols[ends[0] : ends[1]], symbols[ends[1] :]
    check_length(name, splits)
    # Sorted by frequency and then by alphabet, so the same text has the same numbers everywhere.
    known = sorted(Counter(splits[0]).items(), key=lambda item: (-item[1], item[0]))
    if level == "ascii":
        known = [(symbol, 0) for symbol in ("\n", *map(chr, range(32, 127)))]
    known = [UNKNOWN, *(s for s, _ in known if s != UNKNOWN)][:vocabulary]
    number = {symbol: i for i, symbol in enumerate(known)}
    tokens = (torch.tensor([number.get(s, 0) for s in split]) for split in splits)
    return Corpus(*tokens, len(known))


def _file(name: str, data_root: str | Path | None) -> str:
    return read_text(name, find_data(name, data_root), f"{DOCS!r} or {SOURCE!r}")


def _docs() -> str:
    """Returns the docstrings of the modules outside packages, each once, in a random order."""
    sources = (path.read_text("utf-8") for path in sorted(_library().glob("*.py")))
    docs = list(dict.fromkeys(doc for source in sources for doc in _docstrings(source)))
    order = torch.randperm(len(docs), generator=generator("docs")).tolist()
    return "\n\n".join(docs[i] for i in order)


def _docstrings(source: str) -> list[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds))
    return [doc for node in nodes if (doc := ast.get_docstring(node))]


def _source() -> str:
    files = [path for package in PACKAGES for path in sorted((_library() / package).glob("*.py"))]
    order = torch.randperm(len(files), generator=generator("source")).tolist()
    return "\n".join(files[i].read_text("utf-8") for i in order)


def _library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])
