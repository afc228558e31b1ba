"""The point where the least of several numbers is expected to improve most: a Gaussian process for each number.

The least of the tasks' values has a kink wherever the worst task changes, and one process over it smooths that away.
Each task's own value has no kink, and the least is taken of draws of all.
Source: Astudillo & Frazier 2019, arXiv 1906.01537; the logarithm as in Ament et al. 2023, arXiv 2310.20708.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np

from lorica import randomness
from lorica.studies.space import Point, Space
from lorica.studies.surrogate import fitted

NUM_DRAWS = 256  # of every task's value at a candidate
NUM_CANDIDATES = 1024  # of the Latin hypercube
NUM_PARENTS, NUM_CHILDREN = 8, 32  # of a round of the local search
STEPS = (0.1, 0.03, 0.01)  # of the local search, in shares of each parameter's way
SOFTNESS = 1e-3  # of the hinge, in standard deviations of the least: without it most candidates are worth 0 alike
LAST = float(np.nextafter(1.0, 0.0))


def improving(space: Space, points: Sequence[Point], values: np.ndarray, best: float, seed: int) -> Point:
    """The candidate of the largest log expected improvement of the least of the tasks' values on `best`.

    `values` (points, tasks) are finite. Candidates are a Latin hypercube, then the neighbours of the best of them.
    """
    log_worth = log_expected_improvement(space, points, values, best, seed)
    shares = _latin_hypercube(NUM_CANDIDATES, len(space.parameters), seed, "candidates")  # (candidates, parameters)
    worth = log_worth(shares)
    for turn, step in enumerate(STEPS):
        parents = shares[np.argsort(-worth, kind="stable")[:NUM_PARENTS]]
        children = _near(parents, step, seed, turn)
        shares, worth = np.concatenate([shares, children]), np.concatenate([worth, log_worth(children)])
    return space.at(shares[worth.argmax()].tolist())


def log_expected_improvement(
    space: Space, points: Sequence[Point], values: np.ndarray, best: float, seed: int
) -> Callable[[np.ndarray], np.ndarray]:
    """shares (candidates, parameters) -> the logarithm of each candidate's expected improvement (candidates,).

    All candidates see the same draws, so that they differ by what they are and not by luck.
    """
    coordinates = np.array([space.coordinates(point) for point in points])  # (points, coordinates)
    surrogates = [fitted(coordinates, column) for column in values.T]
    drawn = _normals(len(surrogates), seed)[:, None]  # (draws, 1, tasks)
    softness = SOFTNESS * (values.min(axis=1).std() or 1.0)

    def log_worth(shares: np.ndarray) -> np.ndarray:
        at = np.array([space.coordinates(space.at(each)) for each in shares.tolist()])
        mean, deviation = (np.stack(each, axis=1) for each in zip(*(one(at) for one in surrogates), strict=True))
        least = (mean + deviation * drawn).min(axis=2)  # (draws, candidates)
        return _log_mean(_log_softplus((least - best) / softness))

    return log_worth


def _log_softplus(values: np.ndarray) -> np.ndarray:
    """log(log(1 + exp(values))), which is `values` itself where they are far below 0."""
    far = values < -30
    return np.where(far, values, np.log(np.logaddexp(0, np.where(far, 0, values))))


def _log_mean(logarithms: np.ndarray) -> np.ndarray:
    """log of the mean, over the first dimension, of what `logarithms` are the logarithms of."""
    return np.logaddexp.reduce(logarithms, axis=0) - np.log(len(logarithms))


def _normals(num_tasks: int, seed: int) -> np.ndarray:
    """(draws, tasks) from N(0, 1), each task's spread evenly: so few left to chance are off by half in the tail."""
    shares = _latin_hypercube(NUM_DRAWS, num_tasks, seed, "draws").clip(1e-9)
    return np.vectorize(NormalDist().inv_cdf)(shares)


def _latin_hypercube(num_points: int, num_columns: int, seed: int, name: str) -> np.ndarray:
    """(points, columns) shares in [0, 1): of each column, one in each of `num_points` equal parts."""
    uniforms = randomness.uniforms(seed, name, size=2 * num_points * num_columns).numpy()
    order, within = uniforms.astype(np.float64).reshape(2, num_points, num_columns)
    return (order.argsort(axis=0, kind="stable").argsort(axis=0) + within) / num_points


def _near(parents: np.ndarray, step: float, seed: int, turn: int) -> np.ndarray:
    """NUM_CHILDREN points around each parent, each parameter moved by about `step`."""
    size = len(parents) * NUM_CHILDREN * parents.shape[1]
    moves = randomness.normals(seed, "neighbours", turn, size=size).numpy().astype(np.float64)
    children = parents[:, None] + step * moves.reshape(len(parents), NUM_CHILDREN, -1)
    return children.reshape(-1, parents.shape[1]).clip(0.0, LAST)
