"""Permutes the hidden units of one network so that its parameters lie near another network's.

Swapping two hidden units changes θ but not F, so two independently trained networks lie in
different, equivalent parts of parameter space. Align them before searching for a path between them.
Signs (tanh) and scales (ReLU) are symmetries too; they are not aligned.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class PermutationSpec:
    """Says which permutation acts on which axis of which tensor of θ.

    An MLP 64-32-10, for example, has ``PermutationSpec(((32, 64), (32,), (10, 32), (10,)),
    (("h", None), ("h",), (None, "h"), (None,)))``. `mlp_spec` and `sequential_spec` construct it.

    Attributes:
        shapes: the shapes of the tensors, in the order of θ. You may split an axis: as ``(c, k)``
            if it holds c channels of k pixels, to permute the channels; as ``(4, h)`` if it holds
            the four stacked gates of an LSTM, to permute the units. Write ``(1,)`` for a scalar.
        axes: a name or None for each axis of each tensor. Axes of one name are permuted alike. An
            axis with None is not permuted; the network's inputs and outputs must have None.

    Raises:
        ValueError: shapes and axes do not match, or a name has axes of different sizes.
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
                        f"{self.sizes[name]}; split an axis that holds several values for each "
                        "unit, as in (out, channels, pixels)"
                    )

    @property
    def sizes(self) -> dict[str, int]:
        """The number of units of each permutation, in the order of θ."""
        return {
            name: size
            for shape, names in zip(self.shapes, self.axes, strict=True)
            for size, name in zip(shape, names, strict=True)
            if name is not None
        }

    def split(self, theta: Tensor) -> list[Tensor]:
        """Returns the tensors ``(..., *shape)`` of ``theta`` ``(..., d)``."""
        counts = [torch.Size(shape).numel() for shape in self.shapes]
        if theta.ndim == 0 or theta.shape[-1] != sum(counts):
            raise ValueError(
                f"theta must be (..., {sum(counts)}) for this spec, got {tuple(theta.shape)}; "
                "the spec must list the parameters in the order of theta"
            )
        parts = theta.split(counts, dim=-1)
        return [part.unflatten(-1, shape) for part, shape in zip(parts, self.shapes, strict=True)]


def permute(theta: Tensor, spec: PermutationSpec, permutations: dict[str, Tensor]) -> Tensor:
    """Returns ``theta`` ``(..., d)`` with its units permuted; F is unchanged.

    For each permutation p, unit i of the result is unit p[i] of ``theta``.
    """
    parts = [
        _permute(tensor, names, permutations).flatten(-len(names))
        for tensor, names in zip(spec.split(theta), spec.axes, strict=True)
    ]
    return torch.cat(parts, dim=-1)


def match_weights(theta_a: Tensor, theta_b: Tensor, spec: PermutationSpec) -> dict[str, Tensor]:
    """Returns permutations of θ_b's hidden units that bring it near θ_a, ``(n,)`` for each name.

        π* = argmin |θ_a - π(θ_b)|²   over the permutations π of ``spec``

    This is weight matching (Ainsworth et al. 2022, arXiv 2209.04836, sec. 3.2): with the other
    permutations fixed, one permutation is a linear assignment problem. These are solved in turn
    until none lowers the distance, which is a local minimum. Two starts are tried: the identity,
    and a greedy one that matches layer after layer from the inputs; each layer is matched by its
    weights to the layers before it. In a chain of layers the greedy start finds an exact copy. The
    paper starts from the identity and takes the layers in random order; this function is
    deterministic.

    The result is never farther from θ_a than θ_b is.

    Raises:
        ValueError: theta_a or theta_b has a wrong shape or is not finite.
    """
    for name, theta in (("theta_a", theta_a), ("theta_b", theta_b)):
        if theta.ndim != 1 or not theta.isfinite().all():
            raise ValueError(
                f"{name} must be a finite (d,) tensor, got {tuple(theta.shape)}; align pairs one "
                "by one, and drop pairs of a diverged run"
            )
    # The assignment runs on the CPU. In float32, rounding would make equal distances differ.
    a, b = (spec.split(theta.detach().cpu().double()) for theta in (theta_a, theta_b))
    identity = {name: torch.arange(size) for name, size in spec.sizes.items()}
    greedy: dict[str, Tensor] = {}
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
    """Returns θ_b with its hidden units permuted to lie near θ_a; F is unchanged.

    Two trainings of one network end with their hidden units in different but equivalent orders.
    Align θ_b before you search a geodesic, or its length includes the difference in order::

        spec = geodesic.mlp_spec([(32, 64), (32,), (10, 32), (10,)])  # of an MLP 64-32-10
        theta_b = geodesic.align(theta_a, theta_b, spec)
        result = geodesic.find_geodesic(loss_fn, theta_a, theta_b)

    `match_weights` finds the permutations. Report distances and path lengths of both the raw and
    the aligned pair. Buffers, such as the running statistics of batch norm, are not part of θ and
    are not permuted, so use ``recalibrate=True`` with `geodesic.ModelLoss`.

    Args:
        theta_a: ``(d,)``; it stays as it is.
        theta_b: ``(d,)``.
        spec: which axes of which tensors of θ may be permuted, as `mlp_spec` and `sequential_spec`
            return it.

    Returns:
        ``(d,)``, never farther from θ_a than θ_b is.

    Raises:
        ValueError: theta_a or theta_b has a wrong shape or is not finite.
    """
    return permute(theta_b, spec, match_weights(theta_a, theta_b, spec))


def _permute(tensor: Tensor, names, permutations, keep: int | None = None) -> Tensor:
    """Returns ``tensor`` with its last axes permuted, except axis ``keep``."""
    for axis, name in enumerate(names):
        if name in permutations and axis != keep:
            index = permutations[name].to(tensor.device)
            tensor = tensor.index_select(axis - len(names), index)
    return tensor


def _assign(a, b, spec, permutations, name, use) -> Tensor:
    """Returns the permutation ``name`` that maximizes Σ ⟨a, b⟩ over the tensors in ``use``."""
    from scipy.optimize import linear_sum_assignment  # here: scipy is slow to import

    gain = torch.zeros(spec.sizes[name], spec.sizes[name], dtype=torch.float64)
    for x, y, names, used in zip(a, b, spec.axes, use, strict=True):
        for axis in (axis for axis, other in enumerate(names) if used and other == name):
            others = _permute(y, names, permutations, keep=axis)
            rows, columns = (t.movedim(axis, 0).reshape(len(gain), -1) for t in (x, others))
            gain += rows @ columns.T
    return torch.from_numpy(linear_sum_assignment(gain.numpy(), maximize=True)[1])


def _descend(a, b, spec, permutations) -> tuple[dict[str, Tensor], float]:
    """Returns a local minimum of |a - π(b)|² by coordinate descent, and its value."""
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
            # If a tensor has two axes of this name, the assignment is not exact: check that it
            # lowers the distance.
            if (found := distance(new)) < best:
                permutations, best, improved = new, found, True
    return permutations, best


def mlp_spec(shapes: Sequence[tuple[int, ...]]) -> PermutationSpec:
    """Returns the spec of an MLP with ``shapes`` ((out, in), (out,), (out, in), …).

    The biases (out,) may be absent.
    """
    hidden = sum(len(shape) == 2 for shape in shapes) - 1
    axes, layer = [], -1
    for shape in shapes:
        layer += len(shape) == 2
        rows, columns = (f"hidden{k}" if 0 <= k < hidden else None for k in (layer, layer - 1))
        axes.append((rows, columns)[: len(shape)])
    return PermutationSpec(tuple(map(tuple, shapes)), tuple(axes))


# UNITWISE layers treat all units alike. POOLING layers do so with each unit's map of pixels.
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
    """Returns the spec of a chain of layers.

    The layers may be Linear, Conv, BatchNorm, pooling, Flatten and elementwise activations, also in
    nested Sequentials. The permutation of a layer's outputs has the layer's name. The last layer
    with weights has no permutation, because the outputs of the network must keep their order.
    Batches are ``(n, features)`` or ``(n, channels, pixels...)``.

    Raises:
        ValueError: there is another kind of layer, or the units cannot be traced through a layer.
    """
    named = module.named_modules(remove_duplicate=False)
    layers = [(name, m) for name, m in named if type(m) is not nn.Sequential]
    if type(module) is not nn.Sequential or len({m for _, m in layers}) < len(layers):
        raise ValueError(
            f"module must be an nn.Sequential that uses no layer twice, got "
            f"{type(module).__name__}; write its PermutationSpec by hand"
        )
    last = [name for name, m in layers if type(m) in (nn.Linear, *CONVOLUTIONS)][-1:]
    shapes: list[tuple[int, ...]] = []
    axes: list[tuple[str | None, ...]] = []
    # The input of a layer: ``count`` units of the permutation ``unit`` (None for the network's
    # inputs). ``form`` is "features", "maps" of pixels, or "flat": flattened maps, in which the
    # pixels of a unit are adjacent.
    unit, count, form = None, 0, "maps"
    for name, layer in layers:
        kind = type(layer)
        incoming: tuple[int, ...] = ()
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
                f"module must be a chain whose units can be traced, got {layer} at {name!r}"
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
