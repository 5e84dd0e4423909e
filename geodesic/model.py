"""Turns a network, a loss and a fixed data set into F(θ) on flat parameters."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from geodesic.level_set import TOLERANCE, check_loss

# Only these exact types: recalibration replaces the forward pass, and a subclass may do more in it.
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class ModelLoss:
    """The loss of a module on a fixed data set, as a function of its flat parameters.

        F(θ) = Σ_c (n_c / n) · loss_fn(module(inputs_c; θ), targets_c)   over chunks c of the data

    θ is ``(d,)``: all parameters of the module, also frozen ones, flattened in the order of
    ``module.named_parameters()``; tied parameters occur once. F has the module's dtype and device,
    is deterministic, and works under `torch.func.vmap` and `torch.func.grad`. With more than one
    chunk it does not work under forward-mode `torch.func.jvp`.

    F reads θ and never writes to it. If a forward pass changes its own weights, as that of
    ``nn.Embedding(max_norm=1.0)`` does, it changes a copy made for that call: F(θ) is the loss
    after the change, and gradients pass through the change as if it were the identity, as they do
    in training. A forward pass that writes into its inputs or its buffers is refused.

    F holds a copy of the module in eval mode, so dropout is the identity. Modules that are random
    in eval mode (``F.dropout`` that is always on, `nn.FractionalMaxPool2d`, ``torch.rand`` in
    ``forward``) are detected by evaluating F twice, and refused.

    *Batch norm.* The running statistics at θ_a and θ_b do not hold for the points between them, so
    ``recalibrate`` must be chosen for a module with batch norm. True normalizes with the mean and
    the (biased) variance of the whole data set at each θ, and differentiates through them. Garipov
    et al. (2018, arXiv 1802.10026) recompute the statistics at each point too. With one chunk that
    is the forward pass in train mode. With several chunks a first pass pools the moments of the
    chunks,

        μ = Σ_c (n_c / n) μ_c        σ² = Σ_c (n_c / n) (σ_c² + (μ_c - μ)²),

    and a second pass uses them. This is exact for the first layer. In the first pass the inputs of
    deeper layers are normalized chunk by chunk, so F depends slightly on ``chunk_size``.

    *Recurrent layers.* `nn.LSTM`, `nn.GRU`, `nn.RNN` and their cells have no vmap rule. F runs
    inside `torch.func.vjp`, which decomposes them. This is tested on the CPU only; cuDNN's fused
    kernels may refuse it, while a cell written with matrix products works.

    Args:
        module: the network, in float32 or float64, on one device. It is not changed.
        loss_fn: maps ``(outputs, targets)`` to a scalar, the **mean** over examples, such as
            `nn.functional.cross_entropy`. Chunks are weighted by their number of examples, also if
            the mean is over a varying number of items in each example (``ignore_index``).
        inputs: ``(n, ...)``; or a tuple of such tensors for a module with several inputs; or a
            `DataLoader` without shuffling whose batches end in the targets. A DataLoader is read
            once, into memory.
        targets: ``(n, ...)``; None with a `DataLoader`.
        chunk_size: the largest number of examples in one forward pass; None for all. Chunks are of
            even size. For each θ of a vmap, F needs the memory of a single chunk. This holds for
            gradients too: if there are several chunks, the backward pass repeats the forward pass
            of each chunk instead of storing it.
        recalibrate: how batch norm is evaluated, see above. False uses the module's running
            statistics at every θ, which is right only if θ stays close to the module's own.

    Raises:
        ValueError: the data are shuffled or can be read only once, ``recalibrate`` is not chosen
            for a module with batch norm, the module is random or writes into inputs or buffers, or
            a shape or dtype is wrong.
    """

    def __init__(
        self,
        module: nn.Module,
        loss_fn: Callable[[Tensor, Tensor], Tensor],
        inputs: Tensor | tuple[Tensor, ...] | DataLoader,
        targets: Tensor | None = None,
        chunk_size: int | None = None,
        recalibrate: bool | None = None,
    ):
        parameters = dict(module.named_parameters())
        kinds = {(p.dtype, p.device) for p in parameters.values()}
        if len(kinds) != 1 or next(iter(kinds))[0] not in TOLERANCE:
            raise ValueError(
                f"module must have parameters of one dtype, float32 or float64, on one device, got "
                f"{sorted(map(str, kinds))}; convert it with module.float() or module.to(device)"
            )
        ((self.dtype, self.device),) = kinds
        self.shapes = {name: p.shape for name, p in parameters.items()}
        self.loss_fn, self._module = loss_fn, _copy(module).eval()
        # A chunk is (its share of the data, inputs, targets).
        self._chunks = self._split(*_read(inputs, targets), chunk_size)
        # During a forward pass: layers with the moments that they saw, and moments to use instead.
        self._seen: list[tuple[_BatchNorm, Tensor]] = []
        self._given: Iterator[Tensor] | None = None
        self._layers = _recalibrated(self._module, recalibrate)
        for layer in self._layers.values():
            layer.forward = partial(self._normalize, layer)  # type: ignore[method-assign]
        self._recurrent = any(
            isinstance(layer, nn.RNNBase | nn.RNNCellBase) for layer in self._module.modules()
        )
        theta = self.flatten(module)
        self._check_pure(theta)
        check_deterministic(self, theta)

    def __call__(self, theta: Tensor) -> Tensor:
        """Returns the loss on all data at ``theta`` ``(d,)``, a scalar."""
        self._check(theta)
        if len(self._chunks) == 1:
            return self._run(self._chunks[0], self._loss, theta)
        pooled = (self._pool(theta),) if self._layers else ()
        return _sum(
            chunk[0] * _recompute(partial(self._run, chunk, self._loss), theta, *pooled)
            for chunk in self._chunks
        )

    def flatten(self, source: nn.Module | Mapping[str, Tensor]) -> Tensor:
        """Returns a copy of the parameters of ``source`` as θ ``(d,)``.

        ``source`` is a module, or a ``state_dict`` of one, of the same architecture.
        """
        tensors = self._matching(source)
        parts = [tensor.detach().to(self.device, self.dtype).flatten() for tensor in tensors]
        return torch.cat(parts)

    @torch.no_grad()
    def load(self, theta: Tensor, module: nn.Module) -> None:
        """Copies ``theta`` into ``module``, and the running statistics at θ if F recalibrates.

        Afterwards the module's loss on the data in eval mode is F(θ), unless one batch-norm layer
        is used in several places.
        """
        self._check(theta)
        for parameter, value in zip(
            self._matching(module), self._unflatten(theta).values(), strict=True
        ):
            parameter.copy_(value)
        if self._layers:
            pooled, names = self._pool(theta), {v: k for k, v in self._layers.items()}
            for layer, (mean, variance) in self._by_call(pooled):
                running = dict(module.get_submodule(names[layer]).named_buffers(recurse=False))
                if "running_mean" in running:
                    running["running_mean"].copy_(mean)
                    running["running_var"].copy_(variance)

    def _check(self, theta: Tensor) -> None:
        d = sum(shape.numel() for shape in self.shapes.values())
        if theta.shape != (d,) or theta.dtype != self.dtype or theta.device != self.device:
            raise ValueError(
                f"theta must be ({d},) {self.dtype} on {self.device}, got {tuple(theta.shape)} "
                f"{theta.dtype} on {theta.device}; make it with flatten(module), and use vmap for "
                "a batch"
            )

    @torch.no_grad()
    def _check_pure(self, theta: Tensor) -> None:
        """Raises ValueError if the forward pass writes into its inputs or its buffers.

        F would then depend on earlier calls, `torch.func` could not differentiate it, and the
        caller's own inputs would change.
        """
        share, inputs, targets = self._chunks[0]
        inputs = tuple(tensor.clone() for tensor in inputs)
        for _ in range(2):  # the first pass may fill a cache that later passes only read
            buffers = {n: (b, b._version) for n, b in self._module.named_buffers()}
            versions = [tensor._version for tensor in inputs]
            self._run((share, inputs, targets), self._loss, theta)
        after = dict(self._module.named_buffers())
        written = [
            f"buffer {name!r}"
            for name, (buffer, version) in buffers.items()
            if after.get(name) is not buffer or buffer._version != version
        ]
        written += [f"inputs[{i}]" for i, x in enumerate(inputs) if x._version != versions[i]]
        if written:
            raise ValueError(
                f"module must write into nothing but parameters, got a forward pass that writes "
                f"into {', '.join(written)} in eval mode; give that layer inplace=False, or update "
                "buffers only `if self.training`"
            )

    def _matching(self, source: nn.Module | Mapping[str, Tensor]) -> list[Tensor]:
        """Returns the tensors of ``source`` in the order of θ."""
        tensors: Mapping[str, Tensor] = (
            dict(source.named_parameters()) if isinstance(source, nn.Module) else source
        )
        for name, shape in self.shapes.items():
            if name not in tensors or tensors[name].shape != shape:
                found = tuple(tensors[name].shape) if name in tensors else "nothing"
                raise ValueError(
                    f"{name} must be {tuple(shape)}, got {found}; use a module of the same "
                    "architecture (the .module of a DistributedDataParallel)"
                )
        return [tensors[name] for name in self.shapes]

    def _unflatten(self, theta: Tensor) -> dict[str, Tensor]:
        """Returns copies of the parameters by name; a forward pass may write into them."""
        parts = theta.split([shape.numel() for shape in self.shapes.values()])
        return {
            name: part.view(shape).clone()
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def _split(self, inputs, targets, chunk_size) -> list[tuple[float, tuple[Tensor, ...], Tensor]]:
        n = len(targets)
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}; None means all")
        count = -(-n // (chunk_size or n))
        parts = (self._place(tensor).tensor_split(count) for tensor in (*inputs, targets))
        return [(len(y) / n, tuple(x), y) for *x, y in zip(*parts, strict=True)]

    def _place(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self.device, self.dtype if tensor.is_floating_point() else None)

    def _run(self, chunk, result: Callable, theta: Tensor, pooled: Tensor | None = None) -> Tensor:
        """Returns ``result(outputs, targets)`` of one chunk.

        Batch norm uses the ``pooled`` statistics if they are given, else those of the chunk.
        """

        def forward(theta: Tensor, *pooled: Tensor) -> Tensor:
            _, inputs, targets = chunk
            self._seen, self._given = [], None
            if pooled:
                self._given = (moments for _, moments in self._by_call(*pooled))
            outputs = functional_call(self._module, self._unflatten(theta), inputs)
            value = result(outputs, targets)
            self._seen, self._given = [], None  # they hold the graph
            return value

        arguments = (theta,) if pooled is None else (theta, pooled)
        return vjp(forward, *arguments)[0] if self._recurrent else forward(*arguments)

    def _loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return check_loss(self.loss_fn(outputs, targets))

    def _normalize(self, layer: _BatchNorm, x: Tensor) -> Tensor:
        """Runs the forward pass of a recalibrated batch-norm layer."""
        if self._given is not None:
            mean, variance = next(self._given)
        else:
            axes = [axis for axis in range(x.ndim) if axis != 1]
            variance, mean = torch.var_mean(x, axes, correction=0)
            self._seen.append((layer, torch.stack((mean, variance))))
        # nn.functional.batch_norm does not differentiate through the statistics that it is given.
        scale = (variance + layer.eps).rsqrt()
        if layer.affine:
            scale = scale * layer.weight
        channels = (-1, *[1] * (x.ndim - 2))
        x = (x - mean.view(channels)) * scale.view(channels)
        return x + layer.bias.view(channels) if layer.affine else x

    def _moments(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Returns means and variances ``(2, channels)`` of the batch-norm layers in call order."""
        self._calls = [layer for layer, _ in self._seen]
        return torch.cat([moments for _, moments in self._seen], dim=1)

    def _pool(self, theta: Tensor) -> Tensor:
        """Returns the means and variances over all data, ``(2, channels)``."""
        parts = [
            _recompute(partial(self._run, chunk, self._moments), theta) for chunk in self._chunks
        ]
        mean = _sum(chunk[0] * part[0] for chunk, part in zip(self._chunks, parts, strict=True))
        variance = _sum(
            chunk[0] * (part[1] + (part[0] - mean).square())
            for chunk, part in zip(self._chunks, parts, strict=True)
        )
        return torch.stack((mean, variance))

    def _by_call(self, pooled: Tensor):
        parts = pooled.split([layer.num_features for layer in self._calls], dim=1)
        return zip(self._calls, parts, strict=True)


def _copy(module: nn.Module) -> nn.Module:
    try:
        return deepcopy(module)
    except RuntimeError as error:
        raise ValueError(
            f"module must be one that copy.deepcopy can copy, got {error}; replace "
            "torch.nn.utils.weight_norm and spectral_norm, which keep a computed weight, by those "
            "in torch.nn.utils.parametrizations"
        ) from error


def _recompute(function: Callable, *tensors: Tensor) -> Tensor:
    """Returns the tensor ``function(*tensors)`` and recomputes it for gradients.

    Only ``tensors`` are stored. `torch.utils.checkpoint` does this for autograd, but not under
    `torch.func`.
    """
    return _Recompute.apply(lambda *tensors: (function(*tensors),), *tensors)[0]


class _Recompute(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(function, *tensors):
        return function(*tensors)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.function = inputs[0]
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx, *gradients):
        def pull_back(*arguments):
            gradients, tensors = arguments[:count], arguments[count:]
            return vjp(ctx.function, *tensors)[1](gradients)

        # The backward pass is recomputed too, because torch.func.grad keeps its graph.
        count = len(gradients)
        return (None, *_Recompute.apply(pull_back, *gradients, *ctx.saved_tensors))


@torch.no_grad()
def check_deterministic(loss_fn: Callable[[Tensor], Tensor], theta: Tensor) -> None:
    """Evaluates F twice at ``theta`` ``(d,)`` and raises if the two values differ.

    Differences within the certificate's tolerance pass, because some GPU kernels sum in varying
    order.

    Raises:
        ValueError: F is random, such as the loss of a fresh minibatch.
    """
    first, second = loss_fn(theta), loss_fn(theta)
    tolerance = TOLERANCE.get(first.dtype, 0.0)
    if not torch.allclose(first, second, rtol=tolerance, atol=tolerance, equal_nan=True):
        raise ValueError(
            f"loss_fn must be deterministic, got {first.item()} and {second.item()} at the same "
            "theta; use the loss on one fixed evaluation set, without dropout or other noise, "
            "because the level of one minibatch does not hold for the next"
        )


def _sum(parts: Iterable[Tensor]) -> Tensor:
    """Returns the sum of one or more tensors."""
    return reduce(torch.add, parts)


def _read(inputs, targets) -> tuple[tuple[Tensor, ...], Tensor]:
    """Returns the data as (inputs, targets), all ``(n, ...)``."""
    fix = (
        "F must be the loss on one fixed evaluation set: give tensors, or a DataLoader with "
        "shuffle=False, which is read once"
    )
    if isinstance(inputs, DataLoader):
        # with a custom batch sampler, inputs.sampler is always sequential
        sampler: Any = inputs.batch_sampler
        if type(sampler) is BatchSampler:
            sampler = sampler.sampler
        sampler = inputs.sampler if sampler is None else sampler
        if not isinstance(sampler, SequentialSampler):
            raise ValueError(
                f"inputs must come in one fixed order, got a DataLoader with "
                f"{type(sampler).__name__}; {fix}"
            )
        batches = list(inputs)
        for batch in batches:
            if not isinstance(batch, tuple | list) or len(batch) < 2 or targets is not None:
                raise ValueError(
                    f"inputs as a DataLoader must yield (inputs, targets) batches, with "
                    f"targets=None, got batches of type {type(batch).__name__} and targets of type "
                    f"{type(targets).__name__}; give tensors instead"
                )
        *inputs, targets = (torch.cat(part) for part in zip(*batches, strict=True))
    inputs = tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
    for name, value in (*(("inputs", value) for value in inputs), ("targets", targets)):
        if not torch.is_tensor(value):
            raise ValueError(f"{name} must be a tensor, got {type(value).__name__}; {fix}")
        if value.ndim == 0 or len(value) == 0 or len(value) != len(inputs[0]):
            raise ValueError(
                f"{name} must be (n, ...) with n ≥ 1 the same for all, got {tuple(value.shape)} "
                f"with inputs {tuple(inputs[0].shape)}; put examples first (batch_first=True)"
            )
    return inputs, targets


def _recalibrated(module: nn.Module, recalibrate: bool | None) -> dict[str, _BatchNorm]:
    """Returns the layers to recalibrate by name."""
    layers: dict[str, Any] = {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, _BatchNorm) or getattr(layer, "running_mean", None) is not None
    }
    if layers and recalibrate is None:
        raise ValueError(
            f"recalibrate must be chosen for a module with batch norm, got None with {list(layers)}"
            "; use recalibrate=True for the statistics of the data at each theta, or False for the "
            "module's running statistics, which hold for its own parameters but not along a path"
        )
    for name, layer in layers.items():
        if recalibrate and type(layer) not in BATCH_NORMS:
            raise ValueError(
                f"recalibrate=True supports nn.BatchNorm1d, 2d, 3d and SyncBatchNorm, got "
                f"{type(layer).__name__} at {name!r}; replace that layer"
            )
        if not recalibrate and layer.running_mean is None:
            raise ValueError(
                f"recalibrate=False needs running statistics, got none at {name!r} "
                "(track_running_stats=False); use recalibrate=True"
            )
    return layers if recalibrate else {}
