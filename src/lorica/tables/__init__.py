"""What the command line prints: results, plans and catalogues as tables. Imports no torch."""

from lorica.tables.catalogues import LISTS, listing
from lorica.tables.evaluation import evaluations, matrix
from lorica.tables.inspection import inspection
from lorica.tables.merging import merge_audit, merge_diagnosis, merge_plan, merged
from lorica.tables.studies import study, study_plan
from lorica.tables.sweeps import sweep
from lorica.tables.training import plan
from lorica.tables.verification import verification

__all__ = [
    "LISTS",
    "evaluations",
    "inspection",
    "listing",
    "matrix",
    "merge_audit",
    "merge_diagnosis",
    "merge_plan",
    "merged",
    "plan",
    "study",
    "study_plan",
    "sweep",
    "verification",
]
