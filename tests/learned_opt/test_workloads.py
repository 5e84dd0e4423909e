"""Workloads: the contract of every kind, and known answers of some."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from learned_opt.errors import ConfigError
from learned_opt.run import run_optimizer
from learned_opt.tasks.base import generator
from learned_opt.tasks.families import FamilyConfig
from learned_opt.tasks.kinds import WORKLOADS, Draw, TaskConfig, make_task
from learned_opt.tasks.trainee import Parameters
from learned_opt.tasks.workloads import base, language, unusual
from learned_opt.tasks.workloads.texts import load_corpus

IMAGES = {"data": "pictures", "batch_size": 8, "train_size": 40, "test_size": 16}
TEXT = {"data": "text.txt", "batch_size": 4, "test_size": 6}
SHORT = {"context": 6, "vocabulary": 12}
MLP = {"kind": "image_mlp", **IMAGES, "hidden": (6,), "options": {"dropout": 0.2}}
CONFIGS = {
    "transformer_lm": TaskConfig(
        kind="transformer_lm", **TEXT, hidden=(16, 16), options={**SHORT, "dropout": 0.1}
    ),
    "llama": TaskConfig(
        kind="transformer_lm", **TEXT, hidden=(16,), options={**SHORT, "style": "llama"}
    ),
    "gru_lm": TaskConfig(kind="gru_lm", **TEXT, hidden=(8,), options={**SHORT, "dropout": 0.1}),
    "lstm_lm": TaskConfig(kind="lstm_lm", **TEXT, hidden=(8, 8), options={**SHORT, "tied": True}),
    "cbow": TaskConfig(kind="cbow", **TEXT, hidden=(8,), options={**SHORT, "level": "word"}),
    "image_mlp": TaskConfig(**MLP),
    "image_conv": TaskConfig(kind="image_conv", **IMAGES, hidden=(4, 6), options={"flip": True}),
    "image_resnet": TaskConfig(kind="image_resnet", **IMAGES, hidden=(4, 6), options={"shift": 1}),
    "image_vit": TaskConfig(kind="image_vit", **IMAGES, hidden=(8, 8), options={"dropout": 0.1}),
    "patch_autoencoder": TaskConfig(kind="patch_autoencoder", hidden=(8,), options={"noise": 0.3}),
    "graph": TaskConfig(kind="graph", hidden=(8,), options={"dropout": 0.1}),
    "regression": TaskConfig(kind="regression", data="breast_cancer", hidden=(8,), batch_size=16),
    "continued": TaskConfig(kind="continued", options={"base": MLP, "rank": 2}),
    "post_norm": TaskConfig(kind="post_norm", **TEXT, hidden=(8,), train_size=64),
    "bert": TaskConfig(
        kind="post_norm", **TEXT, hidden=(8,), options={"style": "bert", "goal": "order"}
    ),
    "seq2seq": TaskConfig(kind="seq2seq", hidden=(8,), train_size=64, test_size=16),
    "siren": TaskConfig(kind="siren", data="pictures", hidden=(8, 8), batch_size=16),
    "gan": TaskConfig(kind="gan", data="ring", hidden=(8,), batch_size=16),
    "adding": TaskConfig(kind="adding", hidden=(8,), train_size=64, options={"length": 6}),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text and a set of small pictures."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), 3)) for _ in range(30)]
    (folder / "text.txt").write_text(" ".join(rng.choice(words, 2000)))
    (folder / "pictures").mkdir()
    for split, n in (("train", 80), ("test", 20)):
        images = rng.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)
        np.savez(folder / "pictures" / split, images=images, labels=np.arange(n) % 4)
    return folder


@pytest.fixture(params=CONFIGS)
def workload(request: pytest.FixtureRequest, root: Path) -> base.Workload:
    return make_task(CONFIGS[request.param], root)


def losses(trainee, steps: int) -> list[float]:
    return [trainee.loss(step).item() for step in range(steps)]


def module_of(workload: base.Workload, trainee) -> nn.Module:
    """The module whose parameters `trainee` has."""
    cells = trainee.validate.__closure__
    return next(c.cell_contents for c in cells if isinstance(c.cell_contents, nn.Module))


def test_every_kind_is_tested_here() -> None:
    assert {config.kind for config in CONFIGS.values()} == set(WORKLOADS)


def test_everything_random_is_keyed(workload: base.Workload) -> None:
    torch.manual_seed(0)
    first = losses(workload.trainee(3), 3)
    torch.manual_seed(1)
    assert losses(workload.trainee(3), 3) == first
    assert losses(workload.trainee(4), 3) != first
    assert torch.initial_seed() == 1  # of the caller's random numbers nothing is changed


def test_an_evaluation_changes_nothing(workload: base.Workload) -> None:
    alone, watched = workload.trainee(0), workload.trainee(0)
    assert watched.validate(False) == watched.validate(False)  # and nothing in it is random
    watched.validate(True)
    watched.evaluate(True)
    assert losses(watched, 2) == losses(alone, 2)
    states = [module_of(workload, t).state_dict() for t in (alone, watched)]
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=0, atol=0)
    assert module_of(workload, watched).training


def test_an_evaluation_is_the_mean_whatever_the_chunks(workload, monkeypatch) -> None:
    whole = workload.trainee(0).evaluate(False)
    monkeypatch.setattr(base, "CHUNK", 5)
    assert workload.trainee(0).evaluate(False) == pytest.approx(whole, rel=1e-5, nan_ok=True)


def test_it_can_be_learned(workload: base.Workload) -> None:
    """AdamW lowers the training loss; of a game it only has to stay finite."""
    run = run_optimizer(workload, lambda p: torch.optim.AdamW(p, lr=3e-3), 0, 60, [0, 30, 60])
    assert not run.diverged and run.validation[:, 0].tolist() == [0, 30, 60]
    assert np.isfinite(run.validation).all()
    assert run.evaluation["validation_loss"] == run.validation[-1, 1]
    if workload.kind not in ("gan", "post_norm"):
        assert run.losses[-15:].mean() < run.losses[:15].mean()


def test_no_family_draws_a_workload(workload: base.Workload) -> None:
    with pytest.raises(ConfigError, match="is a kind for benchmarks only"):
        FamilyConfig(kinds={workload.kind: 1.0})
    with pytest.raises(ConfigError, match="cannot be batched"):
        make_task(workload.config, draw=Draw(2, torch.Generator()))


@pytest.mark.parametrize("kind", ["image_mlp", "regression", "seq2seq", "patch_autoencoder"])
def test_splits_share_no_example(kind: str, root: Path) -> None:
    data = make_task(CONFIGS[kind], root).data
    seen = {
        split: {tuple(x.flatten().tolist()) for x in inputs} for split, (inputs, _) in data.items()
    }
    if kind != "seq2seq":  # sequences are drawn with replacement, from many
        assert not seen["train"] & seen["test"] and not seen["validation"] & seen["test"]
    assert len(seen["train"] & seen["validation"]) <= (kind == "seq2seq")


@pytest.mark.parametrize("option", [
    {"kind": "image_mlp", "options": {"dropout": 1.0}},
    {"kind": "transformer_lm", "options": {"style": "bloom"}},
    {"kind": "gru_lm", "options": {"context": 0}},
    {"kind": "continued", "options": {}},
    {"kind": "continued", "options": {"base": MLP, "scale": math.inf}},
    {"kind": "continued", "options": {"base": MLP, "shift": "sideways"}},
    {"kind": "adding", "options": {"gain": math.nan}},
    {"kind": "graph", "options": {"hidden_share": 0.0}},
])  # fmt: skip
def test_wrong_options_are_refused(option: dict) -> None:
    with pytest.raises(
        ConfigError, match=[*option["options"]][-1:][0] if option["options"] else "base"
    ):
        TaskConfig(**option)


def test_a_corpus_has_its_splits_in_order(root: Path) -> None:
    text = (root / "text.txt").read_text()
    corpus = load_corpus("text.txt", root)
    assert [len(corpus.train), len(corpus.validation), len(corpus.test)] == pytest.approx(
        [0.8 * len(text), 0.1 * len(text), 0.1 * len(text)], abs=1
    )
    letters = {symbol: int(n) for symbol, n in zip(text, corpus.train, strict=False)}
    back = {n: symbol for symbol, n in letters.items()}
    assert "".join(back[int(n)] for n in corpus.test) == text[-len(corpus.test) :]
    ascii = load_corpus("text.txt", root, "ascii", 97)
    assert [int(n) for n in ascii.train[:5]] == [ord(c) - 30 for c in text[:5]]


def test_rotary_positions_only_tell_distances() -> None:
    q, k = torch.randn(2, 8, generator=generator("rotary"))
    turned = language.rotate(q.expand(9, 8)), language.rotate(k.expand(9, 8))
    products = turned[0] @ turned[1].T
    for distance in range(-8, 9):
        same = products.diagonal(distance)
        torch.testing.assert_close(same, same[:1].expand_as(same))
    assert products[0, 1] != products[0, 2]


def test_gpt2_init_and_kinds_of_tensor() -> None:
    config = TaskConfig(kind="transformer_lm", hidden=(64, 64), options={"tied": True})
    model = language.Transformer(64, 2, config.own, 90)
    language.gpt2_init(model, 2)
    params = Parameters.of(model)
    kinds = dict(zip(params.names, params.kinds, strict=True))
    assert [n for n, k in kinds.items() if k == "embedding"] == [
        "embedding.weight",
        "positions.weight",
    ]
    assert "head" not in kinds.values() and kinds["norm.weight"] == "vector"
    named = {name: p.detach() for name, p in model.named_parameters()}
    assert named["layers.0.mlp.0.weight"].std() == pytest.approx(0.02, rel=0.03)
    assert named["layers.0.mlp.2.weight"].std() == pytest.approx(0.01, rel=0.03)
    assert named["layers.1.attention.outputs.weight"].std() == pytest.approx(0.01, rel=0.05)
    untied = Parameters.of(language.Transformer(64, 1, replace(config.own, tied=False), 90))
    assert untied.names[untied.kinds.index("head")] == "head.weight"


def test_augmentation_moves_and_mirrors(root: Path) -> None:
    config = replace(CONFIGS["image_resnet"], options={"shift": 2})
    task = make_task(config, root)
    image = torch.zeros(64, 3, 8, 8)
    image[:, :, 3, 4] = 1.0
    moved = task.augment(image, generator("shift"))
    places = [tuple((x[0] == 1).nonzero()[0].tolist()) for x in moved]
    assert {y for y, _ in places} == {1, 2, 3, 4, 5} and {x for _, x in places} == {2, 3, 4, 5, 6}
    flipped = make_task(replace(config, options={"flip": True}), root).augment(
        image, generator("flip")
    )
    columns = {int((x[0] == 1).nonzero()[0, 1]) for x in flipped}
    assert columns == {4, 3}


def test_running_statistics_are_renewed_for_one_evaluation(root: Path) -> None:
    task = make_task(CONFIGS["image_conv"], root)
    trainee = task.trainee(0)
    module = module_of(task, trainee)
    norm = next(m for m in module.modules() if isinstance(m, nn.BatchNorm2d))
    before = norm.running_mean.clone()
    usual, renewed = trainee.validate(False), trainee.validate(True)
    assert usual != renewed
    torch.testing.assert_close(norm.running_mean, before, rtol=0, atol=0)
    assert norm.momentum == 0.1


def test_adapters_begin_as_the_pretrained_net_and_are_all_that_moves(root: Path) -> None:
    history = {"base": MLP, "pretrained": MLP, "pretraining_steps": 20}
    plain = make_task(TaskConfig(kind="continued", options=history), root)
    fresh = make_task(TaskConfig(**MLP), root)
    adapted = make_task(TaskConfig(kind="continued", options={**history, "rank": 2}), root)
    start = adapted.trainee(0).validate(False)
    assert start == pytest.approx(plain.trainee(0).validate(False), rel=1e-6)
    assert start != fresh.trainee(0).validate(False)
    trainee = adapted.trainee(0)
    before = [p.clone() for p in trainee.params]
    optimizer = torch.optim.SGD(trainee.params, lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        trainee.loss(step).backward()
        optimizer.step()
    moved = {n for n, p, b in zip(trainee.params.names, trainee.params, before, strict=True)
             if not torch.equal(p, b)}  # fmt: skip
    assert moved == {n for n in trainee.params.names if n.endswith((".a", ".b"))} != set()


def test_a_new_head_is_all_that_is_fresh(root: Path) -> None:
    history = {"base": MLP, "pretrained": MLP, "pretraining_steps": 20}
    tasks = [make_task(TaskConfig(kind="continued", options=history | more), root)
             for more in ({}, {"new_head": True})]  # fmt: skip
    old, new = (t.trainee(0).params for t in tasks)
    same = [n for n, a, b in zip(old.names, old, new, strict=True) if torch.equal(a, b)]
    assert set(old.names) - set(same) == set(old.names[-2:])


def test_frozen_layers_and_scaled_losses(root: Path) -> None:
    plain = make_task(TaskConfig(**MLP), root).trainee(0)
    options = {"base": MLP, "frozen": "1.", "change": 2, "scale": 0.5, "first_scale": 8.0}
    changed = make_task(TaskConfig(kind="continued", options=options), root).trainee(0)
    for step, factor in enumerate((1.0, 1.0, 4.0, 0.5)):
        loss = changed.loss(step)
        assert loss.item() == pytest.approx(factor * plain.loss(step).item(), rel=1e-6)
        for p in changed.params:
            p.grad = None
        loss.backward()
        have = [p.grad is not None for p in changed.params]
        assert have == [step >= 2, step >= 2, True, True]
    with pytest.raises(ConfigError, match="frozen is 'nothing'"):
        wrong = TaskConfig(kind="continued", options={"base": MLP, "frozen": "nothing"})
        make_task(wrong, root).trainee(0)


def test_the_two_nets_of_a_game_learn_from_their_own_losses(root: Path) -> None:
    task = make_task(CONFIGS["gan"], root)
    trainee = task.trainee(0)
    module = module_of(task, trainee)
    trainee.loss(0).backward()
    real, _ = task.batch(0, 0)
    fake = module.generator(task._noise(len(real), "noise", 0, 0))
    judged = nn.functional.softplus(-module.critic(fake)).mean()
    expected = torch.autograd.grad(judged, list(module.generator.parameters()))
    for p, grad in zip(module.generator.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad)


def test_energy_distance_of_two_normals() -> None:
    """2 E|X − Y| − E|X − X'| − E|Y − Y'| with E|N(m, 2)| in closed form."""
    rng = generator("energy")
    x, y = torch.randn(1500, 1, generator=rng), 2 + torch.randn(1500, 1, generator=rng)

    def mean(m: float) -> float:  # of |N(m, 2)|
        return 2 / math.sqrt(math.pi) * math.exp(-m * m / 4) + m * math.erf(m / 2)

    expected = 2 * mean(2.0) - 2 * mean(0.0)
    assert float(unusual.energy_distance(x, y)) == pytest.approx(expected, rel=0.05)
    same = unusual.energy_distance(x[:700], x[700:1400])
    assert abs(float(same)) < 0.02


def test_the_sum_of_the_marked_numbers(root: Path) -> None:
    task = make_task(replace(CONFIGS["adding"], options={"length": 6, "marked": 3}), root)
    x, y = task.data["train"]
    assert (x[..., 1].sum(1) == 3).all()
    torch.testing.assert_close((x[..., 0] * x[..., 1]).sum(1, keepdim=True), y)
    assert y.std() == pytest.approx(1.0, abs=0.2)
