"""Text to predict: any file, or sequences of a random Markov chain, which need none."""

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

TRAIN_SHARE = 0.9  # of a file; the rest is to test on
UNKNOWN = "<unk>"  # token 0: whatever is not in the vocabulary

# The chain: of order two, so that a model needs memory, and peaked enough that there is much to
# learn: about 1.5 nats a token, where the last token alone gets to 2.3 and chance is log 12 = 2.5.
SYMBOLS = "abcdefghijkl"
PEAKEDNESS = 2.0  # standard deviation of the logits
CHAINS, STEPS = 64, 640  # 64 sequences of so many steps, one after the other


@dataclass(frozen=True)
class TextData:
    """A text as numbers, a part to train on and one to test on.

    Attributes:
        name: what it was loaded as.
        train: (n,) int64 tokens in [0, len(vocabulary)).
        test: (m,) int64 tokens.
        vocabulary: what each token stands for.
    """

    name: str
    train: Tensor
    test: Tensor
    vocabulary: tuple[str, ...]


def load_text(
    name: str, data_root: str | Path | None = None, level: str = "char", vocabulary: int = 128
) -> TextData:
    """Load a text by name; a second call gives the same tensors, so do not write to them.

    Args:
        name: "markov", or "markov-7" and so on for other chains; or a UTF-8 file under
            `data_root`, or an absolute path, of which the first nine tenths are to train on.
        data_root: the folder of data sets; defaults to `$LEARNED_OPT_DATA`. "markov" needs none.
        level: "char" or "word" (what white space separates), of files.
        vocabulary: tokens at most; the rarest become one, UNKNOWN.

    Raises:
        DataError: the file is missing, not UTF-8, or too short; the message names it.
    """
    if chain := re.fullmatch(r"markov(?:-(\d+))?", name):
        return _markov(name, int(chain[1] or 0))
    return _read(name, find_data(name, data_root), level, vocabulary)


def read_text(name: str, path: Path, others: str = "'markov'") -> str:
    """The text of a UTF-8 file, without the byte order mark that some editors put before it.

    Raises:
        DataError: it cannot be read; the message names it as `name`, and `others`, which need none.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"text {name!r} cannot be read ({error}); give a UTF-8 file under data_root, or "
            f"{others}, which needs no file"
        ) from error


def check_length(name: str, splits: Sequence[Sequence]) -> None:
    """That each part of a text has a token and one that follows it, which is to be predicted."""
    if min(map(len, splits)) < 2:
        parts = ", ".join(str(len(split)) for split in splits)
        raise DataError(
            f"text {name!r} is too short: its {len(splits)} parts have {parts} tokens; give a file "
            "with at least 2 in each, 20 in all"
        )


@lru_cache(maxsize=8)
def _markov(name: str, seed: int) -> TextData:
    """P(next | last two) = softmax of normal logits, independent for each pair."""
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
    # by frequency, then by alphabet: the same file gives the same numbers everywhere
    known = sorted(Counter(train).items(), key=lambda item: (-item[1], item[0]))
    known = [UNKNOWN, *(s for s, _ in known if s != UNKNOWN)][:vocabulary]
    number = {symbol: i for i, symbol in enumerate(known)}
    train, test = (
        torch.tensor([number.get(s, 0) for s in part], dtype=torch.int64) for part in (train, test)
    )
    return TextData(name, train, test, tuple(known))
