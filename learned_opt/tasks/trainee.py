"""What a training loop needs of a task: named parameters, a loss, and evaluations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

TENSOR_KINDS = ("embedding", "head", "convolution", "matrix", "vector")


class Parameters(list[Tensor]):
    """A list of tensors to train, as torch.optim takes it, with the name and the kind of each.

    Attributes:
        names: the names of the tensors, in their order.
        kinds: one of TENSOR_KINDS for each tensor. If no module is known, the number of dimensions
            decides: up to one is a vector, two are a matrix, and more are a convolution.
    """

    def __init__(
        self,
        tensors: Iterable[Tensor],
        names: Sequence[str] | None = None,
        kinds: Sequence[str] | None = None,
    ) -> None:
        super().__init__(tensors)
        self.names = list(map(str, range(len(self))) if names is None else names)
        self.kinds = list(map(_kind_of_shape, self) if kinds is None else kinds)

    @classmethod
    def of(cls, module: nn.Module) -> Parameters:
        """Returns the parameters of a module.

        The weight of an nn.Embedding is an embedding, also if the output layer shares it. If the
        output layer does not share it, the last matrix in the module's order is the head.
        """
        names, tensors = zip(*module.named_parameters(), strict=True)
        embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
        kinds = ["embedding" if id(p) in embeddings else _kind_of_shape(p) for p in tensors]
        tied = any(isinstance(m, nn.Linear) and id(m.weight) in embeddings
                   for m in module.modules())  # fmt: skip
        if "matrix" in kinds and not tied:
            kinds[len(kinds) - 1 - kinds[::-1].index("matrix")] = "head"
        return cls(tensors, names, kinds)


@dataclass(frozen=True)
class Trainee:
    """A network and its data, ready to be trained.

    Attributes:
        params: the parameters that an optimizer may change.
        loss: maps the number of a step to the differentiable loss of its minibatch, in training
            mode. It must be called for the steps in order, because a task may change over time.
        evaluate: returns losses and accuracies on all data, in evaluation mode. Called with True,
            it first recomputes the running statistics of batch norm at the present weights.
            Optimizers such as Schedule-Free need this, because they evaluate at other weights than
            they train at.
        validate: returns the validation loss, in the same way; None for a task without a validation
            split.
    """

    params: Parameters
    loss: Callable[[int], Tensor]
    evaluate: Callable[[bool], dict[str, float]]
    validate: Callable[[bool], float] | None = None


def _kind_of_shape(tensor: Tensor) -> str:
    return ("vector", "vector", "matrix")[tensor.dim()] if tensor.dim() < 3 else "convolution"
