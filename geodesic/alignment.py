"""Permute the hidden units of one network to lie near another's, before a path between them.

Swapping two hidden units changes θ but not F, so two independently trained networks lie in
different, equivalent corners of parameter space. Signs (tanh) and scales (ReLU) are symmetries too;
they are left alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn


@dataclass(frozen=True)
class PermutationSpec:
    """Which permutation acts on which axis of which tensor of θ.

    For example of an MLP 64-32-10, ``PermutationSpec(((32, 64), (32,), (10, 32), (10,)),
    (("h", None), ("h",), (None, "h"), (None,)))``; `mlp_spec` and `sequential_spec` write it.

    Attributes:
        shapes: of the tensors, in the order of θ. Each may be any view of its part: of an input
            axis that holds c channels of k pixels say ``(c, k)`` and permute c, of the four stacked
            gates of an LSTM say ``(4, h)`` and permute h, of a scalar say ``(1,)``.
        axes: for every tensor a name or None for every axis. Axes of one name are permuted alike;
            None stays, as inputs and outputs of the network must.

    Raises:
        ValueError: where shapes and axes do not match, or a name has axes of different size.
    """

    shapes: tuple[tuple[int, ...], ...]
    axes: tuple[tuple[str | None, ...], ...]

    def __post_init__(self) -> None:
        if [len(shape) for shape in self.shapes] != [len(names) for names in self.axes]:
            raise ValueError(
                f"axes must name every axis of shapes, got {self.axes} for {self.shapes}; "
                "use None for an axis that is not permuted"
            )
        for shape, names in zip(self.shapes, self.axes, strict=True):
            for size, name in zip(shape, names, strict=True):
                if name is not None and self.sizes[name] != size:
                    raise ValueError(
                        f"axes named {name!r} must be of one size, got {size} and "
                        f"{self.sizes[name]}; split an axis that holds several values a unit, such "
                        "as (out, channels, pixels)"
                    )

    @property
    def sizes(self) -> dict[str, int]:
        """Units of each permutation, in the order of θ."""
        return {
            name: size
            for shape, names in zip(self.shapes, self.axes, strict=True)
            for size, name in zip(shape, names, strict=True)
            if name is not None
        }

    def split(self, theta: Tensor) -> list[Tensor]:
        """The tensors ``(..., *shape)`` of ``theta`` ``(..., d)``."""
        counts = [torch.Size(shape).numel() for shape in self.shapes]
        if theta.ndim == 0 or theta.shape[-1] != sum(counts):
            raise ValueError(
                f"theta must be (..., {sum(counts)}) for this spec, got {tuple(theta.shape)}; "
                "the spec lists the parameters in the order of theta"
            )
        parts = theta.split(counts, dim=-1)
        return [part.unflatten(-1, shape) for part, shape in zip(parts, self.shapes, strict=True)]


def permute(theta: Tensor, spec: PermutationSpec, permutations: dict[str, Tensor]) -> Tensor:
    """θ ``(..., d)`` whose unit i of a permutation p is unit p[i] of ``theta``; F is unchanged."""
    parts = [
        _permute(tensor, names, permutations).flatten(-len(names))
        for tensor, names in zip(spec.split(theta), spec.axes, strict=True)
    ]
    return torch.cat(parts, dim=-1)


def match_weights(theta_a: Tensor, theta_b: Tensor, spec: PermutationSpec) -> dict[str, Tensor]:
    """Permutations of θ_b's hidden units that bring it near θ_a, one index tensor ``(n,)`` a name.

        π* = argmin |θ_a - π(θ_b)|²   over the permutations π of ``spec``

    by weight matching (Ainsworth et al. 2022, arXiv 2209.04836, sec. 3.2): one permutation at a
    time, the others held, is a linear assignment; until none lowers the distance. That is a local
    minimum. Two starts are tried, the identity and one layer after the other from the inputs, each
    matched by what is matched already; in a chain the latter finds an exact copy. The paper starts
    from the identity with the layers in random order; here all is deterministic.

    The result is never farther from θ_a than θ_b is.

    Raises:
        ValueError: for wrong shapes and values that are not finite.
    """
    for name, theta in (("theta_a", theta_a), ("theta_b", theta_b)):
        if theta.ndim != 1 or not theta.isfinite().all():
            raise ValueError(
                f"{name} must be a finite (d,) tensor, got {tuple(theta.shape)}; align pairs one "
                "by one, without those of a diverged run"
            )
    # The assignment runs on the CPU; sums of float32 would make equal distances differ.
    a, b = (spec.split(theta.detach().cpu().double()) for theta in (theta_a, theta_b))
    identity = {name: torch.arange(size) for name, size in spec.sizes.items()}
    greedy = {}
    for name in identity:
        known = [
            all(other in greedy or other in (name, None) for other in names)
            and names.count(name) == 1
            for names in spec.axes
        ]
        greedy[name] = _assign(a, b, spec, greedy, name, known)
    results = [_descend(a, b, spec, start) for start in (identity, greedy)]
    permutations, _ = min(results, key=lambda result: result[1])
    return {name: p.to(theta_b.device) for name, p in permutations.items()}


def align(theta_a: Tensor, theta_b: Tensor, spec: PermutationSpec) -> Tensor:
    """θ_b ``(d,)`` with its hidden units permuted to lie near θ_a: the same network, the same F.

    Report distances and path lengths of both the raw and the aligned pair. Buffers, such as the
    running statistics of batch norm, are not part of θ: with `geodesic.model.ModelLoss` use
    ``recalibrate=True``. See `match_weights`.
    """
    return permute(theta_b, spec, match_weights(theta_a, theta_b, spec))


def _permute(tensor: Tensor, names, permutations, keep: int | None = None) -> Tensor:
    """``tensor`` with its last axes permuted, but for axis ``keep``."""
    for axis, name in enumerate(names):
        if name in permutations and axis != keep:
            index = permutations[name].to(tensor.device)
            tensor = tensor.index_select(axis - len(names), index)
    return tensor


def _assign(a, b, spec, permutations, name, use) -> Tensor:
    """The permutation ``name`` that maximises Σ ⟨a, b⟩ over the tensors in ``use``."""
    gain = torch.zeros(spec.sizes[name], spec.sizes[name], dtype=torch.float64)
    for x, y, names, used in zip(a, b, spec.axes, use, strict=True):
        for axis in (axis for axis, other in enumerate(names) if used and other == name):
            others = _permute(y, names, permutations, keep=axis)
            rows, columns = (t.movedim(axis, 0).reshape(len(gain), -1) for t in (x, others))
            gain += rows @ columns.T
    return torch.from_numpy(linear_sum_assignment(gain.numpy(), maximize=True)[1])


def _descend(a, b, spec, permutations) -> tuple[dict[str, Tensor], float]:
    """Coordinate descent on |a - π(b)|², its minimum and the value there."""
    every = [True] * len(a)

    def distance(permutations) -> float:
        return sum(
            (x - _permute(y, names, permutations)).square().sum().item()
            for x, y, names in zip(a, b, spec.axes, strict=True)
        )

    best, improved = distance(permutations), True
    while improved:
        improved = False
        for name in permutations:
            new = {**permutations, name: _assign(a, b, spec, permutations, name, every)}
            # An axis name twice in one tensor makes the assignment only a guess: keep gains alone.
            if (found := distance(new)) < best:
                permutations, best, improved = new, found, True
    return permutations, best


def mlp_spec(shapes: Sequence[tuple[int, ...]]) -> PermutationSpec:
    """Of an MLP with ``shapes`` ((out, in), (out,), (out, in), …), or without biases."""
    hidden = sum(len(shape) == 2 for shape in shapes) - 1
    axes, layer = [], -1
    for shape in shapes:
        layer += len(shape) == 2
        rows, columns = (f"hidden{k}" if 0 <= k < hidden else None for k in (layer, layer - 1))
        axes.append((rows, columns)[: len(shape)])
    return PermutationSpec(tuple(map(tuple, shapes)), tuple(axes))


# Layers that treat all units alike, and those that do so within each unit's map of pixels.
UNITWISE = (
    *(nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU),
    *(nn.Mish, nn.Softplus, nn.Softsign, nn.Tanh, nn.Sigmoid, nn.Hardtanh, nn.Hardswish),
    *(nn.Hardsigmoid, nn.LogSigmoid, nn.Softmax, nn.LogSoftmax, nn.AlphaDropout),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
)
POOLING = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def sequential_spec(module: nn.Sequential) -> PermutationSpec:
    """Of a chain of Linear, Conv, BatchNorm, pooling, Flatten and elementwise activation layers.

    Sequentials may be nested. The permutation of a layer's outputs has the layer's name; the last
    layer with weights has none, as the outputs of the network must stay. Batches are
    ``(n, features)`` or ``(n, channels, pixels...)``.

    Raises:
        ValueError: for any other layer, and where the units cannot be followed.
    """
    named = module.named_modules(remove_duplicate=False)
    layers = [(name, m) for name, m in named if type(m) is not nn.Sequential]
    if type(module) is not nn.Sequential or len({m for _, m in layers}) < len(layers):
        raise ValueError(
            f"module must be an nn.Sequential that uses no layer twice, got "
            f"{type(module).__name__}; write its PermutationSpec by hand"
        )
    last = [name for name, m in layers if type(m) in (nn.Linear, *CONVOLUTIONS)][-1:]
    shapes, axes = [], []
    # What arrives at a layer: ``count`` units of the permutation ``unit``, None for the inputs, as
    # "features", as "maps" of pixels, or as maps that are "flat", the pixels of a unit together.
    unit, count, form = None, 0, "maps"
    for name, layer in layers:
        kind = type(layer)
        incoming = ()
        if kind in BATCH_NORMS:
            incoming, known = (layer.num_features,), True
        elif kind is nn.Linear:
            incoming, known = (layer.in_features,), unit is None or form != "maps"
        elif kind in CONVOLUTIONS:
            known = layer.groups == 1 and (unit is None or form == "maps")
            incoming = (layer.in_channels,)
        elif kind is nn.Flatten:
            known = (layer.start_dim, layer.end_dim) == (1, -1)
        else:
            known = kind in UNITWISE or (kind in POOLING and (unit is None or form == "maps"))
        names = (None,) * len(incoming)
        if unit is not None and incoming:
            pixels, rest = divmod(incoming[0], count)
            known = known and rest == 0 and (pixels == 1 or form == "flat")
            incoming, names = (count, pixels), (unit, None)
        if not known:
            arriving = "" if unit is None else f" with {count} units arriving as {form}"
            raise ValueError(
                f"module must be a chain whose units can be followed, got {layer} at {name!r}"
                f"{arriving}; write the PermutationSpec by hand"
            )

        if kind in BATCH_NORMS and layer.affine:
            shapes += [incoming, incoming]
            axes += [names, names]
        elif kind is nn.Linear or kind in CONVOLUTIONS:
            kernel = layer.weight.shape[2:]
            unit, count = None if [name] == last else name, layer.weight.shape[0]
            form = "features" if kind is nn.Linear else "maps"
            shapes.append((count, *incoming, *kernel))
            axes.append((unit, *names, *(None for _ in kernel)))
            if layer.bias is not None:
                shapes.append((count,))
                axes.append((unit,))
        elif kind is nn.Flatten and form == "maps":
            form = "flat"
    return PermutationSpec(tuple(shapes), tuple(axes))
