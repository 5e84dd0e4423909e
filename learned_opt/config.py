"""The configs of the commands: documented, validated dataclasses, filled from YAML."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from geodesic.finite import check_finite
from geodesic.targets import TargetConfig
from learned_opt.errors import ConfigError
from learned_opt.tasks.families import FamilyConfig

# Of the rule's own runs, window by window.
RUN_OBJECTIVES = ("meta_loss", "backprop", "pes", "step_size")
OBJECTIVES = ("imitation", "torch_imitation", *RUN_OBJECTIVES)
# Element-wise ones: for them many tasks' parameters in one tensor are as good as apart.
TEACHERS = ("Adadelta", "Adagrad", "Adam", "Adamax", "AdamW", "NAdam", "RAdam", "RMSprop", "Rprop",
            "SGD")  # fmt: skip
# Adam moves each meta-parameter by up to its rate an update, and they begin at about 1 or less.
LARGEST_RATE = 1.0


@dataclass(frozen=True)
class GeodesicsConfig:
    """SGD runs of a family of tasks, and target paths made of them: `learned-opt geodesics`.

    Attributes:
        family: the tasks.
        targets: pairs, level and target updates.
        num_shards: draws from the family, one shard each.
        evaluation_size: training examples in the fixed F of level and certificate.
        seed: of everything random.
        data_root: where data sets lie; by default $LEARNED_OPT_DATA.
    """

    family: FamilyConfig = field(default_factory=FamilyConfig)
    targets: TargetConfig = field(default_factory=TargetConfig)
    num_shards: int = 96
    evaluation_size: int = 256
    seed: int = 0
    data_root: str | None = None

    def __post_init__(self) -> None:
        check_finite(self, ConfigError)
        if self.num_shards < 1 or self.evaluation_size < 1:
            raise ConfigError(
                f"num_shards={self.num_shards} and evaluation_size={self.evaluation_size} "
                "must be at least 1"
            )

    def smoke(self) -> GeodesicsConfig:
        """The same, shrunk to seconds."""
        targets = replace(self.targets, horizon=20, updates=4, stride=10, num_segments=8)
        family = replace(self.family, num_tasks=2)
        return replace(self, family=family, targets=targets, num_shards=2, evaluation_size=64)


@dataclass(frozen=True)
class TeacherConfig:
    """A torch optimizer to imitate.

    Attributes:
        optimizer: its name in torch.optim.
        lr: its learning rate.
        options: more of its arguments.
        steps: K, its steps that one update of the rule is to make.
        length: updates of the rule per sequence.
    """

    optimizer: str = "Adam"
    lr: float = 0.003
    options: dict[str, Any] = field(default_factory=dict)
    steps: int = 1
    length: int = 100

    def __post_init__(self) -> None:
        check_finite(self, ConfigError)
        if self.optimizer not in TEACHERS:
            raise ConfigError(
                f"teacher.optimizer is {self.optimizer!r}; use one of {', '.join(TEACHERS)}"
            )
        if self.steps < 1 or self.length < 1:
            raise ConfigError(
                f"teacher.steps={self.steps} and teacher.length={self.length} must be at least 1"
            )
        try:
            self.make(torch.zeros(1, requires_grad=True))
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"teacher: torch.optim.{self.optimizer} refuses lr={self.lr}, {self.options} "
                f"({error}); see its documentation for options"
            ) from None

    def make(self, theta: Tensor) -> torch.optim.Optimizer:
        return getattr(torch.optim, self.optimizer)([theta], lr=self.lr, **self.options)


@dataclass(frozen=True)
class PESConfig:
    """Persistent evolution strategies.

    Attributes:
        sigma: standard deviation of the perturbations of the meta-parameters.
        particles: antithetic pairs for each task.
    """

    sigma: float = 0.01
    particles: int = 1

    def __post_init__(self) -> None:
        check_finite(self, ConfigError)
        if self.sigma <= 0 or self.particles < 1:
            raise ConfigError(
                f"pes.sigma={self.sigma} must be positive, pes.particles={self.particles} at "
                "least 1; usual are 0.01 and 1"
            )


@dataclass(frozen=True)
class StepSizeConfig:
    """Evolution strategies on the sizes of steps.

    Attributes:
        sigma: standard deviation of what is added to the logarithm of a tensor's step.
        together: windows after which the two particles of a pair start from one point again; a
            step is judged by so many windows, or as few as one, if it is made late in them.
        common: share of its variance that all tensors of a network have in common.
        pace: each run's steps are all made e^U(low, high) times as long.
        mixture: standard deviation of what is added to the gains of all tensors, in units of their
            norm; 0: what steps are mixed of is left alone. For rules with gains per tensor.
    """

    sigma: float = 0.2
    together: int = 10
    common: float = 0.0
    pace: tuple[float, float] = (0.0, 0.0)
    mixture: float = 0.0

    def __post_init__(self) -> None:
        check_finite(self, ConfigError)
        if self.mixture < 0:
            raise ConfigError(f"step_size.mixture is {self.mixture}; use 0 for none, or e.g. 0.2")
        if self.pace[0] > self.pace[1]:
            raise ConfigError(f"step_size.pace is {self.pace}; give the lower bound first")
        if not 0 <= self.common < 1:
            raise ConfigError(f"step_size.common is {self.common}; use 0 or more, and less than 1")
        if self.sigma <= 0 or self.together < 1:
            raise ConfigError(
                f"step_size.sigma={self.sigma} must be positive, step_size.together="
                f"{self.together} at least 1; usual are 0.2 and 10"
            )


@dataclass(frozen=True)
class CurriculumConfig:
    """Runs whose length grows when validation at the next length no longer improves.

    Attributes:
        lengths: rising; steps of the runs of each stage.
        patience: validations without a better score after which a stage is over.
    """

    lengths: tuple[int, ...] = (50, 100, 200, 400, 800)
    patience: int = 2

    def __post_init__(self) -> None:
        check_finite(self, ConfigError)
        rising = all(a < b for a, b in pairwise(self.lengths))
        if not self.lengths or self.lengths[0] < 1 or not rising:
            raise ConfigError(
                f"curriculum.lengths={self.lengths} must rise from at least 1, as [50, 100, 200]"
            )
        if self.patience < 1:
            raise ConfigError(f"curriculum.patience is {self.patience}; use at least 1")


@dataclass(frozen=True)
class TrainConfig:
    """Meta-training of a rule on target paths and on its own runs: `learned-opt train`.

    Attributes:
        rule: registered name of the update rule.
        rule_config: its constructor's arguments.
        geodesics: the data set of target paths, made first where it is missing.
        dataset: a folder of target paths to use; by default `geodesics` in the output folder.
        start_from: weights to begin with: "shipped", or the path of a weights file, of this rule or
            of the base that it wears; null: freshly initialised.
        first: settings of a first stage that differ from these; a part that is named, such as
            `family`, is replaced whole. It is trained in `first` of the
            output folder, on one device, and then its weights are what training begins with.
        frozen: beginnings of the names of meta-parameters that stay as they are, such as ["base."].
        objectives: what the updates train, in turn: "imitation" of geodesics, "torch_imitation"
            of a torch optimizer; and the loss of the rule's own runs, "meta_loss" by replay,
            "backprop" through the unroll, "pes" by evolution strategies on the meta-parameters and
            "step_size" on how long steps are and what they are mixed of.
        updates: meta-updates in all.
        epoch_length: meta-updates between validations and checkpoints.
        learning_rate: of Adam; falls linearly to 5 %.
        clip: largest norm of a meta-gradient.
        average: decay of an exponential moving average of the meta-parameters over the updates,
            which is then what is validated, selected and written; null is none.
        coordinates: coordinates that a meta-update learns from, where the rule does not have
            gains per tensor, which allow for all.
        teacher_share: share of imitation sequences driven by the teacher, at the start and
            from half way on; (1, 1) is off policy throughout.
        imitation_weight: multiplies the imitation losses before their gradient is clipped, at the
            start and at the end: most weight to what is robust first, to what is fast later.
        weights: the same for any objective, by its name; 1 where nothing is said.
        imitation_form: "huber", of the error relative to the teacher's step, or "cosine", of
            direction and size apart.
        teacher: of torch_imitation.
        window: updates per window of a run; states are carried from one to the next.
        horizon: least and most steps of a run, log-uniform.
        curriculum: lengths of runs in place of `horizon`, and of the validation runs.
        open_runs: runs under way at once, so that long ones do not crowd out others.
        loss_floor: tasks weigh 1 / (mean loss of the window + loss_floor).
        loss_clip: losses of runs count as at most so many times that of chance; null is no clip.
        first_order: whether backprop takes what the rule sees as given; if not, second
            derivatives of the loss go in, which takes a rule that can be differentiated.
        pes, step_size: of the objectives of these names.
        family: tasks of the rule's own runs; by default those of `geodesics`.
        validation_steps: length of the validation runs, after each epoch.
        validation_draws: draws of the family to validate on, of `num_tasks` tasks each. Training
            never draws them, and no benchmark reports them.
        select: what weights.safetensors gets: the "best" weights by the score below, or the "last".
        selection_interval: epochs between candidates for the best; the last epoch is one too. Each
            is run on all validation draws for as many steps as the longest run of training, and
            on the draw with the fewest parameters for ten times as many. The score is the mean of
            the two mean log10(final loss + loss_floor): half how low the loss gets, half whether
            it stays there far past the horizon. See training/callbacks.py.
        seed: of everything random but the data set.
        accelerator: Lightning's, as are the next four: "cpu", "gpu", "auto".
        devices: processes or GPUs per node.
        num_nodes: machines.
        strategy: "ddp" for several devices.
        precision: "32-true", or "bf16-mixed": matrix products in bfloat16, all else in float32.
        logger: "csv" or "wandb".
    """

    rule: str = "geodesic_rnn"
    rule_config: dict[str, Any] = field(default_factory=dict)
    start_from: str | None = None
    first: dict[str, Any] | None = None
    frozen: tuple[str, ...] = ()
    geodesics: GeodesicsConfig = field(default_factory=GeodesicsConfig)
    dataset: str | None = None
    objectives: tuple[str, ...] = ("imitation", "meta_loss", "meta_loss")
    updates: int = 900
    epoch_length: int = 60
    learning_rate: float = 3e-3
    clip: float = 1.0
    average: float | None = None
    coordinates: int = 2400
    teacher_share: tuple[float, float] = (1.0, 0.3)
    imitation_weight: tuple[float, float] = (0.15, 0.02)
    weights: dict[str, tuple[float, float]] = field(default_factory=dict)
    imitation_form: str = "huber"
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    window: int = 20
    horizon: tuple[int, int] = (20, 800)
    curriculum: CurriculumConfig | None = None
    open_runs: int = 5
    loss_floor: float = 0.003
    loss_clip: float | None = None
    first_order: bool = True
    pes: PESConfig = field(default_factory=PESConfig)
    step_size: StepSizeConfig = field(default_factory=StepSizeConfig)
    family: FamilyConfig | None = None
    validation_steps: int = 200
    validation_draws: int = 3
    select: str = "best"
    selection_interval: int = 5
    seed: int = 0
    accelerator: str = "cpu"
    devices: int | str = 1
    num_nodes: int = 1
    strategy: str = "auto"
    precision: str = "32-true"
    logger: str = "csv"

    def __post_init__(self) -> None:
        if not self.objectives or set(self.objectives) - set(OBJECTIVES):
            raise ConfigError(f"objectives={self.objectives}; use some of {OBJECTIVES}")
        for name in ("updates", "epoch_length", "coordinates", "window", "open_runs",
                     "validation_steps", "validation_draws", "selection_interval"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; use at least 1")
        if not all(x > 0 for x in (self.learning_rate, self.clip, self.loss_floor)):
            raise ConfigError(
                f"learning_rate={self.learning_rate}, clip={self.clip} and "
                f"loss_floor={self.loss_floor} must be positive"
            )
        check_finite(self, ConfigError)
        if self.learning_rate > LARGEST_RATE:
            raise ConfigError(
                f"learning_rate is {self.learning_rate}; use at most {LARGEST_RATE:g}, usual are "
                "0.001 to 0.003"
            )
        weights = {"imitation_weight": self.imitation_weight}
        weights |= {f"weights.{name}": pair for name, pair in self.weights.items()}
        for name, pair in weights.items():
            if min(pair) < 0:
                raise ConfigError(
                    f"{name} is {pair}; use 0 or more at the start and at the end (below 0 the "
                    "objective would be unlearned)"
                )
        if not all(0 <= share <= 1 for share in self.teacher_share):
            raise ConfigError(f"teacher_share is {self.teacher_share}; use two shares in [0, 1]")
        if self.updates % self.epoch_length:
            raise ConfigError(
                f"updates={self.updates} is not a multiple of epoch_length={self.epoch_length}"
            )
        if self.logger not in ("csv", "wandb"):
            raise ConfigError(f"logger is {self.logger!r}; use 'csv' or 'wandb'")
        if self.select not in ("best", "last"):
            raise ConfigError(f"select is {self.select!r}; use 'best' or 'last'")
        if self.precision not in ("32-true", "bf16-mixed"):
            raise ConfigError(
                f"precision is {self.precision!r}; use '32-true' or 'bf16-mixed' (float16 would "
                "overflow on tasks that diverge)"
            )
        if self.imitation_form not in ("huber", "cosine"):
            raise ConfigError(f"imitation_form is {self.imitation_form!r}; use 'huber' or 'cosine'")
        if unused := set(self.weights) - set(self.objectives):
            raise ConfigError(
                f"weights has {sorted(unused)}, objectives is {self.objectives}; name one of these"
            )
        if self.average is not None and (not 0 < self.average < 1 or self.curriculum):
            raise ConfigError(
                f"average is {self.average}; use a decay below 1 such as 0.99, and no curriculum, "
                "which goes back to weights that were not averaged"
            )
        if self.loss_clip is not None and self.loss_clip <= 0:
            raise ConfigError(f"loss_clip is {self.loss_clip}; use e.g. 1.5, or null for none")
        self._check_runs()

    def _check_runs(self) -> None:
        if not 1 <= self.horizon[0] <= self.horizon[1]:
            raise ConfigError(f"horizon={self.horizon}: give two steps, the lower first")
        runs = set(self.objectives) & set(RUN_OBJECTIVES)
        if self.curriculum and not runs:
            raise ConfigError(
                f"curriculum is of the rule's own runs, objectives={self.objectives} has none; "
                f"add one of {RUN_OBJECTIVES}, or leave the curriculum out"
            )
        name, shortest = "horizon", self.horizon[0]
        if self.curriculum:
            name, shortest = "curriculum.lengths", self.curriculum.lengths[0]
        if runs and shortest < self.window:
            raise ConfigError(
                f"{name} starts at {shortest}, shorter than window={self.window}; use a window of "
                f"at most {shortest}, or longer runs"
            )

    @property
    def longest_run(self) -> int:
        """Steps of the longest runs that the rule is trained on."""
        return self.curriculum.lengths[-1] if self.curriculum else self.horizon[1]

    def weight_of(self, objective: str) -> tuple[float, float]:
        """What multiplies the loss of an objective, at the start and at the end."""
        given = self.imitation_weight if objective.endswith("imitation") else (1.0, 1.0)
        return self.weights.get(objective, given)

    def smoke(self) -> TrainConfig:
        """The same, shrunk to seconds."""
        every = max(1, self.rule_config.get("every", 1))
        window = -(-4 // every) * every  # which have to begin with a look
        return replace(
            self,
            geodesics=self.geodesics.smoke(),
            family=replace(self.family or self.geodesics.family, num_tasks=2),
            updates=2 * len(self.objectives),
            epoch_length=len(self.objectives),
            coordinates=200,
            teacher=replace(self.teacher, length=5),
            horizon=(window, window + 6),
            curriculum=self.curriculum and CurriculumConfig((window, 2 * window), patience=1),
            window=window,
            open_runs=2,
            validation_steps=5,
        )
