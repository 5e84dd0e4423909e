"""Kinds of tasks against closed forms and torch's own layers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learned_opt.errors import ConfigError, DataError
from learned_opt.tasks.data import load_images
from learned_opt.tasks.kinds import Draw, TaskConfig, make_task
from learned_opt.tasks.text import load_text

DRAW = Draw(2, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("condition", [1.0, 10.0, 1e4])
def test_a_quadratic_has_its_condition_number_and_minimum(condition: float) -> None:
    task = make_task(TaskConfig(kind="quadratic", options={"dim": 6, "condition": condition}))
    w, y = (part.double() for part in task.fixed_batch())
    zero = torch.zeros(6, dtype=torch.double)
    hessian = torch.autograd.functional.hessian(lambda theta: task.loss(theta, (w, y)), zero)
    eigenvalues = torch.linalg.eigvalsh(hessian)
    assert float(eigenvalues[-1]) == pytest.approx(1, rel=1e-5)
    assert float(eigenvalues[-1] / eigenvalues[0]) == pytest.approx(condition, rel=1e-2)
    best = torch.linalg.solve(w, y)
    assert float(task.loss(best, (w, y))) == pytest.approx(0, abs=1e-12)
    assert float(task.chance) == pytest.approx(float(y.square().sum() / 2), rel=1e-5)


@pytest.mark.parametrize("entries", ["normal", "uniform"])
def test_l2l_s_quadratic_is_the_squared_norm(entries: str) -> None:
    task = make_task(TaskConfig(kind="quadratic", options={"entries": entries}), draw=DRAW)
    theta, (w, y) = task.init(0), task.batch(0, 0)
    expected = torch.stack([(w[i] @ theta[i] - y[i]).norm() ** 2 for i in range(2)])
    torch.testing.assert_close(task.loss(theta, (w, y)), expected)
    assert w.shape == (2, 10, 10) and (w.min() >= 0) == (entries == "uniform")


def test_logistic_regression_starts_at_chance_with_the_known_gradient() -> None:
    task, data = make_task(TaskConfig(kind="logistic")), load_images("digits")
    loss, grad = task.loss_and_grad(task.init(0), task.fixed_batch())
    assert float(loss) == pytest.approx(math.log(10), rel=1e-6)
    error = 0.1 - F.one_hot(data.train_y, 10).float()
    weight = (error.mT @ data.train_x / len(error)).flatten()
    torch.testing.assert_close(grad, torch.cat([weight, error.mean(0)]), rtol=1e-4, atol=1e-6)


def test_a_linear_auto_encoder_is_at_best_principal_components() -> None:
    task, x = make_task(TaskConfig(kind="autoencoder", hidden=(5,))), load_images("digits").train_x
    mean = x.mean(0)
    _, s, vt = torch.linalg.svd(x - mean, full_matrices=False)
    down, up = vt[:5], vt[:5].mT
    theta = torch.cat([down.flatten(), -down @ mean, up.flatten(), mean])
    expected = float(s[5:].square().sum() / x.numel())
    assert float(task.evaluate(theta)["train_loss"]) == pytest.approx(expected, rel=1e-4)
    _, grad = task.loss_and_grad(theta, task.fixed_batch())
    assert grad.abs().max() < 1e-4


def test_a_matrix_of_its_rank_is_factorised_to_nothing() -> None:
    options = {"rows": 8, "columns": 6, "rank": 2}
    task = make_task(TaskConfig(kind="matrix_factorization", options=options, batch_size=9))
    theta, batch = task.init(0).double().requires_grad_(), task.fixed_batch()
    batch = batch[0], batch[1].double()
    assert float(task.loss(torch.zeros_like(theta), batch)) == pytest.approx(float(task.chance))
    optimizer = torch.optim.LBFGS([theta], max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = task.loss(theta, batch)
        loss.backward()
        return loss

    optimizer.step(closure)
    theta = theta.detach()
    assert float(task.loss(theta, batch)) < 1e-8
    u, v = task.unflatten(theta)
    (i, j), m = batch[0].T, batch[1]
    torch.testing.assert_close((u @ v.mT)[i, j], m, rtol=0, atol=1e-3)


@pytest.mark.parametrize("norm", ["none", "batch", "group", "layer"])
def test_conv_nets_are_torch_s_convolutions(norm: str) -> None:
    config = TaskConfig(kind="conv", hidden=(4, 8), batch_size=6, options={"norm": norm})
    task = make_task(config, draw=DRAW)
    theta, (x, y) = task.init(0), task.batch(0, 0)
    theta = theta + 0.1 * torch.randn(theta.shape, generator=torch.Generator().manual_seed(0))
    losses = task.loss(theta, (x, y))
    for i in range(2):
        tensors, out = iter(task.unflatten(theta[i])), x[i]
        for channels in (4, 8):
            out = F.conv2d(out, next(tensors), next(tensors), stride=2, padding=1)
            if norm == "batch":
                out = F.batch_norm(out, None, None, next(tensors), next(tensors), training=True)
            elif norm != "none":
                groups = channels // 4 if norm == "group" else 1
                out = F.group_norm(out, groups, next(tensors), next(tensors))
            out = out.relu()
        out = F.linear(out.flatten(1), next(tensors), next(tensors))
        torch.testing.assert_close(losses[i], F.cross_entropy(out, y[i]))


def test_images_go_into_conv_nets_upright(tmp_path) -> None:
    import numpy as np

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4, 5, 7, 3), dtype=np.uint8)
    for split in ("train", "test"):
        np.savez(tmp_path / f"{split}.npz", images=images, labels=np.array([0, 1, 0, 1]))
    config = TaskConfig(kind="conv", data=str(tmp_path), hidden=(4,), batch_size=2)
    x, _ = make_task(config).fixed_batch()
    pixels = torch.from_numpy(images).float().movedim(-1, 1)
    pixels = (pixels - pixels.mean()) / pixels.std(correction=0)
    assert x.shape == (4, 3, 5, 7)
    torch.testing.assert_close(x.flatten(1).sort(0).values, pixels.flatten(1).sort(0).values)


def test_three_widths_are_resnet_8() -> None:
    options = {"norm": "batch"}
    task = make_task(TaskConfig(kind="resnet", hidden=(16, 32, 64), options=options))
    kernels = [s for s in task.shapes if len(s) == 4 and s[-1] == 3]
    assert len(kernels) == 7 and task.shapes[-2:] == ((10, 64), (10,))
    shortcuts = [s for s in task.shapes if len(s) == 4 and s[-1] == 1]
    assert shortcuts == [(32, 16, 1, 1), (64, 32, 1, 1)]


def test_a_residual_block_without_weights_is_its_shortcut() -> None:
    task = make_task(TaskConfig(kind="resnet", hidden=(3,), options={"norm": "none"}))
    tensors = [t.clone() for t in task.unflatten(task.init(0))]
    for tensor in tensors[2:6]:  # of the block; then the head
        tensor.zero_()
    x, _ = task.fixed_batch(5)
    stem = F.conv2d(x, tensors[0], tensors[1], padding=1).relu()
    expected = F.linear(stem.mean((2, 3)), *tensors[6:])
    torch.testing.assert_close(task.outputs(tensors, x), expected)


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_recurrent_nets_are_torch_s(kind: str) -> None:
    options = {"context": 9}
    config = TaskConfig(
        kind=kind, data="markov", hidden=(5, 5), batch_size=4, options=options, init_scale=1.5
    )
    task = make_task(config, draw=DRAW)
    theta, (tokens, following) = task.init(0), task.batch(0, 0)
    losses = task.loss(theta, (tokens, following))
    for i in range(2):
        embedding, *cells, weight, bias = task.unflatten(theta[i])
        module = {"gru": nn.GRU, "lstm": nn.LSTM}[kind](5, 5, num_layers=2, batch_first=True)
        for p, tensor in zip(module.parameters(), cells, strict=True):
            p.data.copy_(tensor)
        out = F.linear(module(embedding[tokens[i]])[0], weight, bias)
        expected = F.cross_entropy(out.flatten(0, 1), following[i].flatten())
        torch.testing.assert_close(losses[i], expected.detach())


def test_the_transformer_is_torch_s_and_sees_no_later_token() -> None:
    options = {"context": 9, "heads": 2}
    config = TaskConfig(
        kind="transformer", data="markov", hidden=(6, 6), batch_size=4, options=options
    )
    task = make_task(config, draw=DRAW)
    theta, (tokens, _) = task.init(0), task.batch(0, 0)
    outputs = task.outputs(theta, tokens)
    layer = nn.TransformerEncoderLayer(6, 2, 24, 0.0, "gelu", batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(6), enable_nested_tensor=False)
    mask = nn.Transformer.generate_square_subsequent_mask(9)
    for i in range(2):
        # positions, a parameter of the module itself, come first
        positions, embedding, *tensors, weight, bias = task.unflatten(theta[i])
        for p, tensor in zip(encoder.parameters(), tensors, strict=True):
            p.data.copy_(tensor)
        out = encoder(embedding[tokens[i]] + positions, mask, is_causal=True)
        expected = F.linear(out, weight, bias).detach()
        torch.testing.assert_close(outputs[i], expected, rtol=1e-4, atol=1e-5)
    changed = tokens.clone()
    changed[..., 5:] = (changed[..., 5:] + 1) % 12
    again = task.outputs(theta, changed)
    torch.testing.assert_close(again[..., :5, :], outputs[..., :5, :])
    assert not torch.allclose(again[..., 5:, :], outputs[..., 5:, :])


def test_windows_are_the_text_and_its_next_tokens() -> None:
    task = make_task(TaskConfig(kind="gru", data="markov", options={"context": 8}))
    text, (tokens, following) = load_text("markov").train, task.fixed_batch()
    assert torch.equal(tokens[:, 1:], following[:, :-1])
    starts = {tuple(text[i : i + 9].tolist()) for i in range(0, len(text) - 8, 8)}
    windows = torch.cat([tokens, following[:, -1:]], 1)
    assert {tuple(window) for window in windows.tolist()} == starts


def test_text_of_a_file_by_word(tmp_path) -> None:
    (tmp_path / "fox.txt").write_text("the quick brown fox jumps over the lazy dog . " * 40)
    options = {"context": 4, "level": "word", "vocabulary": 6}
    config = TaskConfig(kind="lstm", data="fox.txt", hidden=(4,), options=options)
    task = make_task(config, tmp_path)
    assert task.shapes[0] == (6, 4) and task.chance == pytest.approx(math.log(6))


@pytest.mark.parametrize("kind", ["mlp", "conv", "autoencoder", "logistic", "gru", "transformer"])
def test_chance_is_the_loss_of_outputs_of_zero(kind: str) -> None:
    data = "markov" if kind in ("gru", "transformer") else "digits"
    task = make_task(TaskConfig(kind=kind, data=data))
    tensors = [torch.zeros_like(t) for t in task.unflatten(task.init(0))]
    loss = task.loss(tensors, task.fixed_batch())
    assert float(loss) == pytest.approx(float(task.chance), rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"kind": "cnn"}, ConfigError, "'cnn', which is not a kind of task; use .*'conv'"),
        ({"kind": "conv", "hidden": ()}, ConfigError, "hidden"),
        ({"kind": "autoencoder", "hidden": ()}, ConfigError, "hidden is empty"),
        ({"kind": "gru", "data": "markov", "hidden": ()}, ConfigError, "hidden is empty"),
        ({"kind": "conv", "options": {"norm": "instance"}}, ConfigError, "norm.*'batch'"),
        ({"kind": "conv", "options": {"kernel": 5}}, ConfigError, r"options=\['kernel'\].*norm"),
        ({"kind": "quadratic", "hidden": (3,)}, ConfigError, "hidden=.* has no effect"),
        ({"kind": "quadratic", "options": {"dim": "ten"}}, ConfigError, "have wrong types"),
        ({"kind": "quadratic", "options": {"dim": 2.5}}, ConfigError, "have wrong types"),
        ({"kind": "quadratic", "options": {"condition": 0.5}}, ConfigError, "condition is 0.5"),
        ({"kind": "matrix_factorization", "options": {"rank": 40}}, ConfigError, "rank=40"),
        ({"kind": "gru"}, ConfigError, "data is 'digits'.*'markov'"),
        ({"kind": "gru", "data": "markov", "init": "normal"}, ConfigError, "init='normal'"),
        ({"kind": "gru", "data": "markov", "options": {"context": 9999}}, DataError, "9999"),
        ({"kind": "transformer", "data": "markov", "hidden": (5,)}, ConfigError, "heads=2"),
        ({"kind": "transformer", "data": "markov", "hidden": (4, 6)}, ConfigError, "one width"),
    ],
)
def test_a_bad_task_is_refused_by_name(settings: dict, error: type, says: str) -> None:
    with pytest.raises(error, match=says):
        make_task(TaskConfig(**settings))
