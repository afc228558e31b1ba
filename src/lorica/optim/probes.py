"""The losses at many candidate points of the trainable parameters, which are only read."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lorica import randomness
from lorica.adapters.branches import can_branch, can_share
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

    def losses(self, points: Tensor, num_branches: int, repeat_at: RepeatAt) -> Tensor:
        """(G,) float64: the batch's loss at each of the points (G, n), so many of them in one pass."""
        found = []
        for group in torch.split(points, num_branches):
            if len(group) == 1:
                found.append(self.objective.loss_at(self._named(group[0]), self.batch).view(1))
            else:
                found.append(self.objective.losses_at(self._named(group), self.batch, repeat_at=repeat_at))
        return torch.cat(found).double()

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
        offsets: Tensor,
    ) -> Tensor:
        """(G,) float64: the mean loss over the batches at θ + offsets[g], each (n,) laid on the flat parameters.

        Raises ConfigError if `max_branches` asks for branches and the model cannot run them.
        """
        points = _flat(trainable).to(offsets.device) + offsets
        found = [self._share_of_losses(Pass(objective, trainable, batch), points) for batch in batches]
        return self.processes.summed(torch.stack(found).mean(dim=0).cpu())

    def _share_of_losses(self, of: Pass, points: Tensor) -> Tensor:
        """(G,) float64: what this process's examples add to the batch's losses."""
        mine = share(of.batch, self.processes.rank, self.processes.num)
        if mine.weight == 0:
            return points.new_zeros(len(points), dtype=torch.float64)
        return self._losses(replace(of, batch=mine.batch), points) * mine.weight

    def _losses(self, of: Pass, points: Tensor) -> Tensor:
        most = min(len(points), self.max_branches or of.most_branches)
        if most > 1 and self.repeat_at == "unknown":
            self.repeat_at = _where_to_repeat(of)
        if most == 1 or self.repeat_at == "never" or self.repeat_at == "unknown":
            self._check_not_asked_for(most)
            return of.losses(points, 1, "inputs")
        if self.max_branches is None and self.timed:
            kind = self.kind(len(points), of.num_tokens)
            if kind not in self.chosen:
                self.chosen[kind] = _fastest(of, points, most, self.repeat_at)
            most = min(most, self.chosen[kind])
        return of.losses(points, most, self.repeat_at)

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
    noise = randomness.normals(0, "branches", size=2 * flat_size(of.trainable)).view(2, -1) * SPREAD
    theta = _flat(of.trainable)
    points = theta + noise.to(theta.device)
    expected = of.losses(points, 1, "inputs")
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


def _fastest(of: Pass, points: Tensor, most: int, repeat_at: RepeatAt) -> int:
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


def _seconds(of: Pass, points: Tensor, num_branches: int, repeat_at: RepeatAt) -> float:
    begin = time.perf_counter()
    of.losses(points, num_branches, repeat_at).tolist()  # which waits for the device
    return time.perf_counter() - begin
