"""J(L_1 … L_T) of the tasks' losses and its gradient in u, by backpropagation or from forward passes alone.

Every J is a function of the tasks' losses, so ∇J = Σ ∂J/∂L_t · ∇L_t, and one task's graph is in memory at a time. A
task's loss is the mean over its micro-batches, and J is taken of that. Nothing is written to the model.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from lorica import randomness
from lorica.errors import ModelError
from lorica.merging.fitting.losses import Losses
from lorica.merging.fitting.options import Descent
from lorica.merging.fitting.problem import FittingTask
from lorica.tasks.batching import Batch

Total = Callable[[Tensor], Tensor]  # J of the tasks' losses (T,)
StepBatches = Sequence[Sequence[Batch]]  # of each task its micro-batches


@dataclass(frozen=True, eq=False)
class Objective:
    """J as a function of u, by way of the coefficients c (K,) and the tasks' losses there."""

    losses: Losses
    total: Total
    coefficients: Callable[[Tensor], Tensor]

    @property
    def tasks(self) -> Sequence[FittingTask]:
        return self.losses.problem.tasks


@dataclass(frozen=True)
class Estimate:
    """J, the tasks' losses (T,) and the gradient of J in u, all in float64 on the CPU; of spsa the probes' means."""

    value: float
    losses: Tensor
    gradient: Tensor


class Estimator(Protocol):
    """The gradient at u of one step's batches. What is asked of chance is keyed by the step."""

    def __call__(self, objective: Objective, u: Tensor, batches: StepBatches, step: int) -> Estimate: ...


def estimator(descent: Descent) -> Estimator:
    """The estimator that the options name."""
    if descent.estimator == "backprop":
        return backprop
    if descent.estimator == "spsa":
        return Spsa(descent.epsilon, descent.num_directions, descent.seed)
    return ForwardGradient(descent.num_directions, descent.seed)


def backprop(objective: Objective, u: Tensor, batches: StepBatches, step: int) -> Estimate:
    """The exact gradient by reverse-mode differentiation."""
    u = u.detach().requires_grad_()
    c = objective.coefficients(u)
    leaf = c.detach().requires_grad_()
    losses = torch.zeros(len(objective.tasks), dtype=torch.float64)
    gradients = torch.zeros(len(objective.tasks), len(c), dtype=torch.float64)
    for at, (task, own) in enumerate(zip(objective.tasks, batches, strict=True)):
        for batch in own:
            loss = objective.losses.mean(task, leaf, batch) / len(own)
            gradients[at] += torch.autograd.grad(loss, leaf)[0]
            losses[at] += loss.detach()
    value, shares = weighed(objective.total, losses)
    return Estimate(value, losses, torch.autograd.grad(c, u, shares @ gradients)[0])


def weighed(total: Total, losses: Tensor) -> tuple[float, Tensor]:
    """J, and (T,) the share ∂J/∂L_t that each task's gradient has in its gradient."""
    losses = losses.detach().requires_grad_()
    with torch.enable_grad():
        value = total(losses)
    return float(value.detach()), torch.autograd.grad(value, losses)[0]


@dataclass(frozen=True)
class Spsa:
    """Two-sided SPSA (Spall 1992): g = (J(u + εz) − J(u − εz)) / 2ε, gradient g·z, the mean over the directions.

    Both probes are branches of one forward pass where the runtime takes branches.
    """

    epsilon: float
    num_directions: int
    seed: int

    @torch.no_grad()
    def __call__(self, objective: Objective, u: Tensor, batches: StepBatches, step: int) -> Estimate:
        gradient, probed = torch.zeros_like(u), []
        for direction in range(self.num_directions):
            z = _direction(self.seed, step, direction, u)
            probes = [objective.coefficients(u + self.epsilon * z), objective.coefficients(u - self.epsilon * z)]
            losses = self._losses(objective, torch.stack(probes), batches)  # (T, 2)
            plus, minus = float(objective.total(losses[:, 0])), float(objective.total(losses[:, 1]))
            gradient += z * ((plus - minus) / (2 * self.epsilon * self.num_directions))
            probed.append(losses.mean(dim=1))
        losses = torch.stack(probed).mean(dim=0)
        return Estimate(float(objective.total(losses)), losses, gradient)

    def _losses(self, objective: Objective, candidates: Tensor, batches: StepBatches) -> Tensor:
        return torch.stack(
            [
                torch.stack([objective.losses.of_candidates(task, candidates, batch) for batch in own]).mean(dim=0)
                for task, own in zip(objective.tasks, batches, strict=True)
            ]
        )


@dataclass(frozen=True)
class ForwardGradient:
    """<∇J, z>·z with the exact slope by forward-mode differentiation (Baydin et al. 2022), the mean over directions."""

    num_directions: int
    seed: int

    @torch.no_grad()
    def __call__(self, objective: Objective, u: Tensor, batches: StepBatches, step: int) -> Estimate:
        gradient = torch.zeros_like(u)
        for direction in range(self.num_directions):
            z = _direction(self.seed, step, direction, u)
            losses, slopes = self._along(objective, u, z, batches)
            value, shares = weighed(objective.total, losses)
            gradient += z * (float(shares @ slopes) / self.num_directions)
        return Estimate(value, losses, gradient)

    def _along(self, objective: Objective, u: Tensor, z: Tensor, batches: StepBatches) -> tuple[Tensor, Tensor]:
        """(T,) the tasks' losses at u, and (T,) their slopes along z."""
        losses = torch.zeros(len(objective.tasks), dtype=torch.float64)
        slopes = torch.zeros_like(losses)
        with _forward_mode():
            c = objective.coefficients(forward_ad.make_dual(u, z))  # type: ignore[no-untyped-call]
            for at, (task, own) in enumerate(zip(objective.tasks, batches, strict=True)):
                for batch in own:
                    loss, slope = _loss_and_slope(objective, task, c, batch)
                    losses[at] += loss / len(own)
                    slopes[at] += slope / len(own)
        return losses, slopes


@contextmanager
def _forward_mode() -> Iterator[None]:
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():  # type: ignore[no-untyped-call]
        # torch compiles some of its own rules by what it calls deprecated; its fused attention has no forward mode.
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", DeprecationWarning)
        yield


def _loss_and_slope(objective: Objective, task: FittingTask, c: Tensor, batch: Batch) -> tuple[float, float]:
    try:
        found = objective.losses.mean(task, c, batch)
    except NotImplementedError as error:
        raise ModelError(
            "estimator=forward_gradient: this model uses an operation without forward-mode differentiation "
            f"({str(error).splitlines()[0]}): take estimator=backprop or spsa"
        ) from None
    loss, slope = forward_ad.unpack_dual(found)  # type: ignore[no-untyped-call]
    return float(loss), 0.0 if slope is None else float(slope)


def _direction(seed: int, step: int, direction: int, u: Tensor) -> Tensor:
    return randomness.normals(seed, "perturbation", step, direction, size=len(u)).to(u.dtype)
