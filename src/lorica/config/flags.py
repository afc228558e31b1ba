"""The flags of the older tools, each an alias of a key: one table, from which the command line reads and lists them."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Flag:
    """What a flag of the older tools sets: a key, and how its words translate; `constant` for a bare switch.

    Where lorica knows but one way, `always` says which: the flag may say so, and sets nothing. Of a `deprecated` flag a
    warning says what to write.
    """

    key: str
    words: dict[str, Any] | None = None
    constant: Any = None
    always: str | None = None
    deprecated: bool = False


FLAGS: dict[str, Flag] = {
    "model_name": Flag("model.name"),
    "task_name": Flag("task.name"),
    "trainer": Flag("trainer", words={"regular": "backprop"}),
    "lora": Flag("adapter.kind", constant="lora"),
    "lora_r": Flag("adapter.rank"),
    "lora_alpha": Flag("adapter.alpha"),
    "lora_dropout": Flag("adapter.dropout"),
    "prefix_tuning": Flag("adapter.kind", constant="prefix"),
    "num_prefix": Flag("prefix.num_tokens"),
    "no_reparam": Flag("prefix.reparameterize", constant=False),
    "prefix_init_by_real_act": Flag("prefix.init", constant="real_activations"),
    "linear_probing": Flag("adapter.kind", constant="linear_probe"),
    "xgblora": Flag("adapter.kind", constant="xgblora"),
    "xgblora_steps_per_iteration": Flag("boosting.steps_per_iteration"),
    "xgblora_merge_frequency": Flag("boosting.merge_frequency"),
    "xgblora_use_adaptive_merge": Flag("boosting.use_adaptive_merge"),
    "xgblora_patience": Flag("boosting.patience"),
    "xgblora_ema_beta": Flag("boosting.ema_beta"),
    "xgblora_improvement_threshold": Flag("boosting.improvement_threshold"),
    "zo_eps": Flag("zo.epsilon"),
    "zo_num_perturbations": Flag("zo.num_directions"),
    "load_float16": Flag("model.dtype", constant="float16"),
    "load_bfloat16": Flag("model.dtype", constant="bfloat16"),
    "load_int8": Flag("model.quantization", constant="int8"),
    "max_length": Flag("task.max_length"),
    "num_train": Flag("task.num_train"),
    "num_dev": Flag("task.num_dev"),
    "num_eval": Flag("task.num_eval"),
    "train_set_seed": Flag("task.train_set_seed"),
    "sfc": Flag("task.sfc", constant=True),
    "train_as_classification": Flag("train_as", constant="classification"),
    "only_train_option": Flag("train_as", always="the loss is that of the answer's tokens, not of the whole text"),
    "non_diff": Flag("zo.objective", constant="accuracy"),
    "per_device_train_batch_size": Flag("batch_size"),
    "per_device_eval_batch_size": Flag("eval_batch_size"),
    "num_train_epochs": Flag("num_epochs"),
    "lr_scheduler_type": Flag("schedule"),
    "warmup_ratio": Flag("warmup"),
    "warmup_steps": Flag("warmup"),
    "lambda": Flag("method_params.lambda", deprecated=True),
    "search_type": Flag("search.type"),
    "grid": Flag("search.grid"),
}


def warn_of_older(old: str, new: str) -> None:
    """A DeprecationWarning about the user's word, which is printed with no file and line of this program's own."""
    warnings.warn_explicit(f"{old} is now {new}", DeprecationWarning, "<config>", 1)
