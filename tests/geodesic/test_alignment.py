"""Known answers for the alignment of hidden units: it undoes a permutation exactly."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from geodesic.alignment import (
    PermutationSpec,
    align,
    match_weights,
    mlp_spec,
    permute,
    sequential_spec,
)
from geodesic.model import ModelLoss

MLP_SHAPES = ((12, 6), (12,), (9, 12), (9,), (3, 9), (3,))


def mlp():
    return nn.Sequential(
        *(nn.Linear(6, 12), nn.Tanh()),
        nn.Sequential(nn.Linear(12, 9), nn.BatchNorm1d(9), nn.ReLU()),
        *(nn.Dropout(0.5), nn.Linear(9, 3), nn.LogSoftmax(-1)),
    )


def conv():
    return nn.Sequential(
        *(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(5, 7, 2, bias=False), nn.GELU(), nn.AvgPool2d(2, stride=1)),
        *(nn.Flatten(), nn.BatchNorm1d(7), nn.Linear(7, 10), nn.Sigmoid(), nn.Linear(10, 3)),
    )


def conv_flatten():
    return nn.Sequential(
        *(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Conv2d(5, 7, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.BatchNorm1d(28), nn.Linear(28, 10), nn.Tanh(), nn.Linear(10, 3)),
    )


def fully_convolutional():
    return nn.Sequential(
        *(nn.Conv2d(2, 6, 3), nn.SiLU(), nn.Conv2d(6, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    )


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 5)
        self.recurrent = nn.LSTM(5, 6, batch_first=True)
        self.read = nn.Linear(6, 11)

    def forward(self, words):
        return self.read(self.recurrent(self.embed(words))[0])[:, -1]


def words_spec(module):
    """By hand: four stacked gates, and hidden units twice in one matrix."""
    gates = ((4, 6, 5), (4, 6, 6), (4, 6), (4, 6))
    e, h = "embedding", "hidden"
    return PermutationSpec(
        ((11, 5), *gates, (11, 6), (11,)),
        ((None, e), (None, h, e), (None, h, h), (None, h), (None, h), (None, h), (None,)),
    )


MODELS = {
    "mlp": (mlp, sequential_spec),
    "conv": (conv, sequential_spec),
    "conv_flatten": (conv_flatten, sequential_spec),
    "fully_convolutional": (fully_convolutional, sequential_spec),
    "lstm": (Words, words_spec),
}


def build(name, seed=0):
    """Two independent networks: F, their spec, and both θ."""
    make, spec_of = MODELS[name]
    thetas = []
    for k in range(2):
        torch.manual_seed(2 * seed + k)
        module = make().double()
        for parameter in module.parameters():  # batch norm starts alike: all weights 1
            nn.init.normal_(parameter, 0.1, 0.5)
        thetas.append(nn.utils.parameters_to_vector(module.parameters()).detach())
    x = {"mlp": torch.randn(20, 6), "lstm": torch.randint(11, (20, 4))}
    x = x.get(name, torch.randn(20, 2, 8, 8))
    y = torch.randint(3, (20,))
    F = ModelLoss(module, cross_entropy, x, y, recalibrate=True)
    return F, spec_of(module), *thetas


def shuffled(spec, seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randperm(n, generator=generator) for name, n in spec.sizes.items()}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("seed", range(5))
def test_finds_a_permuted_network_again(name, seed):
    F, spec, theta, _ = build(name, seed)
    permutations = shuffled(spec, seed)
    moved = permute(theta, spec, permutations)
    assert torch.dist(moved, theta) > 1
    assert F(moved).item() == pytest.approx(F(theta).item(), rel=1e-12)
    assert torch.equal(align(theta, moved, spec), theta)
    found = match_weights(theta, moved, spec)
    for p, q in permutations.items():
        assert torch.equal(q[found[p]], torch.arange(len(q)))


@pytest.mark.parametrize("seed", range(5))
def test_finds_a_deep_narrow_network_again(seed):
    # Started from the identity alone, one in ten is found.
    widths = (1, 50, 50, 50, 50, 1)
    spec = mlp_spec([shape for i, o in itertools.pairwise(widths) for shape in ((o, i), (o,))])
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randn(50 * 2 + 3 * 50 * 51 + 51, generator=generator)
    assert torch.equal(align(theta, permute(theta, spec, shuffled(spec, seed)), spec), theta)


@pytest.mark.parametrize("seed", range(3))
def test_finds_a_permuted_and_perturbed_network(seed):
    _, spec, theta, _ = build("conv_flatten", seed)
    noise = 0.05 * torch.randn(theta.shape, generator=torch.Generator().manual_seed(seed)).double()
    moved = permute(theta + noise, spec, shuffled(spec, seed))
    assert torch.equal(align(theta, moved, spec), theta + noise)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("seed", range(5))
def test_independent_networks_get_closer_and_stay_the_same_function(name, seed):
    F, spec, a, b = build(name, seed)
    aligned = align(a, b, spec)
    assert torch.dist(a, aligned) < torch.dist(a, b)
    assert F(aligned).item() == pytest.approx(F(b).item(), rel=1e-12)
    assert torch.equal(aligned.sort().values, b.sort().values)
    assert torch.equal(align(a, b, spec), aligned)  # deterministic
    assert torch.equal(align(a, aligned, spec), aligned)  # idempotent
    if name == "lstm":  # a matrix with the hidden units twice is not a linear assignment
        return
    # A local minimum: no swap of two units is shorter.
    for unit, n in spec.sizes.items():
        for i in range(n):
            for j in range(i):
                swap = torch.arange(n)
                swap[[i, j]] = swap[[j, i]]
                assert torch.dist(a, permute(aligned, spec, {unit: swap})) >= torch.dist(a, aligned)


def test_one_hidden_layer_is_solved_exactly():
    spec = mlp_spec(((5, 3), (5,), (2, 5), (2,)))
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 32, generator=generator)
    every = [torch.tensor(p) for p in itertools.permutations(range(5))]
    best = min(torch.dist(a, permute(b, spec, {"hidden0": p})) for p in every)
    assert torch.dist(a, align(a, b, spec)) == best


def test_aligned_networks_are_left_alone():
    _, spec, theta, _ = build("conv")
    assert torch.equal(align(theta, theta, spec), theta)
    closest = {name: torch.arange(n) for name, n in spec.sizes.items()}
    found = match_weights(theta, theta * 0.9, spec)
    assert all(torch.equal(found[name], p) for name, p in closest.items())


def test_trajectories_are_permuted_at_once_and_in_any_dtype():
    _, spec, a, b = build("mlp")
    permutations = match_weights(a.float(), b.float(), spec)
    batch = torch.stack((a, b)).float()[None]
    permuted = permute(batch, spec, permutations)
    assert permuted.dtype == torch.float32 and permuted.shape == batch.shape
    assert torch.equal(permuted[0, 1], permute(b.float(), spec, permutations))


def test_mlp_spec_is_that_of_the_chain():
    chain = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 9), nn.ReLU())
    chain.append(nn.Linear(9, 3))
    by_shapes, by_layers = mlp_spec(MLP_SHAPES), sequential_spec(chain)
    theta = torch.arange(12 * 7 + 9 * 13 + 3 * 10.0)
    other = theta.flip(0)
    assert torch.equal(align(theta, other, by_shapes), align(theta, other, by_layers))
    assert by_shapes.axes == (
        *(("hidden0", None), ("hidden0",), ("hidden1", "hidden0"), ("hidden1",)),
        *((None, "hidden1"), (None,)),
    )
    no_bias = mlp_spec(MLP_SHAPES[::2])
    assert no_bias.axes == by_shapes.axes[::2]
    assert mlp_spec(((3, 6), (3,))).sizes == {}  # logistic regression has no hidden units


@pytest.mark.parametrize(
    "layers",
    [
        (nn.Conv2d(2, 5, 3), nn.Linear(6, 3)),  # acts on pixels
        (nn.Linear(6, 4), nn.Conv1d(4, 5, 1), nn.Flatten(), nn.Linear(5, 3)),
        (nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(64, 3)),
        (nn.Linear(6, 4), nn.MaxPool1d(2), nn.Linear(2, 3)),  # pools over units
        (nn.Linear(6, 4), nn.Flatten(), nn.Linear(12, 3)),  # units are last, not first
        (nn.Conv2d(2, 4, 3), nn.Flatten(2), nn.Linear(4, 3)),
        (nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 3)),
        (nn.Linear(6, 4), nn.PReLU(), nn.Linear(4, 3)),
    ],
    ids=repr,
)
def test_refuses_layers_it_cannot_follow(layers):
    with pytest.raises(
        ValueError, match=r"can be traced, got .*; write the PermutationSpec by hand"
    ):
        sequential_spec(nn.Sequential(*layers))


def test_refuses_wrong_specs_and_thetas():
    layer = nn.Linear(4, 4)
    for module in (nn.Sequential(layer, layer), Words()):
        with pytest.raises(ValueError, match="uses no layer twice"):
            sequential_spec(module)
    with pytest.raises(ValueError, match=r"axes must name every axis.*use None"):
        PermutationSpec(((2, 3), (2,)), (("h",), ("h",)))
    with pytest.raises(ValueError, match="'h' must be of one size, got 12 and 4; split an axis"):
        PermutationSpec(((3, 12), (4, 2)), ((None, "h"), ("h", None)))
    spec = mlp_spec(MLP_SHAPES)
    theta = torch.zeros(231)
    with pytest.raises(ValueError, match=r"theta must be \(..., 231\) for this spec, got \(230,\)"):
        align(theta, theta[1:], spec)
    with pytest.raises(ValueError, match=r"theta_b must be a finite \(d,\) tensor"):
        align(theta, theta + torch.inf, spec)
    with pytest.raises(ValueError, match=r"theta_a must be a finite.*pairs one by one"):
        align(theta[None], theta[None], spec)
