"""A network under training, as a training loop sees it: named tensors, a loss, evaluations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

TENSOR_KINDS = ("embedding", "head", "convolution", "matrix", "vector")


class Parameters(list[Tensor]):
    """The tensors to train, a list as torch.optim takes it, with the name and kind of each.

    Attributes:
        names: of the tensors, in their order.
        kinds: one of TENSOR_KINDS for each tensor. Where no module says more, the number of
            dimensions decides: up to one is a vector, two a matrix, more a convolution.
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
        """The parameters of a module.

        Weights of nn.Embedding are embeddings, also where the output layer shares them. The last
        matrix of the others, in the module's order, is the head.
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
    """One network and its data under training.

    Attributes:
        params: what an optimizer may change.
        loss: of a step, the loss of its minibatch in training mode, to differentiate. Steps are
            asked for in order, as a task may change on its way.
        evaluate: losses and accuracies at the end, on all data, in evaluation mode. With True,
            running statistics are first renewed at the present weights: an optimizer may evaluate
            at other weights than it trains at.
        validate: the validation loss, in the same way; None for a task without such a split.
    """

    params: Parameters
    loss: Callable[[int], Tensor]
    evaluate: Callable[[bool], dict[str, float]]
    validate: Callable[[bool], float] | None = None


def _kind_of_shape(tensor: Tensor) -> str:
    return ("vector", "vector", "matrix")[tensor.dim()] if tensor.dim() < 3 else "convolution"
