"""Networks on which optimizers fail: a large recurrent gain, post-norm, SIREN, a GAN."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from geodesic.finite import check_finite
from learned_opt.errors import ConfigError
from learned_opt.tasks.base import Batch, generator
from learned_opt.tasks.data import load_images
from learned_opt.tasks.kinds import TaskConfig, register_workload
from learned_opt.tasks.module import squared_error
from learned_opt.tasks.workloads.base import SPLITS, Device, Workload
from learned_opt.tasks.workloads.language import one_width
from learned_opt.tasks.workloads.texts import load_corpus

SIZES = {"train": 4096, "validation": 512, "test": 512}  # of the splits of generated data
COMMON = 6  # tokens up to this one are common; tokens are numbered by their frequency
WRONG = 0.05  # the share of wrong labels, which keeps the lowest loss away from zero
OMEGA = 30.0  # the frequency ω of SIREN, Sitzmann et al. 2020


@dataclass(frozen=True)
class AddingOptions:
    """The settings of the adding problem.

    Attributes:
        length: the length of a sequence of numbers.
        marked: how many of them are added.
        gain: the factor of the initial recurrent matrix, which is otherwise orthogonal.
    """

    length: int = 30
    marked: int = 2
    gain: float = 1.4

    def __post_init__(self) -> None:
        check_finite(self, ConfigError)
        if not (0 < self.marked <= self.length and self.gain > 0):
            raise ConfigError(
                f"marked={self.marked} must be from 1 to length={self.length}, and "
                f"gain={self.gain} must be positive"
            )


class LastState(nn.Module):
    """nn.RNN with ReLU, and a linear layer on its last state."""

    def __init__(self, inputs: int, hidden: int, gain: float) -> None:
        super().__init__()
        self.cells = nn.RNN(inputs, hidden, nonlinearity="relu", batch_first=True)
        nn.init.orthogonal_(self.cells.weight_hh_l0, gain)
        self.head = nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(x)[0][:, -1])


@register_workload("adding")
class AddingWorkload(Workload):
    """The adding problem (Hochreiter & Schmidhuber 1997): the sum of the marked numbers.

    The loss is the mean squared error of a recurrent network with ReLU, whose states can explode.
    Numbers are uniform in [-1, 1], and the sum is divided by its standard deviation.
    """

    Options = AddingOptions
    unused = (*Workload.unused, "data")

    @classmethod
    def read(cls, config: TaskConfig, data_root: str | Path | None, device: Device) -> Self:
        own, data = config.own, {}
        for split in SPLITS:
            size = (config.train_size if split == "train" else config.test_size) or SIZES[split]
            rng = generator("adding", split)
            numbers = 2 * torch.rand(size, own.length, generator=rng) - 1
            places = torch.rand(size, own.length, generator=rng).argsort(1)
            marks = (places < own.marked).float()
            sums = (numbers * marks).sum(1, keepdim=True) * math.sqrt(3 / own.marked)
            data[split] = torch.stack([numbers, marks], -1), sums
        return cls(config, data, 1.0, device)

    def network(self) -> nn.Module:
        return LastState(2, one_width(self.config)[0], self.config.own.gain)

    losses = staticmethod(squared_error)


@dataclass(frozen=True)
class EncoderOptions:
    """The settings of post-norm transformer encoders.

    Attributes:
        context: the number of characters of an example.
        style: "torch" is nn.TransformerEncoder with its defaults; "bert" has GELU, dropout, a norm
            after the embedding, a pooler, and all weights N(0, .02²) (Devlin et al. 2019).
        heads: the number of attention heads.
        goal: what is classified, "common" or "order"; see EncoderWorkload.
    """

    context: int = 24
    style: str = "torch"
    heads: int = 4
    goal: str = "common"

    def __post_init__(self) -> None:
        check_finite(self, ConfigError)
        known = self.style in ("torch", "bert") and self.goal in ("common", "order")
        if not known or min(self.context, self.heads) < 1:
            raise ConfigError(
                f"style={self.style!r} must be 'torch' or 'bert', goal={self.goal!r} 'common' or "
                f"'order', and context={self.context} and heads={self.heads} at least 1"
            )


class Encoder(nn.Module):
    """A post-norm transformer that classifies a text from its first position."""

    def __init__(self, width: int, layers: int, own: EncoderOptions, vocabulary: int) -> None:
        super().__init__()
        bert = own.style == "bert"
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(own.context, width)
        self.norm = nn.LayerNorm(width) if bert else nn.Identity()
        layer = nn.TransformerEncoderLayer(
            width, own.heads, 4 * width, 0.1, "gelu" if bert else "relu", batch_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.pooler = nn.Sequential(nn.Linear(width, width), nn.Tanh()) if bert else nn.Identity()
        self.head = nn.Linear(width, 2)
        if bert:
            for p in self.parameters():
                if p.dim() > 1:
                    nn.init.normal_(p, std=0.02)
        else:
            nn.init.normal_(self.embedding.weight, std=0.02)
            nn.init.normal_(self.positions.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.embedding(tokens) + self.positions.weight)
        return self.head(self.pooler(self.layers(x)[:, 0]))


@register_workload("post_norm")
class EncoderWorkload(Workload):
    """The cross-entropy of classifying windows of a text.

    With the goal "order", the classes are windows of the text and windows whose characters are
    shuffled. With "common", they are windows with more and with fewer common characters than the
    median window.
    """

    Options = EncoderOptions

    def __init__(self, config: TaskConfig, data_root: str | Path | None, device: str) -> None:
        self.config = config
        corpus, context = load_corpus(config.data, data_root), config.own.context
        self.vocabulary = corpus.vocabulary
        windows = {}
        for split in SPLITS:
            tokens, rng = getattr(corpus, split), generator("common", split)
            size = config.train_size if split == "train" else config.test_size
            starts = torch.randint(len(tokens) - context, (size or SIZES[split],), generator=rng)
            windows[split] = tokens[starts[:, None] + torch.arange(context)]
        middle = (windows["train"] <= COMMON).sum(1).median()
        data = {split: self._classified(x, middle, split) for split, x in windows.items()}
        super().__init__(config, data, math.log(2), device)

    def _classified(self, windows: Tensor, middle: Tensor, split: str) -> Batch:
        if self.config.own.goal == "common":
            labels = (windows <= COMMON).sum(1) > middle
            wrong = torch.rand(len(windows), generator=generator("wrong", split)) < WRONG
            return windows, (labels ^ wrong).long()
        rng = generator("order", split)
        labels = torch.randint(2, (len(windows),), generator=rng)
        shuffled = windows.gather(1, torch.rand(windows.shape, generator=rng).argsort(1))
        return torch.where(labels[:, None] == 1, shuffled, windows), labels

    @classmethod
    def read(cls, config: TaskConfig, data_root: str | Path | None, device: Device) -> Self:
        return cls(config, data_root, device)

    def network(self) -> nn.Module:
        hidden = one_width(self.config)
        return Encoder(hidden[0], len(hidden), self.config.own, self.vocabulary)


@dataclass(frozen=True)
class Seq2SeqOptions:
    """The settings of encoder-decoders.

    Attributes:
        length: the length of a sequence.
        symbols: the number of different symbols.
        rule: the output, which is the input sequence "reversed" or "sorted".
    """

    length: int = 8
    symbols: int = 12
    rule: str = "reversed"

    def __post_init__(self) -> None:
        check_finite(self, ConfigError)
        if self.rule not in ("reversed", "sorted") or min(self.length, self.symbols) < 2:
            raise ConfigError(
                f"rule={self.rule!r} must be 'reversed' or 'sorted', and length={self.length} and "
                f"symbols={self.symbols} at least 2"
            )


class EncoderDecoder(nn.Module):
    """nn.Transformer with its defaults, but without dropout, and with learned positions."""

    def __init__(self, width: int, layers: int, own: Seq2SeqOptions) -> None:
        super().__init__()
        self.embedding = nn.Embedding(own.symbols + 1, width)  # 1 for the start symbol
        self.positions = nn.Embedding(own.length, width)
        self.transformer = nn.Transformer(
            width, 4, layers, layers, 4 * width, dropout=0.0, batch_first=True
        )
        self.head = nn.Linear(width, own.symbols)
        mask = nn.Transformer.generate_square_subsequent_mask(own.length)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, pair: Tensor) -> Tensor:
        """Returns logits, for (n, 2, length) of input sequences and the preceding outputs."""
        source, said = (self.embedding(x) + self.positions.weight for x in pair.unbind(1))
        return self.head(self.transformer(source, said, tgt_mask=self.mask, tgt_is_causal=True))


@register_workload("seq2seq")
class Seq2SeqWorkload(Workload):
    """The cross-entropy of each symbol of a sequence that is to be reversed or sorted."""

    Options = Seq2SeqOptions
    unused = (*Workload.unused, "data")

    @classmethod
    def read(cls, config: TaskConfig, data_root: str | Path | None, device: Device) -> Self:
        own, data = config.own, {}
        for split in SPLITS:
            size = (config.train_size if split == "train" else config.test_size) or SIZES[split]
            rng = generator("seq2seq", split)
            x = torch.randint(own.symbols, (size, own.length), generator=rng)
            y = x.flip(1) if own.rule == "reversed" else x.sort(1).values
            said = F.pad(y[:, :-1], (1, 0), value=own.symbols)
            data[split] = torch.stack([x, said], 1), y
        return cls(config, data, math.log(own.symbols), device)

    def network(self) -> nn.Module:
        hidden = one_width(self.config)
        return EncoderDecoder(hidden[0], len(hidden), self.config.own)


class Sine(nn.Module):
    """x ↦ sin(ω x)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(OMEGA * x)


@register_workload("siren")
class SirenWorkload(Workload):
    """The mean squared error of predicting an image's standardized pixels from their coordinates.

    The network is a SIREN (Sitzmann et al. 2020). `data` is "photo", for a square of one of
    scikit-learn's photographs, or an image set, for its first image. The validation and the test
    split have a tenth of the pixels each.
    """

    @classmethod
    def read(cls, config: TaskConfig, data_root: str | Path | None, device: Device) -> Self:
        if config.data == "photo":
            from sklearn.datasets import load_sample_image

            picture = torch.tensor(load_sample_image("flower.jpg")[100:356:6, 200:456:6]).float()
        else:
            images = load_images(config.data, data_root)
            picture = images.train_x[0].reshape((*images.image_shape, 1)[:3])
        height, width, channels = picture.shape
        sides = (torch.linspace(-1, 1, n) for n in (height, width))
        places = torch.stack(torch.meshgrid(*sides, indexing="ij"), -1).flatten(0, 1)
        pixels = picture.reshape(-1, channels)
        pixels = (pixels - pixels.mean()) / pixels.std()
        order = torch.randperm(len(pixels), generator=generator("siren"))
        tenth = len(pixels) // 10
        parts = order.split([len(pixels) - 2 * tenth, tenth, tenth])
        data = {s: (places[i], pixels[i]) for s, i in zip(SPLITS, parts, strict=True)}
        return cls(config, data, float(data["train"][1].square().mean()), device)

    def network(self) -> nn.Module:
        """Returns a network with weights U(±1/n) in the first layer and U(±√(6/n)/ω) in the others.

        n is the number of inputs of a layer.
        """
        hidden, layers = one_width(self.config), []
        inputs, outputs = (self.data["train"][i].shape[1] for i in (0, 1))
        for index, i in enumerate((inputs, *hidden[:-1])):
            layer = nn.Linear(i, hidden[0])
            bound = math.sqrt(6 / i) / OMEGA if index else 1 / i
            nn.init.uniform_(layer.weight, -bound, bound)
            layers += [layer, Sine()]
        head = nn.Linear(hidden[-1], outputs)
        bound = math.sqrt(6 / hidden[-1]) / OMEGA
        nn.init.uniform_(head.weight, -bound, bound)
        return nn.Sequential(*layers, head)

    losses = staticmethod(squared_error)


class Game(nn.Module):
    """A generator, which makes points from noise, and a critic, which tells them from data."""

    def __init__(self, noise: int, points: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.noise = noise
        self.generator = mlp((noise, *hidden, points))
        self.critic = mlp((points, *hidden, 1))


def mlp(widths: tuple[int, ...]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, o in pairwise(widths):
        layers += [nn.Linear(i, o), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers[:-1])


def energy_distance(x: Tensor, y: Tensor) -> Tensor:
    """Returns 2 E|X − Y| − E|X − X'| − E|Y − Y'|, 0 only for equal distributions (Székely)."""
    within = sum(torch.cdist(a, a).sum() / (len(a) * (len(a) - 1)) for a in (x, y))
    return 2 * torch.cdist(x, y).mean() - within


@register_workload("gan")
class GameWorkload(Workload):
    """A GAN (Goodfellow et al. 2014) whose two networks one optimizer trains at the same time.

    The loss is the sum of the critic's cross-entropy and the generator's non-saturating loss, each
    with the other network held fixed. The evaluation is the energy distance between a split and as
    many generated points. `data` is "ring", for eight Gaussians on a circle, or an image set, for
    its images averaged over squares of 4 pixels a side.
    """

    NOISE = 8

    @classmethod
    def read(cls, config: TaskConfig, data_root: str | Path | None, device: Device) -> Self:
        if config.data == "ring":
            rng = generator("ring")
            n = sum(SIZES.values())
            angle = torch.randint(8, (n,), generator=rng) * (math.pi / 4)
            centres = torch.stack([angle.cos(), angle.sin()], 1)
            points = centres + 0.05 * torch.randn(n, 2, generator=rng)
        else:
            images = load_images(config.data, data_root)
            shape = (*images.image_shape, 1)[:3]
            x = images.train_x[: sum(SIZES.values())].unflatten(1, shape).movedim(-1, 1)
            points = F.avg_pool2d(x, 4).flatten(1)
        parts = points.split(list(SIZES.values()))
        data = {split: (x, x) for split, x in zip(SIZES, parts, strict=True)}
        return cls(config, data, math.inf, device)

    def network(self) -> nn.Module:
        return Game(self.NOISE, self.data["train"][0].shape[1], self.config.hidden)

    def loss(self, module: nn.Module, seed: int, step: int) -> Tensor:
        real, _ = self.batch(seed, step)
        fake = module.generator(self._noise(len(real), "noise", seed, step))
        fixed = {name: p.detach() for name, p in module.critic.named_parameters()}
        critic = F.softplus(-module.critic(real)) + F.softplus(module.critic(fake.detach()))
        return (critic + F.softplus(-functional_call(module.critic, fixed, fake))).mean()

    def evaluate(self, module: nn.Module, split: str) -> tuple[float, float]:
        points = self.data[split][0]
        made = module.generator(self._noise(len(points), "made", split))
        return float(energy_distance(made, points)), math.nan

    def _noise(self, size: int, *key: object) -> Tensor:
        return torch.randn(size, self.NOISE, generator=generator(*key)).to(self.device)
