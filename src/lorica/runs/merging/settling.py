"""What a config says of a merge, as the merge that it asks for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from lorica.config import LambdaPolicyConfig, MergeConfig, OptimizerConfig
from lorica.merging import method as methods
from lorica.merging import transform as transforms
from lorica.merging.coefficients import LambdaPolicy
from lorica.merging.fitting import loading
from lorica.merging.fitting.loading import Learner
from lorica.merging.merge import Grams, Merge, Size, prepare
from lorica.merging.method import Method
from lorica.runs.bodies import Bodies
from lorica.runs.merging.calibration import grams_for
from lorica.runs.sources import Source

CARRIER = "weighted_delta_n"  # the method that carries learned coefficients


def settle(
    cfg: MergeConfig, sources: Sequence[Source], grams: Grams | None = None, bodies: Bodies | None = None
) -> Merge:
    """The merge that a config asks for, checked and surveyed, and not yet computed.

    `grams` are those of an earlier merge of the same sources, for the methods whose Grams no option changes.
    """
    return surveyed(lay_out(cfg, sources), cfg, sources, grams, bodies)


def lay_out(cfg: MergeConfig, sources: Sequence[Source]) -> Merge:
    """The merge that a config asks for, checked against the adapters; no look at their modules is taken yet."""
    chosen = settings(cfg, len(sources))
    method: Method = chosen.pop("method")
    adapters = {source.name: source.adapter for source in sources}
    return prepare(adapters, method, as_factors=cfg.save == "adapter", survey=False, **chosen)


def surveyed(
    laid_out: Merge,
    cfg: MergeConfig,
    sources: Sequence[Source],
    grams: Grams | None = None,
    bodies: Bodies | None = None,
) -> Merge:
    """The same, with what its transforms and its method must know of all modules, inputs included."""
    method = laid_out.method
    if not method.needs_grams:
        return laid_out.surveyed()

    def with_grams(grams: Grams) -> Merge:
        return dataclasses.replace(laid_out, grams=grams).surveyed()

    if grams and method.grams == "own":
        return with_grams(grams)
    bodies = bodies or Bodies(cfg.device, cfg.seed)
    one_after_the_other = with_grams if method.grams == "merged" else None
    return with_grams(grams_for(cfg, sources, laid_out.paths, one_after_the_other, bodies))


def settings(cfg: MergeConfig, num_adapters: int) -> dict[str, Any]:
    """How a config says to merge: what `prepare` and `plan` take as keywords, and the method.

    With an optimizer it is the mean of the updates, filtered as the optimizer wants them: where coefficients are not
    learned yet.
    """
    policy, weights = _policy(cfg.lambda_policy)
    changes = [transforms.load(each.name, each.params) for each in cfg.transforms]
    if cfg.optimizer is None:
        method = methods.load(cfg.method, cfg.method_params, num_adapters)
    else:
        method = methods.load(CARRIER, {}, num_adapters)
        filters = learner_of(cfg.optimizer, cfg.seed).filters
        changes += [transforms.load(filters, {})] if filters else []
    if policy is not None:
        policy.check_values(method)
    return {
        "method": method,
        "mode": cfg.merge_mode,
        "weights": weights,
        "transforms": changes,
        "policy": policy,
        "size": Size(cfg.rank, cfg.energy, cfg.rank_budget),
        "num_workers": cfg.num_workers,
        "force": cfg.force,
    }


def learner_of(optimizer: OptimizerConfig, seed: int) -> Learner:
    """The learner with its options settled; one that filters, which makes updates dense, runs them as such."""
    learner = loading.load(optimizer.name, optimizer.params, seed=seed)
    if learner.filters is None or "merge_impl" in optimizer.params:
        return learner
    return loading.load(optimizer.name, {**optimizer.params, "merge_impl": "fused_linear"}, seed=seed)


def _policy(given: LambdaPolicyConfig | None) -> tuple[LambdaPolicy | None, Any]:
    """(lambda of each module, weight of each adapter)"""
    if given is None:
        return None, None
    if given.type == "per_adapter":
        return None, given.weights
    value = given.value if given.type == "scalar" else given.default
    assert value is not None
    return LambdaPolicy(value, given.overrides), None
