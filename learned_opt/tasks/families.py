"""Families of tasks: distributions from which meta-training draws."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from learned_opt.errors import ConfigError
from learned_opt.tasks.base import generator
from learned_opt.tasks.data import load_images
from learned_opt.tasks.mlp import ACTIVATIONS, MLPTask, TaskConfig


@dataclass(frozen=True)
class FamilyConfig:
    """Random MLPs on one image set; a draw is `num_tasks` tasks of one shape.

    Attributes:
        data: the image set, see TaskConfig.
        num_tasks: tasks per draw; they differ in init, input map and what labels are called.
        hidden_layers: least and most hidden layers.
        width: least and most units of a hidden layer, log-uniform.
        activations: one of these, uniformly.
        batch_sizes: one of these, uniformly.
        input_sizes: to one of these sizes a random linear map takes the images, scaled to keep
            the pixels' mean square.
        projection_probability: share of draws with such a map.
        log10_init_scale: initial weights are multiplied by 10^U(low, high).
        log10_input_scale: inputs are multiplied by 10^U(low, high), one number a task: curvature
            goes with its square and with the number of inputs, so that large scales stand in for
            inputs wider than can be trained on.
        input_noise: every minibatch's inputs get fresh Gaussian noise of a standard deviation
            U(low, high) (the data's is 1): no network can learn such tasks by heart, so gradients
            stay noisy as they do on data sets larger than digits.
        noise_probability: share of draws with such noise.
    """

    data: str = "digits"
    num_tasks: int = 8
    hidden_layers: tuple[int, int] = (1, 3)
    width: tuple[int, int] = (8, 48)
    activations: tuple[str, ...] = ("relu", "tanh", "sigmoid", "gelu")
    batch_sizes: tuple[int, ...] = (16, 64, 128)
    input_sizes: tuple[int, ...] = (16, 64, 128, 512)
    projection_probability: float = 0.7
    log10_init_scale: tuple[float, float] = (-0.2, 0.2)
    log10_input_scale: tuple[float, float] = (0.0, 0.0)
    input_noise: tuple[float, float] = (0.2, 1.0)
    noise_probability: float = 0.0

    def __post_init__(self) -> None:
        for name in (
            "hidden_layers",
            "width",
            "log10_init_scale",
            "log10_input_scale",
            "input_noise",
        ):
            low, high = getattr(self, name)
            if low > high:
                raise ConfigError(f"{name}=({low}, {high}): give the lower bound first")
        if unknown := set(self.activations) - set(ACTIVATIONS):
            raise ConfigError(f"activations={sorted(unknown)}; use some of {list(ACTIVATIONS)}")
        sizes = {
            "num_tasks": (self.num_tasks,),
            "width": self.width,
            "batch_sizes": self.batch_sizes,
            "input_sizes": self.input_sizes,
        }
        for name, values in sizes.items():
            if not values or min(values) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; use at least 1")
        if self.hidden_layers[0] < 0 or self.input_noise[0] < 0 or not self.activations:
            raise ConfigError(
                f"hidden_layers={self.hidden_layers} and input_noise={self.input_noise} must not "
                f"be negative, activations={self.activations} not be empty"
            )
        for name in ("projection_probability", "noise_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; use 0 to 1")


def sample_tasks(
    family: FamilyConfig,
    key: tuple[object, ...],
    data_root: str | Path | None = None,
    device: torch.device | str = "cpu",
) -> MLPTask:
    """The tasks of `key`: the same key gives the same tasks, on any machine."""
    rng = generator("family", *key)

    def uniform(low: float, high: float, size: tuple[int, ...] = ()) -> Tensor:
        return low + (high - low) * torch.rand(size, generator=rng)

    def choice(options: tuple) -> object:
        return options[int(torch.randint(len(options), (), generator=rng))]

    data = load_images(family.data, data_root)
    layers = choice(tuple(range(family.hidden_layers[0], family.hidden_layers[1] + 1)))
    low, high = torch.tensor(family.width).float().log().tolist()
    config = TaskConfig(
        data=family.data,
        hidden=tuple(round(float(uniform(low, high).exp())) for _ in range(layers)),
        activation=choice(family.activations),
        batch_size=choice(family.batch_sizes),
    )
    n, pixels = family.num_tasks, data.train_x.shape[1]
    projections = None
    if float(uniform(0, 1)) < family.projection_probability:
        inputs = choice(family.input_sizes)
        projections = torch.randn(n, pixels, inputs, generator=rng) * pixels**-0.5
    labels = torch.stack([torch.randperm(data.num_classes, generator=rng) for _ in range(n)])
    scales = 10 ** uniform(*family.log10_init_scale, (n,))
    noise = None
    if float(uniform(0, 1)) < family.noise_probability:
        noise = uniform(*family.input_noise, (n,))
    if any(family.log10_input_scale):
        if projections is None:
            projections = torch.eye(pixels).expand(n, -1, -1)
        projections = projections * 10 ** uniform(*family.log10_input_scale, (n, 1, 1))
    return MLPTask(config, data, n, projections, labels, scales, noise, device)
