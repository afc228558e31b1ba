"""Zeroth order for a whole model in the memory of a forward pass: directions are drawn a few rows at a time.

A probe never writes to the model. Within it, every operation that is handed a parameter works on θ + ε·z of just the
rows that it needs, made then and dropped at once; a step adds up the same draws again. Nothing of the model's size is
held beside the model, and whatever happens inside a probe, the weights keep their bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lorica import randomness
from lorica.errors import ModelError
from lorica.optim.backprop import Estimate
from lorica.optim.directions import Directions
from lorica.optim.probes import Probe
from lorica.optim.scaling import Scaling
from lorica.optim.slopes import MEASURES, SlopesName
from lorica.optim.zeroth_order import estimated
from lorica.processes import Processes
from lorica.tasks.batching import Batch, share
from lorica.tasks.objectives import LossModule

CHUNK = {"cpu": 1 << 18}  # numbers of a parameter that are made or written at a time: 1 MiB stays in the cache
CHUNK_ELSEWHERE = 1 << 21


@dataclass
class StreamedZerothOrder:
    """`ZerothOrder` for parameters too many for a second copy, together with `StreamedDescent`.

    Where a step leads is not a gradient but a note: the step's number and the weights of its directions, which name
    their draws. The losses are those of θ + ε·z in the parameters' own dtype, one probe after the other.
    """

    estimator: SlopesName = "spsa"
    epsilon: float = 1e-3
    directions: Directions = field(default_factory=lambda: Directions(distribution="rademacher"))
    scaling: Scaling = field(default_factory=Scaling)
    processes: Processes = field(default_factory=Processes)
    noted: tuple[int, tuple[float, ...]] | None = None

    def __call__(
        self,
        objective: LossModule,
        trainable: Mapping[str, nn.Parameter],
        batches: Sequence[Batch],
        step: int,
    ) -> Estimate:
        around = Streamed(objective, trainable, batches, self.directions, step, self.processes)
        estimate = estimated(MEASURES[self.estimator](around, self.epsilon), self.scaling, self.epsilon)
        self.set_gradient(trainable, step, estimate.weights)
        return estimate

    def set_gradient(self, trainable: Mapping[str, nn.Parameter], step: int, weights: Sequence[float]) -> None:
        """Note where a step leads, for the optimizer; no loss is asked for."""
        self.noted = step, tuple(weights)

    def state(self) -> dict[str, Any]:
        """Everything that a checkpoint must keep, as JSON takes it."""
        return {"scaling": self.scaling.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Put a kept state back."""
        self.scaling.restore(state["scaling"])


@dataclass(frozen=True)
class Streamed:
    """`Around` (see `slopes`) where no direction is ever held whole."""

    objective: LossModule
    trainable: Mapping[str, nn.Parameter]
    batches: Sequence[Batch]
    directions: Directions
    step: int
    processes: Processes

    @property
    def num_directions(self) -> int:
        return self.directions.num

    @property
    def num_batches(self) -> int:
        return len(self.batches)

    def losses(self, probes: Sequence[Probe]) -> list[float]:
        found = torch.tensor([self._loss(probe) for probe in probes], dtype=torch.float64)
        return self.processes.summed(found).tolist()

    def along(self) -> list[tuple[float, float]]:
        raise ModelError(
            "forward_gradient holds a tangent beside every parameter, which is a second model: use spsa or one_sided"
        )

    @torch.no_grad()
    def _loss(self, probe: Probe) -> float:
        """What this process's examples add to the mean loss over the batches."""
        total = 0.0
        with Moved(self.trainable, self.directions, self.step, probe):
            for batch in self.batches:
                mine = share(batch, self.processes.rank, self.processes.num)
                if mine.weight:
                    total += float(self.objective(mine.batch)) * mine.weight
        return total / self.num_batches


class Moved(TorchFunctionMode):
    """Within it, every operation of torch that is handed a parameter sees it moved along a probe's direction.

    Linear maps and look-ups make the rows that they need, at most `CHUNK` numbers at a time; any other operation gets
    the moved parameter whole, for as long as it takes. A parameter that several modules share moves as one.
    """

    def __init__(self, trainable: Mapping[str, nn.Parameter], directions: Directions, step: int, probe: Probe) -> None:
        super().__init__()
        self.names = {id(parameter): name for name, parameter in trainable.items()}
        self.directions, self.step, self.probe = directions, step, probe

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if not (self._any_moves(args) or self._any_moves(kwargs.values())) or _name(func) in UNMOVED:
            return func(*args, **kwargs)
        by_rows = BY_ROWS.get(func)
        if by_rows is not None:
            found = by_rows(self, *args, **kwargs)
            if found is not None:
                return found
        return func(*map(self._moved, args), **{name: self._moved(value) for name, value in kwargs.items()})

    def moves(self, value: Any) -> bool:
        """Whether this is one of the parameters."""
        return id(value) in self.names

    def rows(self, parameter: Tensor, rows: Sequence[int]) -> Tensor:
        """(len(rows), width): rows of a parameter's `matrix` where the probe puts them, in its dtype."""
        whole = matrix(parameter)
        here = whole[rows.start : rows.stop] if isinstance(rows, range) else whole[torch.as_tensor(rows)]
        name, probe = self.names[id(parameter)], self.probe
        z = self.directions.of_rows(self.step, probe.direction, name, rows, whole.shape[1], whole.device)
        return torch.add(here, z, alpha=probe.distance, out=z).to(parameter.dtype)

    def looked_up(self, parameter: Tensor, places: Tensor) -> Tensor:
        """(*places.shape, *the rest): the moved rows at `places`, each made once however often it is asked for."""
        asked, at = torch.unique(places, return_inverse=True)
        return self.rows(parameter, asked.tolist())[at].view(*places.shape, *parameter.shape[1:])

    def whole(self, parameter: Tensor) -> Tensor:
        return _joined([self.rows(parameter, rows) for rows in chunks(parameter)], dim=0).view_as(parameter)

    def _moved(self, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(map(self._moved, value))
        return self.whole(value) if self.moves(value) else value

    def _any_moves(self, values: Iterable[Any]) -> bool:
        return any(self.moves(each) or (isinstance(each, list | tuple) and self._any_moves(each)) for each in values)


def _linear(moved: Moved, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    if not moved.moves(weight):
        return None
    bias = moved.whole(bias) if bias is not None and moved.moves(bias) else bias
    parts = [
        F.linear(input, moved.rows(weight, rows), None if bias is None else bias[rows.start : rows.stop])
        for rows in chunks(weight)
    ]
    return _joined(parts, dim=-1)


def _addmm(moved: Moved, input: Tensor, mat1: Tensor, mat2: Tensor, **scales: float) -> Tensor | None:
    """GPT-2's linear layer, whose weight is (in, out): a sum over the parts of the input."""
    if scales or not moved.moves(mat2):
        return None
    y = moved.whole(input) if moved.moves(input) else input
    for rows in chunks(mat2):
        y = torch.addmm(y, mat1[:, rows.start : rows.stop], moved.rows(mat2, rows))
    return y


def _embedding(
    moved: Moved, input: Tensor, weight: Tensor, padding_idx: Any = None, max_norm: Any = None, *_: Any, **__: Any
) -> Tensor | None:
    return moved.looked_up(weight, input) if max_norm is None else None


def _getitem(moved: Moved, parameter: Tensor, index: Any) -> Tensor | None:
    is_rows = isinstance(index, Tensor) and index.dtype == torch.long and parameter.dim() > 1
    return moved.looked_up(parameter, index % len(parameter)) if is_rows else None


# What can be done with some rows of a parameter at a time; None where it cannot after all.
BY_ROWS: dict[Any, Callable[..., Tensor | None]] = {
    F.linear: _linear,
    F.embedding: _embedding,
    torch.addmm: _addmm,
    Tensor.__getitem__: _getitem,
}
# What is asked of a parameter beside its numbers.
UNMOVED = frozenset(
    (
        *("dtype", "device", "shape", "size", "dim", "ndim", "numel", "stride", "layout", "element_size", "__len__"),
        *("requires_grad", "is_cuda", "is_meta", "is_floating_point", "is_contiguous", "is_leaf", "is_quantized"),
    )
)


def _name(func: Any) -> str:
    """What is called; of the getter of an attribute, the attribute."""
    return func.__self__.__name__ if func.__name__ == "__get__" else func.__name__  # type: ignore[no-any-return]


class StreamedDescent(torch.optim.Optimizer):
    """Plain gradient descent along what `estimator` has noted: θ ← θ − rate · (Σ w_i·z_i + decay·θ), rows at a time.

    Half-precision parameters are rounded stochastically, by draws keyed by (seed, "rounding", step): a step is far
    smaller than the gap between two of their numbers, and rounded to the nearest it would vanish. At rate 0 no bit
    moves.
    """

    def __init__(
        self,
        trainable: Mapping[str, nn.Parameter],
        estimator: StreamedZerothOrder,
        *,
        learning_rate: float,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(list(trainable.values()), {"lr": learning_rate, "weight_decay": weight_decay})
        self.trainable, self.estimator = trainable, estimator

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take the step that was noted."""
        rate, decay = (self.param_groups[0][name] for name in ("lr", "weight_decay"))
        if rate == 0.0:
            return
        for name, parameter in self.trainable.items():
            for rows in chunks(parameter):
                self._descend(name, matrix(parameter)[rows.start : rows.stop], rows, rate, decay)

    def _descend(self, name: str, here: Tensor, rows: range, rate: float, decay: float) -> None:
        """`here` (len(rows), width) are the rows themselves, which are written."""
        assert self.estimator.noted is not None
        step, weights = self.estimator.noted
        directions, width = self.estimator.directions, here.shape[1]
        exact = here.float()  # here itself, where that is float32
        if decay:
            exact.mul_(1.0 - rate * decay)
        for index, weight in enumerate(weights):
            if weight != 0.0:
                z = directions.of_rows(step, index, name, rows, width, here.device)
                exact.add_(z, alpha=-rate * weight)
        if here.dtype != torch.float32:
            keys = (directions.seed, "rounding", step, name)
            uniform = randomness.uniform_rows(*keys, rows=rows, width=width, device=here.device)
            here.copy_(stochastically_rounded(exact, here.dtype, uniform))


def stochastically_rounded(exact: Tensor, dtype: torch.dtype, uniform: Tensor) -> Tensor:
    """float32 numbers as 16-bit floats: one of the two neighbours, so that the mean over `uniform` in [0, 1) is exact.

    A number that the dtype has stays as it is. Beyond its range it is rounded as always, to infinity.
    """
    nearest = exact.to(dtype)
    error = exact - nearest.float()
    bits = nearest.view(torch.int16)  # the next larger magnitude is the next integer
    from_zero = torch.where(error > 0, 1, -0x7FFF).to(torch.int16)  # the smallest number of either sign
    step = torch.where((error > 0) == (nearest > 0), 1, -1).to(torch.int16)
    other = torch.where(nearest == 0, from_zero, bits + step).view(dtype)
    gap = (other.float() - nearest.float()).abs()
    return torch.where(uniform * gap < error.abs(), other, nearest)


def matrix(parameter: Tensor) -> Tensor:
    """(rows, width): the parameter's own memory, a vector as a single row."""
    return parameter.detach().view(1 if parameter.dim() < 2 else len(parameter), -1)


def chunks(parameter: Tensor) -> list[range]:
    """The rows of a parameter's `matrix`, at most `CHUNK` numbers at a time."""
    num_rows, width = matrix(parameter).shape
    size = max(1, CHUNK.get(parameter.device.type, CHUNK_ELSEWHERE) // width)
    return [range(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)
