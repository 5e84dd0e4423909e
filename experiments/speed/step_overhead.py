"""Measures how much LearnedOptimizer adds to training steps, and how much memory a step needs.

    python -m experiments.speed.throughput --what training memory

This writes throughput_training.csv, with a row for each model and optimizer, and
throughput_memory.csv.
"""

from __future__ import annotations

import math
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from experiments.result_files import save
from learned_opt import LearnedOptimizer

BATCH, VOCABULARY, CONTEXT = 64, 96, 64
REPEATS, SAMPLE = 9, 0.05  # the number of samples, and the least seconds of each
WARM_UP = 16  # steps, which include the making of state and most changes of bases
COLUMNS = 100  # the number of columns of each matrix
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "Adam foreach": lambda params: Adam(params, foreach=True),
    "Adam fused": lambda params: Adam(params, fused=True),
    "geodesic_rnn": LearnedOptimizer,
}
MEMORY = 10_000_000  # parameters, beside which a process's other memory is small


def sample_steps(optimizer: Optimizer, seconds: float, least: float) -> int:
    """Returns a number of steps, of `seconds` each, that takes more than `least` seconds.

    It is a multiple of the interval between runs of the network, so that all samples have their
    share of these.
    """
    period = getattr(getattr(optimizer, "rule", None), "every", 1)
    return period * (1 + math.floor(least / seconds / period))


class CharTransformer(nn.Module):
    """A pre-norm transformer for next-character prediction, with untied embeddings."""

    def __init__(self, width: int = 128, layers: int = 5) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.position = nn.Parameter(torch.zeros(CONTEXT, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position
        mask = nn.Transformer.generate_square_subsequent_mask(CONTEXT)
        for block in self.blocks:
            x = block(x, mask, is_causal=True)
        return self.head(self.norm(x)).transpose(1, 2)


class Residual(nn.Module):
    """A residual block of two 3 × 3 convolutions with batch norm (He et al. 2015)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs),
            nn.ReLU(), nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        around = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        self.around = around if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return (self.body(x) + self.around(x)).relu()


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 49, 10),
    )  # fmt: skip


def resnet8() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        Residual(16, 16, 1), Residual(16, 32, 2), Residual(32, 64, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


def images(channels: int, size: int) -> tuple[Tensor, Tensor]:
    return torch.randn(BATCH, channels, size, size), torch.randint(10, (BATCH,))


def text() -> tuple[Tensor, Tensor]:
    return tuple(torch.randint(VOCABULARY, (2, BATCH, CONTEXT)))


# The inputs have the sizes of real data; their values do not change the cost of a step.
TASKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, Tensor]]]] = {
    "MNIST MLP": (mlp, lambda: images(1, 28)),
    "MNIST CNN": (cnn, lambda: images(1, 28)),
    "CIFAR-10 ResNet-8": (resnet8, lambda: images(3, 32)),
    "char transformer": (CharTransformer, text),
}


def training(output: Path) -> list[dict]:
    """Measures training steps, and returns a row for each task and optimizer.

    The values are medians of samples that are taken in turn. Denormal numbers count as 0, because a
    network that has memorized its batch has many, which slow down its own passes.
    """
    torch.set_flush_denormal(True)
    rows = []
    for task, (make_model, make_batch) in TASKS.items():
        x, y = make_batch()
        models = {name: make_model() for name in OPTIMIZERS}
        optimizers = {name: OPTIMIZERS[name](m.parameters()) for name, m in models.items()}

        def seconds(name: str, steps: int) -> float:
            start = time.perf_counter()
            for _ in range(steps):
                optimizers[name].zero_grad()  # noqa: B023
                nn.functional.cross_entropy(models[name](x), y).backward()  # noqa: B023
                optimizers[name].step()  # noqa: B023
            return (time.perf_counter() - start) / steps

        for name in models:
            seconds(name, WARM_UP)
        steps = {n: sample_steps(o, seconds(n, 1), SAMPLE) for n, o in optimizers.items()}
        samples = [{name: seconds(name, steps[name]) for name in models} for _ in range(REPEATS)]
        for name in models:
            ratios = [sample[name] / sample["Adam foreach"] for sample in samples]
            rows.append(
                {
                    "task": task,
                    "parameters": sum(p.numel() for p in models[name].parameters()),
                    "tensors": len(list(models[name].parameters())),
                    "optimizer": name,
                    "ms": 1e3 * statistics.median(sample[name] for sample in samples),
                    "ratio_to_adam_foreach": statistics.median(ratios),
                }
            )
    save(output, "throughput_training", rows, batch=BATCH)
    return rows


def peak_bytes(name: str, tensors: int) -> int:
    """Returns the peak memory of steps in this process, beyond parameters and gradients."""
    torch.set_num_threads(1)
    small = torch.ones(2, requires_grad=True)
    small.grad = torch.ones(2)
    OPTIMIZERS[name]([small]).step()  # loads modules that are imported late
    shape = (MEMORY // tensors // COLUMNS, COLUMNS)
    params = [torch.ones(shape, requires_grad=True) for _ in range(tensors)]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = OPTIMIZERS[name](params)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    for _ in range(3):
        optimizer.step()
    return _status("VmHWM") - before


def _status(entry: str) -> int:
    """Returns an entry of Linux's status of this process in bytes."""
    return 1024 * int(re.search(rf"{entry}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def memory(output: Path) -> list[dict]:
    """Measures memory, with a process and a row for each optimizer and number of tensors."""
    rows = []
    for tensors in (1, 100):
        for name in OPTIMIZERS:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                peak = pool.apply(peak_bytes, (name, tensors))
            rows.append(
                {
                    "optimizer": name,
                    "parameters": MEMORY,
                    "tensors": tensors,
                    "peak_bytes_per_parameter": peak / MEMORY,
                }
            )
    save(output, "throughput_memory", rows)
    return rows


PARTS: dict[str, Callable[[Path], list[dict]]] = {"training": training, "memory": memory}
