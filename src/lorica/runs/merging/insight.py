"""`lorica merge --plan`, `--diagnose` and `--audit`: a merge looked at without being made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lorica.config import MergeConfig
from lorica.errors import ConfigError
from lorica.merging.audit import Audit, audit
from lorica.merging.diagnosis import Diagnosis, diagnose
from lorica.merging.plan import MergePlan, plan
from lorica.runs.merging.settling import settings
from lorica.runs.sources import locate, resolve


def plan_merge(cfg: MergeConfig) -> MergePlan:
    """What the merge would read, hold, take, lose and write, from the adapters' headers."""
    places = locate(cfg.adapters, Path(cfg.runs_dir))
    chosen = settings(cfg, len(places))
    return plan(
        {place.name: place.folder for place in places}, chosen.pop("method"), as_factors=cfg.save == "adapter", **chosen
    )


def diagnose_merge(cfg: MergeConfig) -> Diagnosis:
    """How the adapters relate to each other, and which methods suit them."""
    sources = resolve(cfg.adapters, Path(cfg.runs_dir))
    return diagnose({source.name: source.adapter for source in sources}, num_workers=cfg.num_workers)


def audit_merge(targets: Sequence[str], cfg: MergeConfig) -> Audit:
    """How far the first adapter is from the exact merge of the others, weighted by the policy, else equally."""
    if len(targets) < 2:
        raise ConfigError("an audit takes the merged adapter and its sources: lorica merge --audit OUT A B")
    merged, *sources = resolve(targets, Path(cfg.runs_dir))
    given = cfg.lambda_policy.weights if cfg.lambda_policy else None
    weights = [1 / len(sources)] * len(sources) if given is None else given
    adapters = {source.name: source.adapter for source in sources}
    return audit(merged.adapter, adapters, weights, num_workers=cfg.num_workers)
