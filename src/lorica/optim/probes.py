"""The losses at many candidate points of the trainable parameters, which are only read."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lorica import randomness
from lorica.adapters.branches import can_branch, can_share, unchanged_once
from lorica.errors import ConfigError
from lorica.optim.directions import flat_size
from lorica.processes import Processes
from lorica.tasks.batching import Batch, most_tokens, share
from lorica.tasks.objectives import LossModule, RepeatAt

MAX_TOKENS = 4096  # of a pass of several branches, at most
WORTH = 0.95  # more branches a pass must take less than this share of the time
NUM_TIMINGS = 3  # of which the least counts
SPREAD = 0.1  # standard deviation of the noise that puts two points well apart


@dataclass(frozen=True)
class Probe:
    """A point to take the loss at: so far along a direction of the step."""

    direction: int
    distance: float


@dataclass(frozen=True)
class Points:
    """The points θ + distance · move of some probes, by θ (n,) and moves (K, n), each made where it is asked for."""

    theta: Tensor
    moves: Tensor
    probes: Sequence[Probe]

    def __len__(self) -> int:
        return len(self.probes)

    def split(self, size: int) -> Iterator[Points]:
        """So many at a time, in order."""
        for start in range(0, len(self), size):
            yield replace(self, probes=self.probes[start : start + size])

    def made(self) -> Tensor:
        """(G, n) float32."""
        points = self.moves.new_empty(len(self), len(self.theta))
        for point, probe in zip(points, self.probes, strict=True):
            torch.mul(self.moves[probe.direction], probe.distance, out=point)
        return points.add_(self.theta)


@dataclass(frozen=True)
class Pass:
    """A batch, and the model that its losses are asked of."""

    objective: LossModule
    trainable: Mapping[str, nn.Parameter]
    batch: Batch

    @property
    def num_tokens(self) -> int:
        """With padding, which takes as long."""
        return max(tensor.numel() for tensor in self.batch.inputs.values())

    @property
    def most_branches(self) -> int:
        """That fit into a pass, at least 1."""
        return max(1, int(min(most_tokens(self.objective.model), MAX_TOKENS)) // self.num_tokens)

    def losses(self, points: Points, num_branches: int, repeat_at: RepeatAt) -> Tensor:
        """(G,) float64: the batch's loss at each of the points, so many of them in one pass."""
        with unchanged_once(self.objective.model, list(self.trainable)):
            found = [self._in_one_pass(group.made(), repeat_at) for group in points.split(num_branches)]
        return torch.cat(found).double()

    def _in_one_pass(self, points: Tensor, repeat_at: RepeatAt) -> Tensor:
        """(G,): the losses at points (G, n)."""
        if len(points) == 1:
            return self.objective.loss_at(self._named(points[0]), self.batch).view(1)
        return self.objective.losses_at(self._named(points), self.batch, repeat_at=repeat_at)

    def _named(self, points: Tensor) -> dict[str, Tensor]:
        """Each parameter's part of points (..., n), in the shape (..., *its own)."""
        parts = torch.split(points, [parameter.numel() for parameter in self.trainable.values()], dim=-1)
        return {
            name: part.reshape(*part.shape[:-1], *parameter.shape).to(parameter.device)
            for (name, parameter), part in zip(self.trainable.items(), parts, strict=True)
        }


@dataclass
class Probing:
    """How candidates are evaluated: so many of them as branches of one forward pass, until all are done.

    `max_branches` is that number, 1 being one after the other. Where it is None as many are taken as fit into a pass by
    their tokens, which is the same in every run. Where it is `timed` besides, it is chosen when a batch of a kind is
    first seen, for each number of candidates and each octave of tokens: powers of two are timed until more take longer.
    Where memory does not suffice for so many, half of them are taken for all batches of that kind, and so on down to 1.
    Branches are taken only if a first batch has the same losses in one pass as in two, at two points well apart.

    Of several processes each evaluates its share of the examples, and the sums are exchanged once.

    What is chosen decides how the losses are rounded, so a run that resumes needs `state`.
    """

    max_branches: int | None = None
    timed: bool = False
    repeat_at: RepeatAt | Literal["never", "unknown"] = "unknown"
    chosen: dict[str, int] = field(default_factory=dict)
    processes: Processes = field(default_factory=Processes)

    @torch.no_grad()
    def losses(
        self,
        objective: LossModule,
        trainable: Mapping[str, nn.Parameter],
        batches: Sequence[Batch],
        moves: Tensor,
        probes: Sequence[Probe] | None = None,
    ) -> Tensor:
        """(G,) float64: the mean loss over the batches at each of the probes, by moves (K, n) of the flat parameters.

        Without probes at θ + each of the moves. Raises ConfigError if `max_branches` asks for branches and the model
        cannot run them.
        """
        probes = [Probe(at, 1.0) for at in range(len(moves))] if probes is None else probes
        points = Points(_flat(trainable).to(moves.device), moves, probes)
        found = [self._share_of_losses(Pass(objective, trainable, batch), points) for batch in batches]
        return self.processes.summed(torch.stack(found).mean(dim=0).cpu())

    def _share_of_losses(self, of: Pass, points: Points) -> Tensor:
        """(G,) float64: what this process's examples add to the batch's losses."""
        mine = share(of.batch, self.processes.rank, self.processes.num)
        if mine.weight == 0:
            return points.theta.new_zeros(len(points), dtype=torch.float64)
        return self._losses(replace(of, batch=mine.batch), points) * mine.weight

    def _losses(self, of: Pass, points: Points) -> Tensor:
        most = min(len(points), self.max_branches or of.most_branches)
        if most > 1 and self.repeat_at == "unknown":
            self.repeat_at = _where_to_repeat(of)
        if most == 1 or self.repeat_at == "never" or self.repeat_at == "unknown":
            self._check_not_asked_for(most)
            return of.losses(points, 1, "inputs")
        if self.max_branches is not None:
            return of.losses(points, most, self.repeat_at)
        kind = self.kind(len(points), of.num_tokens)
        if self.timed and kind not in self.chosen:
            self.chosen[kind] = _fastest(of, points, most, self.repeat_at)
        most = min(most, self.chosen.get(kind, most))
        found, num_branches = _as_memory_allows(of, points, most, self.repeat_at)
        if num_branches < most:
            self.chosen[kind] = num_branches
        return found

    @staticmethod
    def kind(num_candidates: int, num_tokens: int) -> str:
        """The key in `chosen` of a number of candidates and a batch's tokens with padding."""
        return f"{num_candidates} candidates, up to {2 ** num_tokens.bit_length() - 1} tokens"

    def _check_not_asked_for(self, num_branches: int) -> None:
        if self.max_branches is not None and num_branches > 1:
            raise ConfigError(
                f"zo.branches={self.max_branches}: this model's parameters cannot be run as branches of one pass: use "
                f"zo.branches=1 or auto"
            )

    def state(self) -> dict[str, Any]:
        """Everything that a checkpoint must keep, as JSON takes it."""
        return {"repeat_at": self.repeat_at, "chosen": dict(self.chosen)}

    def restore(self, state: dict[str, Any]) -> None:
        """Put a kept state back."""
        self.repeat_at, self.chosen = state["repeat_at"], dict(state["chosen"])


def _flat(trainable: Mapping[str, nn.Parameter]) -> Tensor:
    return torch.cat([parameter.reshape(-1) for parameter in trainable.values()])  # (n,)


def _where_to_repeat(of: Pass) -> RepeatAt | Literal["never"]:
    """Where branches may part so that their losses are those of passes of their own; the later the better."""
    model, names = of.objective.model, list(of.trainable)
    if not can_branch(model, names):
        return "never"
    theta = _flat(of.trainable)
    noise = randomness.normals(0, "branches", size=2 * flat_size(of.trainable)).view(2, -1).to(theta.device)
    points = Points(theta, noise, [Probe(0, SPREAD), Probe(1, SPREAD)])
    expected = torch.cat([of.losses(point, 1, "inputs") for point in points.split(1)])
    tolerance = max(
        [1e-4, *(4 * torch.finfo(each.dtype).eps for each in model.parameters() if each.is_floating_point())]
    )
    places: list[RepeatAt] = ["blocks", "inputs"] if can_share(model, names) else ["inputs"]
    for repeat_at in places:
        try:
            found = of.losses(points, 2, repeat_at)
        except (RuntimeError, ValueError, IndexError):  # what was repeated met what was not
            continue
        if torch.allclose(found, expected, rtol=tolerance, atol=tolerance):
            return repeat_at
    return "never"


def _as_memory_allows(of: Pass, points: Points, num_branches: int, repeat_at: RepeatAt) -> tuple[Tensor, int]:
    """The losses, and with how many branches a pass: half as many as often as memory does not suffice."""
    try:
        return of.losses(points, num_branches, repeat_at), num_branches
    except torch.OutOfMemoryError:
        if num_branches == 1:
            raise
    return _as_memory_allows(of, points, num_branches // 2, repeat_at)  # what was in the way is freed by now


def _fastest(of: Pass, points: Points, most: int, repeat_at: RepeatAt) -> int:
    """How many branches a pass evaluate the points in the least time: a power of two, or `most`."""
    best, least = 1, math.inf
    for exponent in range((most - 1).bit_length() + 1):
        num_branches = min(2**exponent, most)
        try:
            seconds = min(_seconds(of, points, num_branches, repeat_at) for _ in range(NUM_TIMINGS))
        except torch.OutOfMemoryError:
            break
        if seconds > WORTH * least:
            break
        best, least = num_branches, seconds
    return best


def _seconds(of: Pass, points: Points, num_branches: int, repeat_at: RepeatAt) -> float:
    begin = time.perf_counter()
    of.losses(points, num_branches, repeat_at).tolist()  # which waits for the device
    return time.perf_counter() - begin
