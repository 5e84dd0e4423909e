"""Language models: GRU, LSTM and a small transformer on characters or words."""

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
    """What a language model has besides the settings of TaskConfig.

    Attributes:
        context: tokens that an example gives to the model, and as many to predict.
        level: "char" or "word", of text files.
        vocabulary: tokens at most, of text files; the rarest become one.
    """

    context: int = 32
    level: str = "char"
    vocabulary: int = 128

    def __post_init__(self) -> None:
        check_finite(self, ConfigError)
        if self.context < 1 or self.vocabulary < 2 or self.level not in ("char", "word"):
            raise ConfigError(
                f"context={self.context} must be at least 1, vocabulary={self.vocabulary} at least "
                f"2, level={self.level!r} 'char' or 'word'"
            )


class LanguageTask(ModuleTask):
    """Mean cross-entropy, in nats a token, of predicting each next token of a window.

    Windows do not overlap, and each starts from an empty state. Tasks of a draw give the tokens
    different numbers.
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
                f"data is 'digits', which are images; give kind {config.kind!r} 'markov' or a "
                "text file"
            )
        own = config.own
        text = load_text(config.data, data_root, own.level, own.vocabulary)
        if min(len(text.train), len(text.test)) <= own.context:
            raise DataError(
                f"text {text.name!r} has {len(text.train)} tokens to train on and "
                f"{len(text.test)} to test on; options.context={own.context} needs more than that"
            )
        size = len(text.vocabulary)
        splits = draw.rename(text.train, text.test, classes=size)
        windows = (tokens.unfold(-1, own.context + 1, own.context) for tokens in splits)
        train, test = ((w[..., :-1], w[..., 1:]) for w in windows)
        return cls(config, lambda: cls.network(config, size), train, test, math.log(size), draw)

    @staticmethod
    @abstractmethod
    def network(config: TaskConfig, vocabulary: int) -> nn.Module:
        """From tokens (n, context) to logits (n, context, vocabulary)."""

    @classmethod
    def architecture(cls, family: FamilyConfig, rng: torch.Generator) -> TaskConfig:
        """One or two layers. An example has many tokens, so that a quarter of the images' batch
        size will do; each draw has its own Markov chain, never the one called "markov"."""
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
    """x (n, 3·hidden) has the input's share of the gates; equations and order of torch's GRU."""
    (h,) = state
    (r, z, n), (hr, hz, hn) = x.chunk(3, -1), F.linear(h, cell.weight_hh, cell.bias_hh).chunk(3, -1)
    n = (n + (r + hr).sigmoid() * hn).tanh()
    return (n + (z + hz).sigmoid() * (h - n),)


def lstm_step(x: Tensor, state: tuple[Tensor, Tensor], cell: nn.LSTMCell) -> tuple[Tensor, Tensor]:
    """x (n, 4·hidden) has the input's share of the gates; equations and order of torch's LSTM."""
    h, c = state
    i, f, g, o = (x + F.linear(h, cell.weight_hh, cell.bias_hh)).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


class Recurrent(nn.Module):
    """Embedding, stacked cells, linear layer; vmap goes through it, unlike nn.GRU and nn.LSTM."""

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
        """(n, context) -> logits (n, context, vocabulary)."""
        x = self.embedding(tokens)
        for cell in self.cells:
            gates = F.linear(x, cell.weight_ih, cell.bias_ih)  # of all tokens at once
            state = (x.new_zeros(len(x), cell.hidden_size),) * self.states
            outputs = []
            for gate in gates.unbind(1):
                state = self.step(gate, state, cell)
                outputs.append(state[0])
            x = torch.stack(outputs, 1)
        return self.head(x)


@register("gru")
class GRUTask(LanguageTask):
    @staticmethod
    def network(config: TaskConfig, vocabulary: int) -> nn.Module:
        return Recurrent(nn.GRUCell, gru_step, 1, config.hidden, vocabulary)


@register("lstm")
class LSTMTask(LanguageTask):
    @staticmethod
    def network(config: TaskConfig, vocabulary: int) -> nn.Module:
        return Recurrent(nn.LSTMCell, lstm_step, 2, config.hidden, vocabulary)


@dataclass(frozen=True)
class TransformerOptions(TextOptions):
    """The settings of other language models, and one more.

    Attributes:
        heads: of attention; they divide the width.
    """

    heads: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads < 1:
            raise ConfigError(f"heads is {self.heads}; use at least 1")


class Transformer(nn.Module):
    """Causal, normalised before attention and MLP (GPT-2's order), with learned positions."""

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
        """(n, context) -> logits (n, context, vocabulary)."""
        x = self.embedding(tokens) + self.positions
        length = len(self.positions)
        mask = torch.full((length, length), -torch.inf, dtype=x.dtype, device=x.device).triu(1)
        with sdpa_kernel(SDPBackend.MATH):  # vmap takes the fused kernel task by task
            for layer in self.layers:
                x = layer(x, mask)
        return self.head(self.norm(x))


@register("transformer")
class TransformerTask(LanguageTask):
    """`hidden` is one width for all layers, repeated: (32, 32) has two."""

    Options = TransformerOptions

    @staticmethod
    def network(config: TaskConfig, vocabulary: int) -> nn.Module:
        width, own = config.hidden[0], config.own
        if set(config.hidden) != {width} or width % own.heads:
            raise ConfigError(
                f"hidden={config.hidden}: a transformer's layers have one width, which "
                f"options.heads={own.heads} divides"
            )
        return Transformer(width, len(config.hidden), own, vocabulary)
