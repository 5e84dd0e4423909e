"""F of a module: parity with the module, exact batch-norm statistics, and errors."""

import copy

import pytest
import torch
from torch import nn
from torch.func import grad, grad_and_value, vmap
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

from geodesic import LevelProfile, find_geodesic, normalized_length, points_at
from geodesic.model import ModelLoss, check_deterministic
from geodesic.path import chord, fractions, subdivide

N = 23  # not a multiple of the chunk sizes


class Words(nn.Module):
    """Next-word prediction; ``layer`` is a recurrent one."""

    def __init__(self, layer=nn.LSTM, **options):
        super().__init__()
        self.embed = nn.Embedding(11, 5)
        self.recurrent = layer(5, 6, batch_first=True, **options)
        self.read = nn.Linear(6, 11)

    def forward(self, words):
        return self.read(self.recurrent(self.embed(words))[0])


class Cells(nn.Module):
    """The same with a cell, step by step."""

    def __init__(self):
        super().__init__()
        self.embed, self.cell, self.read = nn.Embedding(11, 5), nn.LSTMCell(5, 6), nn.Linear(6, 11)

    def forward(self, words):
        state, outputs = None, []
        for x in self.embed(words).unbind(1):
            state = self.cell(x, state)
            outputs.append(self.read(state[0]))
        return torch.stack(outputs, dim=1)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.read = nn.Embedding(11, 5), nn.Linear(5, 11)
        self.read.weight = self.embed.weight

    def forward(self, words):
        return self.read(self.embed(words).tanh())


class Noisy(nn.Linear):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x))  # on, even in eval mode


def word_loss(outputs, words):
    return cross_entropy(outputs.flatten(0, 1), words.flatten())


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3))


def conv():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3)
    )


def conv_bn():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(36, 6),
        nn.BatchNorm1d(6),
        nn.Tanh(),
        nn.Linear(6, 3),
    )


MODELS = {
    "mlp": (mlp, "vectors"),
    "conv": (conv, "images"),
    "conv_bn": (conv_bn, "images"),
    "lstm": (Words, "words"),
    "deep lstm": (lambda: Words(num_layers=2, dropout=0.5), "words"),
    "gru": (lambda: Words(nn.GRU), "words"),
    "rnn": (lambda: Words(nn.RNN), "words"),
    "cell": (Cells, "words"),
    "tied": (Tied, "words"),
}


def data(kind, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    if kind == "words":
        text = torch.randint(11, (N, 5), generator=generator)
        return word_loss, text[:, :-1], text[:, 1:]
    shape = (N, 6) if kind == "vectors" else (N, 1, 8, 8)
    x = torch.randn(shape, generator=generator, dtype=dtype)
    labels = torch.randint(3, (N,), generator=generator)
    # Classes differ in their mean, so that there is something to learn.
    return cross_entropy, x + labels.to(dtype).view(N, *[1] * (x.ndim - 1)) / 2, labels


def build(name, chunk_size=None, dtype=torch.float64):
    torch.manual_seed(0)
    make, kind = MODELS[name]
    module = make().to(dtype)
    recalibrate = True if name == "conv_bn" else None
    return module, ModelLoss(module, *data(kind, dtype), chunk_size, recalibrate)


def some_thetas(F, module, count=3):
    theta = F.flatten(module)
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(count, len(theta), generator=generator, dtype=torch.float64)
    return theta + 0.1 * noise.to(theta)


def own_loss(module, name):
    """The module's loss on the data by plain PyTorch; batch norm by the batch."""
    loss_fn, x, y = data(MODELS[name][1], next(module.parameters()).dtype)
    return loss_fn((module.train() if name == "conv_bn" else module.eval())(x), y)


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", MODELS)
def test_value_and_gradient_are_the_modules_own(name, dtype, rel):
    module, F = build(name, dtype=dtype)
    theta = F.flatten(module)
    loss = own_loss(module, name)
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, module.parameters())])
    assert F(theta).dtype == dtype and F(theta).item() == pytest.approx(loss.item(), rel=rel)
    torch.testing.assert_close(grad(F)(theta), expected, rtol=rel, atol=rel)


@pytest.mark.parametrize("chunk_size", [None, 5])
@pytest.mark.parametrize("name", MODELS)
def test_vmap_equals_a_loop(name, chunk_size):
    module, F = build(name, chunk_size)
    thetas = some_thetas(F, module)
    one_by_one = [grad_and_value(F)(theta) for theta in thetas]
    gradients, losses = (torch.stack(kind) for kind in zip(*one_by_one, strict=True))
    torch.testing.assert_close(vmap(F)(thetas), losses)
    # As the solver maps it: over pairs, then over points.
    found = vmap(vmap(grad_and_value(F), chunk_size=2))(thetas[None])
    torch.testing.assert_close(found[0][0], gradients)
    torch.testing.assert_close(found[1][0], losses)


@pytest.mark.parametrize("chunk_size", [1, 5, N, 100])
@pytest.mark.parametrize("name", ["mlp", "conv", "lstm", "tied"])
def test_chunks_add_up(name, chunk_size):
    module, whole = build(name)
    _, chunked = build(name, chunk_size)
    for theta in some_thetas(whole, module):
        for f in (lambda F: F, grad):
            torch.testing.assert_close(f(chunked)(theta), f(whole)(theta))


@pytest.mark.parametrize("chunk_size", [None, 5])
@pytest.mark.parametrize("name", ["mlp", "conv_bn", "cell"])
def test_gradcheck(name, chunk_size):
    module, F = build(name, chunk_size)
    theta = F.flatten(module).requires_grad_()
    assert torch.autograd.gradcheck(F, (theta,), fast_mode=True)
    assert torch.autograd.gradgradcheck(F, (theta,), fast_mode=True)


def test_chunks_store_no_activations():
    def convolutions(chunk_size):
        """In the graph of F and its gradient, which torch.func.grad keeps."""
        module, F = build("conv_bn", chunk_size)
        theta = F.flatten(module).requires_grad_()
        (gradient,) = torch.autograd.grad(F(theta), theta, create_graph=True)
        nodes, seen = [gradient.grad_fn], set()
        while nodes:
            node = nodes.pop()
            if node not in seen:
                seen.add(node)
                nodes += [following for following, _ in node.next_functions if following]
        return sum("Convolution" in node.name() for node in seen)

    assert convolutions(None) > 0 and convolutions(5) == 0


@pytest.mark.parametrize("name", MODELS)
def test_flatten_and_load_round_trip(name):
    module, F = build(name)
    theta = F.flatten(module)
    assert torch.equal(theta, nn.utils.parameters_to_vector(module.parameters()))
    assert torch.equal(theta, F.flatten(module.state_dict()))
    other = some_thetas(F, module)[0]
    F.load(other, module)
    assert torch.equal(F.flatten(module), other) and not torch.equal(theta, other)
    assert F(other).item() == pytest.approx(own_loss(module, name).item(), rel=1e-12)


def test_the_module_is_not_changed_nor_followed():
    module, F = build("conv_bn")
    before = copy.deepcopy(module.state_dict())
    theta = F.flatten(module)
    loss = F(theta)
    assert module.training and all(
        torch.equal(v, before[k]) for k, v in module.state_dict().items()
    )
    F.load(theta + 1, module)
    assert torch.equal(F(theta), loss)


class Clamped(nn.Linear):
    def forward(self, x):
        with torch.no_grad():
            self.weight.clamp_(-0.1, 0.1)
        return super().forward(x)


class Counting(nn.Linear):
    """Keeps a mean of its outputs that the loss does not depend on."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("mean", torch.zeros(sizes[1]))

    def forward(self, x):
        y = super().forward(x)
        self.mean.lerp_(y.detach().mean(0), 0.1)
        return y


class Caching(nn.Linear):
    """Fills a buffer at its first call, as position encodings do."""

    def forward(self, x):
        if not hasattr(self, "shift"):
            self.register_buffer("shift", torch.ones(self.out_features, dtype=x.dtype))
        return super().forward(x) + self.shift


def writing(name):
    """A module that writes into its own weights in the forward pass, and its data."""
    torch.manual_seed(0)
    _, x, y = data("vectors")
    words = torch.randint(11, (N, 4), generator=torch.Generator().manual_seed(3))
    module, x = {
        "embedding": (
            nn.Sequential(nn.Embedding(11, 5, max_norm=1.0), nn.Flatten(), nn.Linear(20, 3)),
            words,
        ),
        "bag": (nn.Sequential(nn.EmbeddingBag(11, 5, max_norm=1.0), nn.Linear(5, 3)), words),
        "clamped": (Clamped(6, 3), x),
        "spectral norm": (nn.utils.parametrizations.spectral_norm(nn.Linear(6, 3)), x),
        "spectral norm by a hook": (nn.utils.spectral_norm(nn.Linear(6, 3)), x),
    }[name]
    return module.double(), x, y


@pytest.mark.parametrize("chunk_size", [None, 5])
@pytest.mark.parametrize(
    "name", ["embedding", "bag", "clamped", "spectral norm", "spectral norm by a hook"]
)
def test_theta_is_never_written_to(name, chunk_size):
    module, x, y = writing(name)
    F = ModelLoss(module, cross_entropy, x, y, chunk_size)
    theta = 3 * F.flatten(module)
    thetas = torch.stack((theta, 2 * theta))
    kept = theta.clone(), thetas.clone()
    loss, again = F(theta), F(theta)
    gradient, losses = grad(F)(theta), vmap(F)(thetas)
    gradients = vmap(grad(F))(thetas)
    assert torch.equal(theta, kept[0]) and torch.equal(thetas, kept[1])
    assert torch.equal(loss, again) and losses[0].item() == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(gradients[0], gradient)
    # The module by itself, which does change its weights.
    F.load(theta, module)
    own = cross_entropy(module.eval()(x), y)
    own_gradient = torch.autograd.grad(own, list(module.parameters()))
    assert loss.item() == pytest.approx(own.item(), rel=1e-12)
    torch.testing.assert_close(gradient, torch.cat([g.flatten() for g in own_gradient]))


def test_refuses_a_forward_pass_that_writes_elsewhere():
    _, x, y = data("vectors")
    kept = x.clone()
    first = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 3)).double()
    refused(r"writes into inputs\[0\].*inplace=False", ModelLoss, first, cross_entropy, x, y)
    assert torch.equal(x, kept)
    counting = nn.Sequential(Counting(6, 3)).double()
    refused("writes into buffer '0.mean'", ModelLoss, counting, cross_entropy, x, y)
    hooked = nn.utils.weight_norm(nn.Linear(6, 3).double())
    hooked(x)
    refused("copy.deepcopy.*parametrizations", ModelLoss, hooked, cross_entropy, x, y)
    ModelLoss(Caching(6, 3).double(), cross_entropy, x, y)


def test_several_inputs():
    module = nn.Bilinear(3, 2, 4).double()
    generator = torch.Generator().manual_seed(0)
    a, b, y = (torch.randn(N, k, generator=generator).double() for k in (3, 2, 4))
    F = ModelLoss(module, nn.functional.mse_loss, (a, b), y, chunk_size=4)
    expected = nn.functional.mse_loss(module(a, b), y)
    torch.testing.assert_close(F(F.flatten(module)), expected.detach())


def test_data_loader_is_read_once():
    module, F = build("mlp")
    loss_fn, x, y = data("vectors")
    read = ModelLoss(module, loss_fn, DataLoader(TensorDataset(x, y), batch_size=4))
    x.zero_()
    assert torch.equal(read(F.flatten(module)), F(F.flatten(module)))


# Batch norm


def test_recalibrated_statistics_are_not_the_running_ones():
    module, F = build("conv_bn")
    loss_fn, x, y = data("images")
    for _ in range(20):  # running statistics at the module's own parameters
        module.train()(x)
    stale = ModelLoss(module, loss_fn, x, y, recalibrate=False)
    theta, moved = F.flatten(module), some_thetas(F, module)[0] * 1.5
    assert stale(theta).item() == pytest.approx(loss_fn(module.eval()(x), y).item())
    assert abs(stale(moved) - F(moved)) > 0.01
    F.load(moved, module)
    assert F(moved).item() == pytest.approx(loss_fn(module.eval()(x), y).item(), rel=1e-12)


def test_pooled_moments_by_hand():
    module, F = build("conv_bn", chunk_size=12)  # 23 examples as 12 and 11
    loss_fn, x, y = data("images")
    theta = some_thetas(F, module)[0]
    F.load(theta, module)
    to_first, to_second = module[:1], copy.deepcopy(module)[:6].train()
    for layer, seen in (
        (module[1], to_first(x).transpose(0, 1).flatten(1)),  # all at once
        (module[6], torch.cat([to_second(part) for part in (x[:12], x[12:])]).T),
    ):
        torch.testing.assert_close(layer.running_mean, seen.mean(1).detach())
        torch.testing.assert_close(layer.running_var, seen.var(1, correction=0).detach())
    assert F(theta).item() == pytest.approx(loss_fn(module.eval()(x), y).item(), rel=1e-12)
    _, whole = build("conv_bn")
    assert F(theta) != whole(theta) and F(theta).item() == pytest.approx(whole(theta).item(), 0.02)


def test_one_layer_used_twice_has_its_own_statistics_at_each():
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(6, affine=False).double()
    module = nn.Sequential(nn.Linear(6, 6), norm, nn.Linear(6, 6), norm, nn.Linear(6, 3)).double()
    loss_fn, x, y = data("vectors")
    expected = loss_fn(copy.deepcopy(module)(x), y).item()
    for chunk_size, rel in ((None, 1e-12), (12, 0.05)):
        F = ModelLoss(module, loss_fn, x, y, chunk_size, recalibrate=True)
        assert F(F.flatten(module)).item() == pytest.approx(expected, rel=rel)


def test_chord_of_sgd_on_a_conv_net_with_batch_norm():
    module, F = build("conv_bn", dtype=torch.float32)
    loss_fn, x, y = data("images", torch.float32)
    optimizer, points = torch.optim.SGD(module.parameters(), lr=0.3), []
    for step in range(40):
        index = torch.randint(N, (8,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss_fn(module.train()(x[index]), y[index]).backward()
        optimizer.step()
        points.append(F.flatten(module))
    result = find_geodesic(F, points[4], points[-1])
    assert result.chord_feasible and F(points[-1]) < F(points[4])
    for theta in subdivide(result.path, 3):  # by the module itself, and off the solver's samples
        F.load(theta, module)
        assert loss_fn(module.eval()(x), y) <= F(points[4]) + 1e-5


def test_path_under_a_level_the_chord_exceeds():
    module, F = build("conv_bn")
    points = [F.flatten(module)]
    for _ in range(40):
        points.append(points[-1] - 0.1 * grad(F)(points[-1]))
    descent, s = torch.stack(points), torch.linspace(0, 1, 65, dtype=torch.float64)
    along, straight = (
        vmap(F)(path) for path in (points_at(descent, s), chord(*descent[[0, -1]], 64))
    )
    level = LevelProfile(torch.maximum(along, (along + straight) / 2))
    result = find_geodesic(F, descent[0], descent[-1], level, 8, descent)
    assert result.certified and not result.chord_feasible
    assert 1 < result.normalized_length < normalized_length(descent)
    dense = subdivide(result.path, 37)
    assert (vmap(F)(dense) - level(fractions(dense)[None])[0]).max() <= 1e-9


# Refusals


def refused(message, make, *args, **kwargs):
    with pytest.raises(ValueError, match=message):
        make(*args, **kwargs)


def test_refuses_data_that_is_not_one_fixed_set():
    module = mlp()
    loss_fn, x, y = data("vectors", torch.float32)
    dataset = TensorDataset(x, y)
    sampler = WeightedRandomSampler(torch.ones(N), N)
    for loader in (
        DataLoader(dataset, shuffle=True),
        DataLoader(dataset, sampler=sampler),
        DataLoader(dataset, batch_sampler=torch.utils.data.BatchSampler(sampler, 4, False)),
    ):
        refused("fixed evaluation set.*shuffle=False", ModelLoss, module, loss_fn, loader)
    one_off = iter(DataLoader(dataset))
    refused("inputs must be a tensor, got.*fixed evaluation", ModelLoss, module, loss_fn, one_off)
    refused("targets must be a tensor, got NoneType", ModelLoss, module, loss_fn, x)
    refused("with targets=None", ModelLoss, module, loss_fn, DataLoader(dataset), y)
    refused("with targets=None", ModelLoss, module, loss_fn, DataLoader(x))
    refused("targets must be .n, .*put examples first", ModelLoss, module, loss_fn, x, y[1:])
    refused("inputs must be .n, ", ModelLoss, module, loss_fn, x[:0], y[:0])
    refused("chunk_size must be at least 1, got 0", ModelLoss, module, loss_fn, x, y, 0)


def test_refuses_a_mini_batch_loss():
    module, F = build("mlp")
    _, x, y = data("vectors")
    batches = iter(DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True))

    def mini_batch_loss(theta):
        return ModelLoss(module, cross_entropy, *next(batches))(theta)

    theta = F.flatten(module)
    refused("deterministic.*fixed evaluation set", check_deterministic, mini_batch_loss, theta)
    check_deterministic(F, theta)


@pytest.mark.parametrize("module", [Noisy(6, 3), nn.FractionalMaxPool2d(2, output_size=5)])
def test_refuses_what_eval_mode_leaves_random(module):
    _, x, y = data("vectors" if isinstance(module, Noisy) else "images", torch.float32)
    module = nn.Sequential(module, nn.Flatten(), nn.LazyLinear(3))
    module(x)
    refused("deterministic.*dropout", ModelLoss, module, cross_entropy, x, y)


def test_refuses_batch_norm_without_a_choice():
    loss_fn, x, y = data("images", torch.float32)
    refused(
        r"recalibrate must be chosen.*\['1', '6'\].*recalibrate=True",
        ModelLoss, conv_bn(), loss_fn, x, y,
    )  # fmt: skip
    untracked = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64, track_running_stats=False))
    untracked.append(nn.Linear(64, 3))
    refused("recalibrate=False needs", ModelLoss, untracked, loss_fn, x, y, recalibrate=False)
    ModelLoss(untracked, loss_fn, x, y, recalibrate=True)
    instance = nn.Sequential(nn.InstanceNorm2d(1, track_running_stats=True), nn.Flatten())
    instance.append(nn.Linear(64, 3))
    refused("got InstanceNorm2d at '0'", ModelLoss, instance, loss_fn, x, y, recalibrate=True)


def test_refuses_wrong_shapes_and_dtypes():
    module, F = build("mlp")
    loss_fn, x, y = data("vectors")
    theta = F.flatten(module)
    for wrong in (theta.float(), theta[1:], theta[None]):
        refused(r"theta must be \(83,\) torch.float64 on cpu, got", F, wrong)
        refused(r"theta must be \(83,\)", F.load, wrong, module)
    refused(r"0.weight must be \(8, 6\), got nothing", F.flatten, {})
    refused(r"0.weight must be \(8, 6\), got \(3, 6\)", F.load, theta, nn.Sequential(Noisy(6, 3)))
    refused("one dtype, float32 or float64", ModelLoss, mlp().half(), loss_fn, x, y)
    refused("one dtype", ModelLoss, nn.Sequential(mlp(), nn.Linear(1, 1).double()), loss_fn, x, y)
    refused("one dtype", ModelLoss, nn.Sequential(), loss_fn, x, y)
    refused("reduction='mean'", ModelLoss, module, nn.CrossEntropyLoss(reduction="none"), x, y)
    refused("got a float;", ModelLoss, module, lambda outputs, targets: 1.0, x, y)
    refused("got torch.int64;", ModelLoss, module, lambda outputs, _: outputs.argmax(), x, y)
