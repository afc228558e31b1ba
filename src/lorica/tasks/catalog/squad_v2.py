"""SQuAD 2.0: SQuAD with questions that have no answer, for which to write none is right (Rajpurkar et al. 2018)."""

from dataclasses import replace

from lorica.tasks.base import Hub
from lorica.tasks.catalog import squad

TASK = replace(squad.TASK, hub=Hub("rajpurkar/squad_v2"))
