"""A's first rows from what each module reads: a few batches go through the model, and no gradient is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lorica.adapters.adapter import Adapter
from lorica.adapters.delta import LowRank

RIDGE = 0.1  # of the mean variance of an input's entries, added to each: 800 examples do not fill a wide input's space
# Lengths of A's rows, so that one learning rate of B suits them all: a step goes with their square.
FIRST = 1.7  # of the direction that a booster begins with
REST = 0.1  # of the drawn rows behind the directions: they tell little, and their noise would count as much
ALONE = 0.7  # of drawn rows where there are no directions


@torch.no_grad()
def along_inputs(
    model: nn.Module, new: Adapter, run_batches: Callable[[], None], chain: Adapter, num_rows: int = 512
) -> Adapter:
    """`new` with its A's rows laid along the strongest directions of each module's inputs (activation-informed init).

    `run_batches` runs some batches through the model; of each module's inputs at most `num_rows` rows a batch are kept.
    The rows are the top right singular vectors, of length 1, of what the chain's A does not already read.
    """
    seen: dict[str, list[Tensor]] = {path: [] for path in new.updates}

    def keep(path: str, x: Tensor) -> None:
        flat = x.reshape(-1, x.shape[-1])
        seen[path].append(flat[:: -(-len(flat) // num_rows)].double().cpu())

    with _watched(model, list(seen), keep):
        run_batches()
    updates = {}
    for path, update in new.updates.items():
        X = torch.cat(seen[path])  # (n, in)
        if path in chain.updates:
            Q = torch.linalg.qr(chain.updates[path].A.double().T)[0]  # (in, K)
            X = X - (X @ Q) @ Q.T
        directions = torch.linalg.svd(X, full_matrices=False)[2][: update.rank]  # (r, in)
        updates[path] = LowRank(directions.to(update.A.dtype).contiguous(), update.B, update.scale)
    return Adapter(updates, new.heads, new.base_model)


@dataclass(frozen=True)
class Labelled:
    """A batch that `run` puts through the model: the mask (rows, t) of its inputs, and each row's class (rows,)."""

    run: Callable[[], Any]
    mask: Tensor
    classes: Tensor


@torch.no_grad()
def discriminants(model: nn.Module, paths: Iterable[str], batches: Iterable[Labelled]) -> dict[str, Tensor]:
    """(k, in) float32 for each module: what tells the classes apart in its inputs, an example's mean over its tokens.

    A module that reads no such batch has none.
    """
    means: dict[str, list[Tensor]] = {path: [] for path in paths}
    classes = []
    for batch in batches:
        kept: dict[str, Tensor] = {}
        with _watched(model, list(means), partial(_keep_mean, kept, batch.mask)):
            batch.run()
        classes.append(batch.classes.cpu())
        for path, mean in kept.items():
            means[path].append(mean)
    return {
        path: fisher_directions(torch.cat(found), torch.cat(classes)).float()
        for path, found in means.items()
        if len(found) == len(classes) > 0
    }


def along(new: Adapter, directions: Mapping[str, Tensor], first: int = 0) -> Adapter:
    """`new` with the directions (k, in) of a module as A's first rows; what was drawn for these rows is gone.

    They begin with number `first` and go round again, for boosters that take turns. Rows beyond the k-th stay as drawn;
    a module without directions keeps its draw. The lengths are such that one learning rate of B suits them all.
    """
    updates = {
        path: LowRank(_laid(update.A, directions.get(path, update.A[:0]), first), update.B, update.scale)
        for path, update in new.updates.items()
    }
    return Adapter(updates, new.heads, new.base_model)


def fisher_directions(x: Tensor, classes: Tensor) -> Tensor:
    """(k, in) float64 of examples (n, in) of some classes (n,): the directions along which the classes' means differ.

    The means, less that of all examples and weighed by the root of their classes' shares, are whitened by the
    covariance within the classes (Fisher 1936, Rao 1948); their singular directions follow, each as long as its
    singular value, in shares of the first. k is less than the number of classes, and 0 where the means do not differ.
    """
    x = x.double()
    labels, places, counts = torch.unique(classes, return_inverse=True, return_counts=True)
    means = torch.stack([x[classes == label].mean(dim=0) for label in labels])  # (C, in)
    within = x - means[places]  # (n, in)
    apart = (counts / len(x)).sqrt().unsqueeze(1) * (means - x.mean(dim=0))  # (C, in): a rare class's mean is noise
    if len(labels) < 2 or not apart.abs().max() > 1e-9 * x.abs().max():
        return x[:0]
    ridge = RIDGE * within.square().mean()
    if ridge > 0:
        # (ridge + WᵀW / n)⁻¹ by an (n, n) matrix: an input may be far wider than there are examples.
        inner = within @ within.T + len(x) * ridge * torch.eye(len(x), dtype=x.dtype)
        apart = (apart - apart @ within.T @ torch.linalg.solve(inner, within)) / ridge
    _, strengths, directions = torch.linalg.svd(apart, full_matrices=False)
    shares = strengths / strengths[0]
    count = min(int((shares > 1e-6).sum()), len(labels) - 1)
    return directions[:count] * shares[:count].unsqueeze(1)


def _laid(A: Tensor, found: Tensor, first: int) -> Tensor:
    """A (r, in) with the found rows (k, in) on top, and what is left of it small."""
    if len(found) == 0:
        return A * ALONE
    turned = found.roll(-first, 0)
    top = (FIRST * turned / turned[0].norm())[: len(A)].to(A.dtype)
    return torch.cat([top, REST * A[len(top) :]])


def _keep_mean(kept: dict[str, Tensor], mask: Tensor, path: str, x: Tensor) -> None:
    """Keep the mean over the tokens of an input (rows, t, in); one that is laid out otherwise is not of the batch."""
    if x.shape[:-1] == mask.shape:
        share = mask / mask.sum(dim=1, keepdim=True)  # (rows, t)
        kept[path] = torch.einsum("rti,rt->ri", x.float(), share.float()).cpu()


@contextmanager
def _watched(model: nn.Module, paths: Sequence[str], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While the block runs, `see` is told what the module at each path reads."""

    def hook(path: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        see(path, inputs[0])

    with ExitStack() as undo:
        for path in paths:
            undo.enter_context(model.get_submodule(path).register_forward_pre_hook(partial(hook, path)))
        yield
