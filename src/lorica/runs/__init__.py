"""One function per verb: a config comes in, components are called with plain arguments, a record goes out.

This is the only room that knows both the config and the components.
"""

from lorica.runs.evaluating.evaluate import evaluate_target
from lorica.runs.evaluating.matrix import evaluate_matrix
from lorica.runs.export import Exported, export
from lorica.runs.inspecting.inspect import Inspection, inspect
from lorica.runs.inspecting.verify import Verification, verify
from lorica.runs.merging.insight import audit_merge, diagnose_merge, plan_merge
from lorica.runs.merging.merge import MergedRun, merge
from lorica.runs.plan import plan
from lorica.runs.ready import Ready, chosen, prepare
from lorica.runs.report import report
from lorica.runs.studying.forecast import Forecast, plan_study
from lorica.runs.studying.study import Studied, study
from lorica.runs.studying.sweep import Swept, sweep
from lorica.runs.training.replay import Replayed, replay
from lorica.runs.training.train import Trained, train

__all__ = [
    "Exported",
    "Forecast",
    "Inspection",
    "MergedRun",
    "Ready",
    "Replayed",
    "Studied",
    "Swept",
    "Trained",
    "Verification",
    "audit_merge",
    "chosen",
    "diagnose_merge",
    "evaluate_matrix",
    "evaluate_target",
    "export",
    "inspect",
    "merge",
    "plan",
    "plan_merge",
    "plan_study",
    "prepare",
    "replay",
    "report",
    "study",
    "sweep",
    "train",
    "verify",
]
