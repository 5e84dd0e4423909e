"""Loads text to predict: a file, or sequences of a random Markov chain, which need no file."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from learned_opt.errors import DataError
from learned_opt.tasks.base import generator
from learned_opt.tasks.data import find_data

TRAIN_SHARE = 0.9  # the share of a text to train on; the rest is to test on
UNKNOWN = "<unk>"  # token 0, for everything that is not in the vocabulary

# The Markov chain is of order two, so that a model needs memory. Its best model has about 1.5 nats
# per token, a model of the last token alone 2.3, and chance is log 12 = 2.5.
SYMBOLS = "abcdefghijkl"
PEAKEDNESS = 2.0  # the standard deviation of the logits
CHAINS, STEPS = 64, 640  # the number of sequences, which are concatenated, and their length


@dataclass(frozen=True)
class TextData:
    """A tokenized text, split into a training and a test part.

    Attributes:
        name: the name by which it was loaded.
        train: (n,) int64 tokens in [0, len(vocabulary)).
        test: (m,) int64 tokens in [0, len(vocabulary)).
        vocabulary: the symbol of each token.
    """

    name: str
    train: Tensor
    test: Tensor
    vocabulary: tuple[str, ...]


def load_text(
    name: str, data_root: str | Path | None = None, level: str = "char", vocabulary: int = 128
) -> TextData:
    """Returns a text by name. Results are cached and shared, so do not write to their tensors.

    Args:
        name: "markov", or for example "markov-7" for another chain; or a UTF-8 file under
            `data_root`, or an absolute path. The first nine tenths are to train on.
        data_root: the folder of data sets; the default is `$LEARNED_OPT_DATA`. "markov" needs none.
        level: the tokens of a file: "char", or "word" for words separated by white space.
        vocabulary: the largest number of different tokens of a file. The rarest tokens become
            UNKNOWN.

    Raises:
        DataError: the file is missing, not UTF-8, or too short; the message names it.
    """
    if chain := re.fullmatch(r"markov(?:-(\d+))?", name):
        return _markov(name, int(chain[1] or 0))
    return _read(name, find_data(name, data_root), level, vocabulary)


def read_text(name: str, path: Path, others: str = "'markov'") -> str:
    """Returns the text of a UTF-8 file, without the byte order mark that some editors add.

    Raises:
        DataError: the file cannot be read. The message calls it `name` and suggests `others`, which
            need no file.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"text {name!r} cannot be read ({error}); give a UTF-8 file under data_root, or "
            f"{others}, which needs no file"
        ) from error


def check_length(name: str, splits: Sequence[Sequence]) -> None:
    """Raises DataError if a part of a text has fewer than two tokens, and so nothing to predict."""
    if min(map(len, splits)) < 2:
        parts = ", ".join(str(len(split)) for split in splits)
        raise DataError(
            f"text {name!r} is too short: its {len(splits)} parts have {parts} tokens; give a file "
            "with at least 2 in each, 20 in all"
        )


@lru_cache(maxsize=8)
def _markov(name: str, seed: int) -> TextData:
    """Returns a text with P(next | last two) = softmax(normal logits), drawn for each pair."""
    rng, n = generator("markov", seed), len(SYMBOLS)
    logits = PEAKEDNESS * torch.randn(n, n, n, generator=rng)
    bounds = logits.softmax(-1).cumsum(-1)[..., :-1].contiguous()
    tokens = torch.randint(n, (CHAINS, STEPS), generator=rng)
    draws = torch.rand(CHAINS, STEPS, 1, generator=rng)
    for t in range(2, STEPS):
        rows = bounds[tokens[:, t - 2], tokens[:, t - 1]]
        tokens[:, t] = (draws[:, t] > rows).sum(-1)
    split = round(TRAIN_SHARE * CHAINS)
    return TextData(name, tokens[:split].flatten(), tokens[split:].flatten(), tuple(SYMBOLS))


@lru_cache(maxsize=4)
def _read(name: str, path: Path, level: str, vocabulary: int) -> TextData:
    text = read_text(name, path)
    symbols = list(text) if level == "char" else text.split()
    split = round(TRAIN_SHARE * len(symbols))
    train, test = symbols[:split], symbols[split:]
    check_length(name, (train, test))
    # Sorted by frequency, then alphabetically, so that a file gives the same numbers everywhere.
    known = sorted(Counter(train).items(), key=lambda item: (-item[1], item[0]))
    known = [UNKNOWN, *(s for s, _ in known if s != UNKNOWN)][:vocabulary]
    number = {symbol: i for i, symbol in enumerate(known)}
    train, test = (
        torch.tensor([number.get(s, 0) for s in part], dtype=torch.int64) for part in (train, test)
    )
    return TextData(name, train, test, tuple(known))
