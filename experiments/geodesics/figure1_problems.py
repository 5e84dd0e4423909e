"""The problems of figure1.py: networks, their F, and the losses that training minimizes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from geodesic.model import ModelLoss
from learned_opt.tasks.data import find_data, load_images


@dataclass(frozen=True)
class Problem:
    """F on flat parameters, and a smooth loss in its place if F has no gradient.

    Attributes:
        module: returns a network with fresh initial weights.
        loss: F, in the unit of the level.
        smooth: the loss for shortening: F in float64, or the cross-entropy if F is an error or a
            perplexity.
        bound: returns the level of ``smooth`` that is equivalent to F ≤ λ; None if there is none.
        train_fn: the loss that training and DSS minimize, as in `sample_strings`; None for F.
    """

    module: Callable[[], nn.Module]
    loss: ModelLoss
    smooth: ModelLoss
    bound: Callable[[float], float] | None = None
    train_fn: Callable[[Tensor, int], Tensor] | None = None


def polynomial(target: Callable[[Tensor], Tensor], bias: bool) -> Problem:
    """Returns the problem of a 1-4-4-1 sigmoid network, with the mean absolute error as F.

    F is on 500 equally spaced points of [0, 1]; the paper has 10,000 random ones.
    """
    x = (torch.arange(500, dtype=torch.float64)[:, None] + 0.5) / 500

    def module() -> nn.Module:
        network = nn.Sequential(
            *(nn.Linear(1, 4, bias), nn.Sigmoid()),
            *(nn.Linear(4, 4, bias), nn.Sigmoid()),
            *(nn.Linear(4, 1, bias), nn.Identity() if bias else nn.Sigmoid()),
        )
        for p in network.parameters():  # as in the published scripts, unlike torch
            nn.init.uniform_(p, -1, 1) if p.ndim > 1 else nn.init.normal_(p)
        return network

    def loss(dtype: torch.dtype) -> ModelLoss:
        return ModelLoss(module().to(dtype), nn.functional.l1_loss, x.to(dtype), target(x))

    return Problem(module, loss(torch.float32), loss(torch.float64), bound=float)


class Pixels(nn.Module):
    """Maps flat images with channels last to means of 2 × 2 pixels with channels first."""

    def __init__(self, *shape: int):
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(x.unflatten(1, self.shape).movedim(-1, 1), 2)


def minibatch_loss(
    module: nn.Module, loss_fn: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Returns a function of ``(theta, x, y)``, the loss of a minibatch with dropout, unlike F."""
    module = module.train()
    shapes = {name: p.shape for name, p in module.named_parameters()}

    def loss(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        parts = theta.split([shape.numel() for shape in shapes.values()])
        values = {k: part.view(s) for part, (k, s) in zip(parts, shapes.items(), strict=True)}
        return loss_fn(functional_call(module, values, (x,)), y)

    return loss


def images(
    name: str,
    channels: tuple[int, int],
    std: float,
    dropout: float = 0.0,
    batch: int = 128,
    count: int = 1000,
) -> Problem:
    """Returns the problem of an image classifier, with the test error in % as F.

    F is on ``count`` images, and the cross-entropy for shortening on 500 of them. The network has
    two 5 × 5 convolutions, each with a ReLU and 2 × 2 pooling, then 128 hidden units and dropout.
    """
    data, (a, b) = load_images(name), channels
    height, width, colours = (*data.image_shape, 1)[:3]

    def module() -> nn.Module:
        network = nn.Sequential(
            Pixels(height, width, colours),
            *(nn.Conv2d(colours, a, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(a, b, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear((height // 8) * (width // 8) * b, 128), nn.ReLU()),
            *(nn.Dropout(dropout), nn.Linear(128, 10)),
        )
        for p in network.parameters():  # as in the published scripts
            nn.init.constant_(p, 0.1)
            if p.ndim > 1:
                nn.init.trunc_normal_(p, 0, std, -2 * std, 2 * std)
        return network

    def error(outputs: Tensor, y: Tensor) -> Tensor:
        return 100 * (outputs.argmax(-1) != y).float().mean()

    def loss(function: Callable, count: int) -> ModelLoss:
        return ModelLoss(module(), function, data.test_x[:count], data.test_y[:count], 500)

    descended = minibatch_loss(module(), cross_entropy)

    def train_fn(theta: Tensor, step: int) -> Tensor:
        rows = torch.arange(step * batch, (step + 1) * batch) % len(data.train_y)
        return descended(theta, data.train_x[rows], data.train_y[rows])

    return Problem(module, loss(error, count), loss(cross_entropy, 500), train_fn=train_fn)


class LanguageModel(nn.Module):
    """An LSTM that maps windows ``(n, steps)`` to next-word logits ``(n, steps, vocabulary)``.

    The state is zero before each window. It is written with matrix products because `nn.LSTM` has
    no vmap rule.
    """

    def __init__(self, vocabulary: int, width: int):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.gates = nn.Linear(2 * width, 4 * width)
        self.output = nn.Linear(width, vocabulary)
        for p in self.parameters():
            nn.init.uniform_(p, -0.1, 0.1)  # as in the published scripts

    def forward(self, words: Tensor) -> Tensor:
        x = self.embedding(words)
        h = c = torch.zeros_like(x[:, 0])
        outputs = []
        for each in x.unbind(1):
            i, f, g, o = self.gates(torch.cat((each, h), 1)).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            outputs.append(h)
        return self.output(torch.stack(outputs, 1))


def read_words(split: str) -> list[str]:
    """Returns a split of Mikolov's Penn Treebank, with ``<eos>`` after each sentence."""
    return find_data(f"ptb/ptb.{split}.txt").read_text().replace("\n", "<eos>").split()


def language(vocabulary: int, width: int, steps: int = 20, batch: int = 20) -> Problem:
    """Returns the problem of a language model, with the perplexity as F.

    F is on 1,000 words of the test split, in equally spaced windows. Training uses the validation
    split. Words other than its ``vocabulary`` most frequent ones are ``<unk>``.
    """
    train = read_words("valid")
    kept = {word: i for i, (word, _) in enumerate(Counter(train).most_common(vocabulary))}

    def windows(words: list[str]) -> tuple[Tensor, Tensor]:
        """Returns windows ``(n, steps)`` in the order of the text, and the word after each word."""
        index = torch.tensor([kept.get(word, kept["<unk>"]) for word in words])
        end = (len(index) - 1) // steps * steps
        return index[:end].view(-1, steps), index[1 : end + 1].view(-1, steps)

    (x, y), (test_x, test_y) = windows(train), windows(read_words("test"))
    even = torch.linspace(0, len(test_x) - 1, 1000 // steps).long()

    def module() -> nn.Module:
        return LanguageModel(vocabulary, width)

    def entropy(outputs: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(outputs.flatten(0, 1), y.flatten())

    def perplexity(outputs: Tensor, y: Tensor) -> Tensor:
        return entropy(outputs, y).exp()

    def loss(function: Callable) -> ModelLoss:
        return ModelLoss(module(), function, test_x[even], test_y[even])

    # As in the published scripts, a mean over parallel streams of the text, but a sum over steps.
    descended = minibatch_loss(module(), lambda outputs, y: steps * entropy(outputs, y))
    stride = len(x) // batch

    def train_fn(theta: Tensor, step: int) -> Tensor:
        rows = torch.arange(batch) * stride + step % stride
        return descended(theta, x[rows], y[rows])

    return Problem(module, loss(perplexity), loss(entropy), bound=math.log, train_fn=train_fn)
