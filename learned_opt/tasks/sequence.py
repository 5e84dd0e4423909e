"""Language models on characters or words: GRU, LSTM and a small transformer."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from geodesic.finite import check_finite
from learned_opt.errors import ConfigError, DataError
from learned_opt.tasks.base import choice, log_uniform
from learned_opt.tasks.kinds import SINGLE, Draw, TaskConfig, register
from learned_opt.tasks.module import ModuleTask
from learned_opt.tasks.text import load_text

if TYPE_CHECKING:
    from learned_opt.tasks.families import FamilyConfig


@dataclass(frozen=True)
class TextOptions:
    """The settings that only language models have.

    Attributes:
        context: The number of tokens of an example, which is also the number of predictions.
        level: The tokens of a text file: "char" or "word".
        vocabulary: The largest number of different tokens of a text file. The rarest tokens are
            merged into one.
    """

    context: int = 32
    level: str = "char"
    vocabulary: int = 128

    def __post_init__(self) -> None:
        check_finite(self, ConfigError)
        if self.context < 1 or self.vocabulary < 2 or self.level not in ("char", "word"):
            raise ConfigError(
                f"context={self.context} must be at least 1, vocabulary={self.vocabulary} at least "
                f"2, and level={self.level!r} must be 'char' or 'word'"
            )


class LanguageTask(ModuleTask):
    """Predicts each next token of a window; the loss is the mean cross-entropy in nats per token.

    Windows do not overlap, and each starts from a zero state. The tasks of a draw number the tokens
    differently.
    """

    Options = TextOptions
    unused = ("init", "activation")

    @classmethod
    def make(
        cls, config: TaskConfig, data_root: str | Path | None = None, draw: Draw = SINGLE
    ) -> LanguageTask:
        if not config.hidden:
            raise ConfigError(f"hidden is empty; give kind {config.kind!r} a width for each layer")
        if config.data == "digits":
            raise ConfigError(
                f"data is 'digits', which are images; use 'markov' or a text file for kind "
                f"{config.kind!r}"
            )
        own = config.own
        text = load_text(config.data, data_root, own.level, own.vocabulary)
        if min(len(text.train), len(text.test)) <= own.context:
            raise DataError(
                f"text {text.name!r} has {len(text.train)} tokens to train on and "
                f"{len(text.test)} to test on, but options.context={own.context} needs more; use a "
                "longer text or a shorter context"
            )
        size = len(text.vocabulary)
        splits = draw.rename(text.train, text.test, classes=size)
        windows = (tokens.unfold(-1, own.context + 1, own.context) for tokens in splits)
        train, test = ((w[..., :-1], w[..., 1:]) for w in windows)
        return cls(config, lambda: cls.network(config, size), train, test, math.log(size), draw)

    @staticmethod
    @abstractmethod
    def network(config: TaskConfig, vocabulary: int) -> nn.Module:
        """Returns a module that maps tokens (n, context) to logits (n, context, vocabulary)."""

    @classmethod
    def architecture(cls, family: FamilyConfig, rng: torch.Generator) -> TaskConfig:
        """Returns a random config of one or two layers.

        The batch size is a quarter of that for images, because an example has many tokens. Each
        draw has its own Markov chain, never the one named "markov".
        """
        width, text = 2 * log_uniform(rng, *(max(1, w // 2) for w in family.width)), family.text
        if text == "markov":
            text = f"markov-{int(torch.randint(1, 2**31, (), generator=rng))}"
        return TaskConfig(
            kind=cls.kind,
            data=text,
            hidden=(width,) * choice(rng, (1, 2)),
            batch_size=max(1, choice(rng, family.batch_sizes) // 4),
            options={"context": choice(rng, (16, 32))},
        )


def gru_step(x: Tensor, state: tuple[Tensor], cell: nn.GRUCell) -> tuple[Tensor]:
    """Returns the next state of torch's GRU from the input's share of its gates, (n, 3·hidden)."""
    (h,) = state
    (r, z, n), (hr, hz, hn) = x.chunk(3, -1), F.linear(h, cell.weight_hh, cell.bias_hh).chunk(3, -1)
    n = (n + (r + hr).sigmoid() * hn).tanh()
    return (n + (z + hz).sigmoid() * (h - n),)


def lstm_step(x: Tensor, state: tuple[Tensor, Tensor], cell: nn.LSTMCell) -> tuple[Tensor, Tensor]:
    """Returns the next state of torch's LSTM from the input's share of its gates, (n, 4·hidden)."""
    h, c = state
    i, f, g, o = (x + F.linear(h, cell.weight_hh, cell.bias_hh)).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


class Recurrent(nn.Module):
    """An embedding, stacked cells and a linear layer. It supports vmap, unlike nn.GRU, nn.LSTM."""

    def __init__(
        self, cell: type[nn.RNNCellBase], step: Callable, states: int, hidden: tuple[int, ...],
        vocabulary: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.step, self.states = step, states
        self.embedding = nn.Embedding(vocabulary, hidden[0])
        self.cells = nn.ModuleList(cell(i, o) for i, o in pairwise((hidden[0], *hidden)))
        self.head = nn.Linear(hidden[-1], vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps tokens (n, context) to logits (n, context, vocabulary)."""
        x = self.embedding(tokens)
        for cell in self.cells:
            gates = F.linear(x, cell.weight_ih, cell.bias_ih)  # for all tokens at once
            state = (x.new_zeros(len(x), cell.hidden_size),) * self.states
            outputs = []
            for gate in gates.unbind(1):
                state = self.step(gate, state, cell)
                outputs.append(state[0])
            x = torch.stack(outputs, 1)
        return self.head(x)


@register("gru")
class GRUTask(LanguageTask):
    """A GRU language model."""

    @staticmethod
    def network(config: TaskConfig, vocabulary: int) -> nn.Module:
        return Recurrent(nn.GRUCell, gru_step, 1, config.hidden, vocabulary)


@register("lstm")
class LSTMTask(LanguageTask):
    """An LSTM language model."""

    @staticmethod
    def network(config: TaskConfig, vocabulary: int) -> nn.Module:
        return Recurrent(nn.LSTMCell, lstm_step, 2, config.hidden, vocabulary)


@dataclass(frozen=True)
class TransformerOptions(TextOptions):
    """The settings that only transformers have, and those of other language models.

    Attributes:
        heads: The number of attention heads. It must divide the width.
    """

    heads: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads < 1:
            raise ConfigError(f"heads is {self.heads}; use at least 1")


class Transformer(nn.Module):
    """A causal pre-norm transformer with learned position embeddings, as GPT-2 is."""

    def __init__(self, width: int, layers: int, own: TransformerOptions, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.02 * torch.randn(own.context, width))  # GPT-2's scale
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, own.heads, 4 * width, 0.0, F.gelu, batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps tokens (n, context) to logits (n, context, vocabulary)."""
        x = self.embedding(tokens) + self.positions
        length = len(self.positions)
        mask = torch.full((length, length), -torch.inf, dtype=x.dtype, device=x.device).triu(1)
        with sdpa_kernel(SDPBackend.MATH):  # under vmap the fused kernel would run task by task
            for layer in self.layers:
                x = layer(x, mask)
        return self.head(self.norm(x))


@register("transformer")
class TransformerTask(LanguageTask):
    """A transformer language model. `hidden` repeats one width: (32, 32) has two layers."""

    Options = TransformerOptions

    @staticmethod
    def network(config: TaskConfig, vocabulary: int) -> nn.Module:
        width, own = config.hidden[0], config.own
        if set(config.hidden) != {width} or width % own.heads:
            raise ConfigError(
                f"hidden={config.hidden} must repeat one width that options.heads={own.heads} "
                "divides, such as (32, 32)"
            )
        return Transformer(width, len(config.hidden), own, vocabulary)
