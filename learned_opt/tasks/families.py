"""Families of tasks: distributions from which meta-training draws."""

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
    """Random tasks, by default MLPs on one image set; a draw is `num_tasks` tasks of one shape.

    Sizes, batches and init scales are those of MLPs; what other kinds make of them, their classes
    say. Input maps, input scales and noise are for MLPs only.

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
        kinds: of task, and how often each is drawn, as weights; see TaskConfig.
        text: of language models, see TaskConfig; "markov" is another chain in each draw.
        train_sizes: train on the first so many examples, one of these; by default on all.
        log10_reparametrization: the optimizer sees θ/s, s = 10^U(low, high).
        reparametrize: one s for each "tensor" or each "task".
        equalize_gradients: multiply each task's loss so that the initial gradients of a draw have
            one norm. For rules that see unnormalised gradients, and for losses of several tasks
            that are summed unweighted; geodesic_rnn divides the scale out by itself.
        task: every draw is of this task, in place of random ones: what is left to chance are
            inits, minibatches and what the task's kind draws, as W and y of quadratics.
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
                raise ConfigError(f"{name}=({low}, {high}): give the lower bound first")
        if unknown := set(self.activations) - set(ACTIVATIONS):
            raise ConfigError(f"activations={sorted(unknown)}; use some of {list(ACTIVATIONS)}")
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
                f"be negative, activations={self.activations} not be empty"
            )
        for name in ("projection_probability", "noise_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; use 0 to 1")
        for kind in self.kinds:
            check_kind(kind, "kinds")
        weights = self.kinds.values()
        if not all(w >= 0 for w in weights) or not any(weights):
            raise ConfigError(f"kinds={self.kinds}: weights must be at least 0, and one above it")
        if self.reparametrize not in ("tensor", "task"):
            raise ConfigError(f"reparametrize is {self.reparametrize!r}; use 'tensor' or 'task'")


def sample_tasks(
    family: FamilyConfig,
    key: tuple[object, ...],
    data_root: str | Path | None = None,
    device: torch.device | str = "cpu",
) -> Task:
    """The tasks of `key`: the same key gives the same tasks, on any machine."""
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


def _kind(family: FamilyConfig, key: tuple[object, ...]) -> str:
    """Of the draw `key`: each kind as often as its weight says."""
    names, weights = zip(*sorted(family.kinds.items()), strict=True)
    rng = generator("kind", *key)
    return names[int(torch.multinomial(torch.tensor(weights).double(), 1, generator=rng))]
