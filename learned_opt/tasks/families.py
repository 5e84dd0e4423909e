"""Families of tasks: the distributions from which meta-training draws."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from geodesic.finite import check_finite
from learned_opt.errors import ConfigError
from learned_opt.tasks.augment import RescaledTask, equal_gradients
from learned_opt.tasks.base import Task, generator, uniform
from learned_opt.tasks.kinds import ACTIVATIONS, KINDS, Draw, TaskConfig, check_kind, make_task


@dataclass(frozen=True)
class FamilyConfig:
    """A distribution of tasks, by default MLPs on one image set.

    A draw is `num_tasks` tasks of one shape. Sizes, batch sizes and init scales are given for MLPs.
    The docstring of each other kind's class says what it makes of them. Input maps, input scales
    and input noise are for MLPs only.

    Attributes:
        data: The image set, see TaskConfig.
        num_tasks: The number of tasks in a draw. They differ in their initial weights, in their
            input maps and in a permutation of the class labels.
        hidden_layers: The least and the largest number of hidden layers.
        width: The least and the largest number of units of a hidden layer, drawn log-uniformly.
        activations: Activations, of which one is drawn.
        batch_sizes: Batch sizes, of which one is drawn.
        input_sizes: Sizes, of which one is drawn. A random linear map projects the images to this
            size and keeps the mean square of the pixels.
        projection_probability: The share of draws whose images are projected, see input_sizes.
        log10_init_scale: The initial weights are multiplied by 10^u, with u uniform between these
            bounds.
        log10_input_scale: The inputs of each task are multiplied by 10^u, with u uniform between
            these bounds. Curvature grows with the square of the scale and with the number of
            inputs, so small inputs on a large scale can stand in for wide ones, which are too
            expensive to train on.
        input_noise: The bounds of the standard deviation of the Gaussian noise that is added to the
            inputs of every minibatch (the data's is 1). No network can memorize such a task, so
            gradients stay noisy, as on data sets larger than digits.
        noise_probability: The share of draws with noise on the inputs, see input_noise.
        kinds: The kinds of task with their relative frequencies, see TaskConfig.
        text: The text of language models, see TaskConfig. For "markov" each draw has its own chain.
        train_sizes: Numbers of training examples, of which one, n, is drawn. The first n examples
            are used; by default all are.
        log10_reparametrization: The optimizer is given θ/s instead of θ, with s = 10^u and u
            uniform between these bounds.
        reparametrize: Whether s is drawn for each "tensor" or for each "task".
        equalize_gradients: Whether the losses are scaled so that the initial gradients of all tasks
            of a draw have the same norm. Use it for rules whose inputs are unnormalized gradients,
            and if the losses of several tasks are summed without weights. geodesic_rnn does not
            need it.
        task: A task to use in every draw instead of random ones. Then only its initial weights and
            its minibatches are random, and the random parts of its kind, such as W and y of
            quadratics.
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
    kinds: dict[str, float] = field(default_factory=lambda: {"mlp": 1.0})
    text: str = "markov"
    train_sizes: tuple[int, ...] = ()
    log10_reparametrization: tuple[float, float] = (0.0, 0.0)
    reparametrize: str = "tensor"
    equalize_gradients: bool = False
    task: TaskConfig | None = None

    def __post_init__(self) -> None:
        check_finite(self, ConfigError)
        for name in (
            "hidden_layers",
            "width",
            "log10_init_scale",
            "log10_input_scale",
            "input_noise",
            "log10_reparametrization",
        ):
            low, high = getattr(self, name)
            if low > high:
                raise ConfigError(f"{name} is ({low}, {high}); give the lower bound first")
        if unknown := set(self.activations) - set(ACTIVATIONS):
            raise ConfigError(f"activations has {sorted(unknown)}; use some of {list(ACTIVATIONS)}")
        sizes = {
            "num_tasks": (self.num_tasks,),
            "width": self.width,
            "batch_sizes": self.batch_sizes,
            "input_sizes": self.input_sizes,
            "train_sizes": self.train_sizes or (1,),
        }
        for name, values in sizes.items():
            if not values or min(values) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; use at least 1")
        if self.hidden_layers[0] < 0 or self.input_noise[0] < 0 or not self.activations:
            raise ConfigError(
                f"hidden_layers={self.hidden_layers} and input_noise={self.input_noise} must not "
                f"be negative, and activations={self.activations} must not be empty"
            )
        for name in ("projection_probability", "noise_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; use a number from 0 to 1")
        for kind in self.kinds:
            check_kind(kind, "kinds")
        weights = self.kinds.values()
        if not all(w >= 0 for w in weights) or not any(weights):
            raise ConfigError(
                f"kinds={self.kinds} must have weights of at least 0, and one above 0"
            )
        if self.reparametrize not in ("tensor", "task"):
            raise ConfigError(f"reparametrize is {self.reparametrize!r}; use 'tensor' or 'task'")


def sample_tasks(
    family: FamilyConfig,
    key: tuple[object, ...],
    data_root: str | Path | None = None,
    device: torch.device | str = "cpu",
) -> Task:
    """Returns the tasks of a draw. The same `key` gives the same tasks on any machine."""
    rng = generator("family", *key)
    if family.task is not None:
        draw = Draw(family.num_tasks, rng, device=device)
        task = make_task(family.task, data_root, draw)
    else:
        task = KINDS[_kind(family, key)].sample(family, rng, data_root, device)
    if not any(family.log10_reparametrization) and not family.equalize_gradients:
        return task
    tensors, rng = len(task.shapes), generator("reparametrization", *key)
    size = (family.num_tasks, tensors if family.reparametrize == "tensor" else 1)
    scales = 10 ** uniform(rng, *family.log10_reparametrization, size).expand(-1, tensors)
    rescaled = RescaledTask(task, scales)
    if family.equalize_gradients:
        rescaled = RescaledTask(task, scales, equal_gradients(rescaled))
    return rescaled


def shard_key(seed: int, index: int) -> tuple[object, ...]:
    """Returns the key of the tasks of a shard of target paths."""
    return "train", seed, index


def _kind(family: FamilyConfig, key: tuple[object, ...]) -> str:
    """Returns the kind of the draw `key`; kinds are drawn with their relative frequencies."""
    names, weights = zip(*sorted(family.kinds.items()), strict=True)
    rng = generator("kind", *key)
    return names[int(torch.multinomial(torch.tensor(weights).double(), 1, generator=rng))]
