"""Model cards, as Markdown; every figure in one comes from a record."""

from lorica.card.merges import merge_card
from lorica.card.runs import About, adapter, export_card, linear_probe, model, prefix, run_card
from lorica.card.studies import study_card

__all__ = ["About", "adapter", "export_card", "linear_probe", "merge_card", "model", "prefix", "run_card", "study_card"]
