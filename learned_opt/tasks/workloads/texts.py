"""Text in three splits: files, and the documentation and source of Python's standard library."""

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

SHARES = (0.8, 0.1, 0.1)  # of a text: to train, validate and test on, in this order
DOCS, SOURCE = "python-docs", "python-source"
PACKAGES = ("asyncio", "collections", "concurrent", "email", "html", "http", "importlib", "json",
            "logging", "multiprocessing", "unittest", "urllib", "xml")  # fmt: skip


@dataclass(frozen=True)
class Corpus:
    """A text as numbers, int64 tokens in [0, vocabulary), in splits that follow one another."""

    train: Tensor
    validation: Tensor
    test: Tensor
    vocabulary: int


@lru_cache(maxsize=4)
def load_corpus(
    name: str, data_root: str | Path | None = None, level: str = "char", vocabulary: int = 96
) -> Corpus:
    """A corpus by name.

    Args:
        name: "python-docs", the documentation strings of the standard library that runs this
            program; "python-source", the source of some of its packages; or a UTF-8 file under
            `data_root`. The first two differ between versions of Python.
        level: "char", or "word": what white space separates; or "ascii": characters by their
            codes, so that texts share their numbers.
        vocabulary: tokens at most; the rarest of the training split become one.

    Raises:
        DataError: the file is missing, not UTF-8, or too short.
    """
    text = {DOCS: _docs, SOURCE: _source}.get(name, lambda: _file(name, data_root))()
    symbols = text.split() if level == "word" else list(text)
    ends = [round(len(symbols) * share) for share in (SHARES[0], SHARES[0] + SHARES[1])]
    splits = symbols[: ends[0]], symbols[ends[0] : ends[1]], symbols[ends[1] :]
    check_length(name, splits)
    # by frequency, then by alphabet: the same text gives the same numbers everywhere
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
    """Of the modules outside packages, each string once, in a random order."""
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
