"""Language models: transformers of several styles, GRUs, LSTMs and continuous bags of words."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geodesic.finite import check_finite
from learned_opt.errors import ConfigError, DataError
from learned_opt.tasks.base import Batch, generator
from learned_opt.tasks.kinds import TaskConfig, register_workload
from learned_opt.tasks.workloads.base import SPLITS, Device, Workload
from learned_opt.tasks.workloads.texts import Corpus, load_corpus

LEVELS = ("char", "word", "ascii")


@dataclass(frozen=True)
class LanguageOptions:
    """The settings of language models.

    Attributes:
        context: the number of tokens of an example. The model predicts the next token at each.
        level: "char", "word" or "ascii"; see load_corpus.
        vocabulary: the largest number of different tokens.
        dropout: the dropout probability.
        tied: the output layer shares the matrix of the embedding.
    """

    context: int = 64
    level: str = "char"
    vocabulary: int = 96
    dropout: float = 0.0
    tied: bool = False

    def __post_init__(self) -> None:
        check_finite(self, ConfigError)
        if self.context < 1 or self.vocabulary < 2 or self.level not in LEVELS:
            raise ConfigError(
                f"context={self.context} must be at least 1, vocabulary={self.vocabulary} at least "
                f"2, and level={self.level!r} one of {LEVELS}"
            )
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout is {self.dropout}; use at least 0 and less than 1")


class LanguageWorkload(Workload):
    """The cross-entropy, in nats per token, of predicting each next token of a window.

    Minibatches are windows from random places of the training split. Evaluations use the first
    `test_size` consecutive windows of a split.
    """

    Options = LanguageOptions

    def __init__(self, config: TaskConfig, corpus: Corpus, device: torch.device | str) -> None:
        self.vocabulary, context = corpus.vocabulary, config.own.context
        if min(len(getattr(corpus, split)) for split in SPLITS) <= context:
            raise DataError(
                f"text {config.data!r} is too short for options.context={context}; use a shorter "
                "context or a longer text"
            )
        data = {}
        for split in SPLITS:
            windows = getattr(corpus, split).unfold(0, context + 1, context)[: config.test_size]
            data[split] = windows[:, :-1], windows[:, 1:]
        self.tokens = corpus.train.to(device)
        if config.train_size:
            self.tokens = self.tokens[: config.train_size]
        super().__init__(config, data, math.log(corpus.vocabulary), device)

    @classmethod
    def read(cls, config: TaskConfig, data_root: str | Path | None, device: Device) -> Self:
        own = config.own
        corpus = load_corpus(config.data, data_root, own.level, own.vocabulary)
        return cls(config, corpus, device)

    def batch(self, seed: int, step: int) -> Batch:
        length, rng = self.config.own.context + 1, generator("batch", seed, step)
        starts = torch.randint(
            len(self.tokens) - length + 1, (self.config.batch_size, 1), generator=rng
        )
        windows = self.tokens[(starts + torch.arange(length)).to(self.device)]
        return windows[:, :-1], windows[:, 1:]


class Recurrent(nn.Module):
    """An embedding, nn.GRU or nn.LSTM, and a linear layer; dropout before and after each layer."""

    def __init__(self, cell: type[nn.RNNBase], hidden: tuple[int, ...], own: LanguageOptions,
                 vocabulary: int) -> None:  # fmt: skip
        super().__init__()
        width, layers = hidden[0], len(hidden)
        self.embedding = nn.Embedding(vocabulary, width)
        inner = own.dropout if layers > 1 else 0.0
        self.cells = cell(width, width, layers, batch_first=True, dropout=inner)
        self.dropout = nn.Dropout(own.dropout)
        self.head = nn.Linear(width, vocabulary)
        if own.tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """(n, context) -> logits (n, context, vocabulary)."""
        outputs, _ = self.cells(self.dropout(self.embedding(tokens)))
        return self.head(self.dropout(outputs))


@register_workload("gru_lm")
class GRUWorkload(LanguageWorkload):
    """A GRU language model; `hidden` repeats one width, so (128, 128) has two layers."""

    cell: type[nn.RNNBase] = nn.GRU

    def network(self) -> nn.Module:
        return Recurrent(self.cell, one_width(self.config), self.config.own, self.vocabulary)


@register_workload("lstm_lm")
class LSTMWorkload(GRUWorkload):
    cell = nn.LSTM


@dataclass(frozen=True)
class TransformerOptions(LanguageOptions):
    """The settings of language models, and those of transformers.

    Attributes:
        heads: the number of attention heads, which must divide half the width.
        style: "llama" has RMS norms, rotary positions, gated MLPs without biases and torch's
            initialization; "gpt2" has layer norms, learned positions, GELU and the initialization
            of GPT-2.
    """

    heads: int = 4
    style: str = "gpt2"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.style not in ("gpt2", "llama") or self.heads < 1:
            raise ConfigError(
                f"style={self.style!r} must be 'gpt2' or 'llama', and heads={self.heads} at least 1"
            )


class Attention(nn.Module):
    """Causal self-attention, with rotary positions (Su et al. 2021) if `rotary`."""

    def __init__(self, width: int, heads: int, dropout: float, bias: bool, rotary: bool) -> None:
        super().__init__()
        self.heads, self.dropout, self.rotary = heads, dropout, rotary
        self.inputs = nn.Linear(width, 3 * width, bias)
        self.outputs = nn.Linear(width, width, bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inputs(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.rotary:
            q, k = rotate(q), rotate(k)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return self.outputs(y.transpose(1, 2).flatten(-2))


def rotate(x: Tensor) -> Tensor:
    """Rotates features (i, i + half) at position t by t · 10000^(−i/half): (..., t, f)."""
    half = x.shape[-1] // 2
    rates = 10_000 ** (-torch.arange(half, device=x.device) / half)
    angles = torch.arange(x.shape[-2], device=x.device)[:, None] * rates
    a, b = x.chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1)


class Gated(nn.Module):
    """SwiGLU (Shazeer 2020), with 2/3 of an MLP's inner width and thus as many weights."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = 8 * width // 3
        self.inputs, self.outputs = (
            nn.Linear(width, 2 * inner, False),
            nn.Linear(inner, width, False),
        )

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.inputs(x).chunk(2, -1)
        return self.outputs(F.silu(gate) * value)


class Layer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, width: int, own: TransformerOptions) -> None:
        super().__init__()
        gpt2 = own.style == "gpt2"
        norm = nn.LayerNorm if gpt2 else nn.RMSNorm
        mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.norms = nn.ModuleList(norm(width) for _ in range(2))
        self.attention = Attention(width, own.heads, own.dropout, gpt2, not gpt2)
        self.mlp = mlp if gpt2 else Gated(width)
        self.dropout = nn.Dropout(own.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norms[0](x)))
        return x + self.dropout(self.mlp(self.norms[1](x)))


class Transformer(nn.Module):
    """A decoder-only language model."""

    def __init__(self, width: int, layers: int, own: TransformerOptions, vocabulary: int) -> None:
        super().__init__()
        gpt2 = own.style == "gpt2"
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(own.context, width) if gpt2 else None
        self.dropout = nn.Dropout(own.dropout)
        self.layers = nn.ModuleList(Layer(width, own) for _ in range(layers))
        self.norm = (nn.LayerNorm if gpt2 else nn.RMSNorm)(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if own.tied:
            self.head.weight = self.embedding.weight
        if gpt2:
            gpt2_init(self, layers)

    def forward(self, tokens: Tensor) -> Tensor:
        """(n, context) -> logits (n, context, vocabulary)."""
        x = self.embedding(tokens)
        if self.positions is not None:
            x = x + self.positions.weight[: tokens.shape[1]]
        x = self.dropout(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def gpt2_init(model: nn.Module, layers: int) -> None:
    """Initializes weights as N(0, .02²) and biases as zeros, in place.

    The weights of layers that write into the residual stream are divided by √(2 layers) (Radford et
    al. 2019, as in OpenAI's code).
    """
    for name, p in model.named_parameters():
        if p.dim() > 1:
            last = name.endswith(("attention.outputs.weight", "mlp.2.weight"))
            nn.init.normal_(p, std=0.02 / (math.sqrt(2 * layers) if last else 1))
        elif name.endswith("bias"):
            nn.init.zeros_(p)


@register_workload("transformer_lm")
class TransformerWorkload(LanguageWorkload):
    """A transformer language model; `hidden` repeats one width, so (64, 64) has two layers."""

    Options = TransformerOptions

    def network(self) -> nn.Module:
        hidden, own = one_width(self.config), self.config.own
        if hidden[0] % (2 * own.heads):
            raise ConfigError(
                f"hidden={hidden} must have a width that is a multiple of twice heads={own.heads}"
            )
        return Transformer(hidden[0], len(hidden), own, self.vocabulary)


class ContextWords(nn.Module):
    """A continuous bag of words (CBOW, Mikolov et al. 2013) with one hidden layer.

    It computes the logits of a word from the mean embedding of the words around it.
    """

    def __init__(self, width: int, vocabulary: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.hidden = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, words: Tensor) -> Tensor:
        """(n, words around) -> (n, vocabulary)."""
        x = self.embedding(words).mean(1)
        return self.head(self.dropout(x + F.gelu(self.hidden(x))))


@register_workload("cbow")
class ContextWordsWorkload(LanguageWorkload):
    """The cross-entropy of the word in the middle of a window, given the `context` words around it.

    Word frequencies follow Zipf's law, so most rows of the embedding rarely have a gradient.
    """

    def __init__(self, config: TaskConfig, corpus: Corpus, device: torch.device | str) -> None:
        super().__init__(config, corpus, device)
        windows = {s: torch.cat([x, y[:, -1:]], 1) for s, (x, y) in self.data.items()}
        self.data = {split: self._around(w) for split, w in windows.items()}

    def network(self) -> nn.Module:
        own = self.config.own
        return ContextWords(one_width(self.config)[0], self.vocabulary, own.dropout)

    def batch(self, seed: int, step: int) -> Batch:
        x, y = super().batch(seed, step)
        return self._around(torch.cat([x, y[:, -1:]], 1))

    @staticmethod
    def _around(windows: Tensor) -> Batch:
        middle = windows.shape[1] // 2
        return torch.cat([windows[:, :middle], windows[:, middle + 1 :]], 1), windows[:, middle]


def one_width(config: TaskConfig) -> tuple[int, ...]:
    if not config.hidden or len(set(config.hidden)) > 1:
        raise ConfigError(
            f"hidden is {config.hidden}, but kind {config.kind!r} needs layers of one width; use "
            "a width for each layer, such as (64, 64)"
        )
    return config.hidden
