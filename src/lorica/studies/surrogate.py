"""A function known at a few points, guessed everywhere else: a Gaussian process with its own doubt."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np

Surrogate = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]  # (points, coordinates) -> mean, deviation (points,)


def fitted(coordinates: np.ndarray, values: np.ndarray) -> Surrogate:
    """The mean and the standard deviation of the function that has `values` (points,) at `coordinates`.

    A Matérn 5/2 kernel with a length of its own for each coordinate, plus noise that the deviation is without;
    hyper-parameters by marginal likelihood, from one start: the same inputs give the same function.
    """
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    centre, spread = values.mean(), values.std() or 1.0
    smooth = ConstantKernel(1.0, (1e-2, 1e2)) * Matern(np.full(coordinates.shape[1], 0.5), (0.05, 10.0), nu=2.5)
    process = GaussianProcessRegressor(smooth + WhiteKernel(1e-2, (1e-6, 1.0)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a hyper-parameter at its bound is no news with a handful of points
        process.fit(coordinates, (values - centre) / spread)
    noise = process.kernel_.k2.noise_level

    def surrogate(at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # rounding may leave a variance just below 0, which is set to 0
            mean, deviation = process.predict(at, return_std=True)
        return centre + spread * mean, spread * np.sqrt(np.maximum(deviation**2 - noise, 0.0))

    return surrogate
