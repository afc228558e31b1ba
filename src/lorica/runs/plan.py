"""`lorica plan`."""

from __future__ import annotations

from lorica import planning
from lorica.config import PlanConfig
from lorica.planning import Plan


def plan(given: PlanConfig) -> Plan:
    """What training would need, without loading weights."""
    return planning.plan(
        given.model.name,
        dtype=given.model.dtype,
        targets=given.adapter.targets,
        rank=given.adapter.rank or 8,
        optimizer=given.optimizer,
        batch_size=given.batch_size,
        length=given.length,
        num_prefix=given.prefix.num_tokens,
        reparameterize=given.prefix.reparameterize,
        kind=None if given.model.kind == "auto" else given.model.kind,
        revision=given.model.revision,
        trust_remote_code=given.model.trust_remote_code,
    )
