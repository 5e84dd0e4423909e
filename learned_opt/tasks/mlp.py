"""Multi-layer perceptrons on labelled images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from learned_opt.tasks.base import Batch, Task, choice, generator, log_uniform, uniform
from learned_opt.tasks.data import ImageData, load_images
from learned_opt.tasks.kinds import ACTIVATIONS, SINGLE, Draw, NoOptions, TaskConfig, register

if TYPE_CHECKING:
    from learned_opt.tasks.families import FamilyConfig

# These map the gradient in a = φ(z) to that in z, with the formulas that autograd uses.
BACKWARD: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "relu": lambda grad, z, a: torch.ops.aten.threshold_backward(grad, a, 0),
    "tanh": lambda grad, z, a: torch.ops.aten.tanh_backward(grad, a),
    "sigmoid": lambda grad, z, a: torch.ops.aten.sigmoid_backward(grad, a),
    "gelu": lambda grad, z, a: torch.ops.aten.gelu_backward(grad, z),
}


@register("mlp")
class MLPTask(Task):
    """The cross-entropy of x -> W_L φ(… φ(W_1 x + b_1) …) + b_L, with W_l of shape (out, in).

    Args:
        config: architecture, batch size and initialization.
        data: the images.
        num_tasks: the number of tasks evaluated together, or None for a single task.
        projections: a linear map of each task's images, (tasks, pixels, inputs).
        labels: each task's own numbers of the classes, (tasks, classes).
        init_scales: factors of the initial weights of each task, (tasks,).
        noise: the standard deviation of Gaussian noise on the inputs of each minibatch, (tasks,).
        device: the device of theta and of the data. Random numbers are drawn on the CPU, so that a
            key gives the same numbers on every device.
    """

    Options: type = NoOptions
    unused: tuple[str, ...] = ()

    def __init__(
        self,
        config: TaskConfig,
        data: ImageData,
        num_tasks: int | None = None,
        projections: Tensor | None = None,
        labels: Tensor | None = None,
        init_scales: Tensor | None = None,
        noise: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        n, m = config.train_size, config.test_size
        tensors = (data.train_x[:n], data.train_y[:n], data.test_x[:m], data.test_y[:m])
        moved = (t.to(device) for t in tensors)
        self._train_x, self._train_y, self._test_x, self._test_y = moved
        self.config, self.num_tasks, self.device = config, num_tasks, device
        self._activation = ACTIVATIONS[config.activation]
        self._activation_backward = BACKWARD[config.activation]
        self._projections, self._labels, self._noise = (
            t if t is None else t.to(device) for t in (projections, labels, noise)
        )
        self._init_scales = torch.ones(self.lead) if init_scales is None else init_scales
        inputs = data.train_x.shape[1] if projections is None else projections.shape[-1]
        sizes = (inputs, *config.hidden, data.num_classes)
        self.name = config.name or "{} {} {}".format(
            data.name, "-".join(map(str, sizes)), config.activation
        )
        self.shapes = tuple(shape for i, o in pairwise(sizes) for shape in ((o, i), (o,)))
        self.chance = math.log(data.num_classes)
        self._train = self._view(self._train_x, self._train_y)

    @classmethod
    def make(
        cls, config: TaskConfig, data_root: str | Path | None = None, draw: Draw = SINGLE
    ) -> MLPTask:
        """Returns the tasks that `config` describes."""
        data, labels = load_images(config.data, data_root), None
        if draw.rng is not None and draw.num_tasks is not None:
            (labels,) = draw.rename(torch.arange(data.num_classes), classes=data.num_classes)
        return cls(
            config,
            data,
            draw.num_tasks,
            labels=labels,
            init_scales=draw.init_scales,
            device=draw.device,
        )

    @classmethod
    def sample(
        cls,
        family: FamilyConfig,
        rng: torch.Generator,
        data_root: str | Path | None = None,
        device: torch.device | str = "cpu",
    ) -> MLPTask:
        """Returns `family.num_tasks` tasks of one random architecture."""
        data = load_images(family.data, data_root)
        layers = choice(rng, range(family.hidden_layers[0], family.hidden_layers[1] + 1))
        config = TaskConfig(
            data=family.data,
            hidden=tuple(log_uniform(rng, *family.width) for _ in range(layers)),
            activation=choice(rng, family.activations),
            batch_size=choice(rng, family.batch_sizes),
        )
        n, pixels = family.num_tasks, data.train_x.shape[1]
        projections = None
        if float(uniform(rng, 0, 1)) < family.projection_probability:
            inputs = choice(rng, family.input_sizes)
            projections = torch.randn(n, pixels, inputs, generator=rng) * pixels**-0.5
        labels = torch.stack([torch.randperm(data.num_classes, generator=rng) for _ in range(n)])
        scales = 10 ** uniform(rng, *family.log10_init_scale, (n,))
        noise = None
        if float(uniform(rng, 0, 1)) < family.noise_probability:
            noise = uniform(rng, *family.input_noise, (n,))
        if any(family.log10_input_scale):
            if projections is None:
                projections = torch.eye(pixels).expand(n, -1, -1)
            projections = projections * 10 ** uniform(rng, *family.log10_input_scale, (n, 1, 1))
        if family.train_sizes:
            config = replace(config, train_size=choice(rng, family.train_sizes))
        return cls(config, data, n, projections, labels, scales, noise, device)

    def _view(self, x: Tensor, y: Tensor) -> Batch:
        """Returns images and labels for the tasks: (n, …), or (tasks, n, …) if the tasks differ."""
        if self._projections is not None:
            x = x @ self._projections
        if self._labels is not None:
            y = self._labels[:, y]
        return x, y

    def _take(self, index: Tensor) -> Batch:
        """Returns the training examples at `index` (*tasks, n)."""
        rows = torch.arange(self.num_tasks)[:, None] if self.num_tasks is not None else None
        x, y = self._train
        return (
            x[index] if self._projections is None else x[rows, index],
            y[index] if self._labels is None else y[rows, index],
        )

    def init(self, seed: int) -> Tensor:
        rng = generator("init", seed)
        bounds = (shape[1] ** -0.5 for shape in self.shapes[::2] for _ in "Wb")
        parts = []
        for shape, bound in zip(self.shapes, bounds, strict=True):
            if self.config.init == "torch":
                part = (torch.rand(*self.lead, *shape, generator=rng) * 2 - 1) * bound
            else:
                part = torch.randn(*self.lead, *shape, generator=rng) * 0.01
            if len(shape) > 1:
                part *= self._init_scales.reshape(*self.lead, 1, 1) * self.config.init_scale
            parts.append(part.flatten(len(self.lead)))
        return torch.cat(parts, dim=-1).to(self.device)

    def batch(self, seed: int, step: int) -> Batch:
        size, rng = (*self.lead, self.config.batch_size), generator("batch", seed, step)
        index = torch.randint(len(self._train_y), size, generator=rng)
        x, y = self._take(index.to(self.device))
        if self._noise is not None:
            scale = self._noise.reshape(*self.lead, 1, 1)
            x = x + scale * torch.randn(x.shape, generator=rng).to(self.device)
        return x, y

    def fixed_batch(self, size: int | None = None) -> Batch:
        index = torch.randperm(len(self._train_y), generator=generator("fixed"))[:size]
        return self._take(index.to(self.device).expand(*self.lead, -1))

    def logits(self, theta: Tensor | Sequence[Tensor], x: Tensor) -> Tensor:
        tensors = self.unflatten(theta) if isinstance(theta, Tensor) else list(theta)
        for i in range(0, len(tensors), 2):
            if i:
                x = self._activation(x)
            x = x @ tensors[i].mT + tensors[i + 1].unsqueeze(-2)
        return x

    def loss(self, theta: Tensor | Sequence[Tensor], batch: Batch) -> Tensor:
        x, y = batch
        log_p = self.logits(theta, x).log_softmax(-1)
        return -log_p.gather(-1, y.unsqueeze(-1)).squeeze(-1).mean(-1)

    def loss_and_grad(self, theta: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns F and its gradient as `Task` does, by explicit back-propagation.

        For small networks autograd's overhead is several times the cost of the network. Examples
        are the last dimension, because rows of ten classes would be too short to be fast.
        """
        if type(self).loss is not MLPTask.loss:  # a subclass's own loss
            return super().loss_and_grad(theta, batch)
        lead = theta.shape[:-1]
        x, y = (t.expand(*lead, *t.shape[len(self.lead) :]) for t in batch)
        x, y = x.flatten(0, len(lead) - 1) if lead else x[None], y.reshape(-1, 1, y.shape[-1])
        with torch.no_grad():
            parts = theta.reshape(len(y), -1).split([math.prod(s) for s in self.shapes], -1)
            tensors = [p.unflatten(-1, s) for p, s in zip(parts, self.shapes, strict=True)]
            weights, z, a = tensors[::2], [], [x.mT]
            for w, b in zip(weights, tensors[1::2], strict=True):
                if z:
                    a.append(self._activation(z[-1]))
                z.append(torch.baddbmm(b.unsqueeze(-1), w, a[-1]))
            log_p, grads = z[-1].log_softmax(-2), []
            loss = -log_p.gather(-2, y).mean((-2, -1))
            delta = log_p.exp_().scatter_add_(-2, y, log_p.new_full((), -1).expand(y.shape))
            delta /= y.shape[-1]
            for layer in reversed(range(len(z))):
                grads = [torch.bmm(delta, a[layer].mT).flatten(1), delta.sum(-1), *grads]
                if layer:
                    delta = torch.bmm(weights[layer].mT, delta)
                    delta = self._activation_backward(delta, z[layer - 1], a[layer])
        # Under autocast the products are bfloat16.
        return loss.view(lead), torch.cat(grads, -1).to(theta.dtype).view(theta.shape)

    def evaluate(self, theta: Tensor, chunk: int = 4096) -> dict[str, Tensor]:
        """Returns losses and accuracy on all data, in chunks of at most `chunk` examples."""
        with torch.no_grad():
            train, _ = self._score(theta, self._train_x, self._train_y, chunk)
            test, hits = self._score(theta, self._test_x, self._test_y, chunk)
        return {"train_loss": train, "test_loss": test, "test_accuracy": hits}

    def _score(self, theta: Tensor, x: Tensor, y: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
        total, hits = theta.new_zeros(self.lead), theta.new_zeros(self.lead)
        for cx, cy in zip(x.split(chunk), y.split(chunk), strict=True):
            vx, vy = self._view(cx, cy)
            log_p = self.logits(theta, vx).log_softmax(-1)
            vy = vy.expand(log_p.shape[:-1])
            total -= log_p.gather(-1, vy.unsqueeze(-1)).squeeze(-1).sum(-1)
            hits += (log_p.argmax(-1) == vy).sum(-1)
        return total / len(y), hits / len(y)
