"""The environment variables of MeZO's mezo.sh, read as what `lorica train` takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorica import plugins
from lorica.errors import ConfigError, UnknownNameError

DEFAULTS = {
    "MODE": "ft", "MODEL": "facebook/opt-1.3b", "BS": "16", "LR": "1e-5", "EPS": "1e-3", "SEED": "0", "TRAIN": "1000",
    "DEV": "500", "EVAL": "1000", "STEPS": "20000", "EVAL_STEPS": "4000", "XGBLORA_STEPS": "1000",
}  # fmt: skip
MODES: dict[str, dict[str, Any]] = {
    "ft": {"adapter": {"kind": "full"}},
    "prefix": {
        "adapter": {"kind": "prefix"},
        "prefix": {"num_tokens": 5, "reparameterize": False, "init": "real_activations"},
    },
    "lora": {"adapter": {"kind": "lora", "rank": 8, "alpha": 16.0}, "zo": {"train": "both"}},
    "xgblora": {"adapter": {"kind": "xgblora", "init": "kaiming"}, "zo": {"estimator": "spsa"}},
}
SMALL = ("cb", "copa")  # of these mezo.sh keeps 100 examples for dev
BY_LANGUAGE_MODEL = ("copa", "record", "squad", "drop")  # trained on the gold answer's tokens; others on their options


def tree_of(environment: Mapping[str, str]) -> dict[str, Any]:
    """The config that the variables stand for, as nested keys; mezo.sh's defaults where one is not set.

    Raises UnknownNameError for a MODE that is none, ConfigError without TASK and for a number that is none.
    """
    given = {**DEFAULTS, **{name: text for name, text in environment.items() if text}}
    if given["MODE"] not in MODES:
        raise UnknownNameError(plugins.unknown("MODE", given["MODE"], MODES))
    if "TASK" not in given:
        raise ConfigError("TASK is not set: name a task, as in TASK=SST2 lorica-mezo")
    if "XGBLORA_STEPS" in environment and given["MODE"] != "xgblora":
        raise ConfigError(f"XGBLORA_STEPS is set, and MODE={given['MODE']} does not boost: MODE=xgblora, or drop it")
    task = given["TASK"].lower()
    dev = "100" if task in SMALL and not environment.get("DEV") else given["DEV"]
    tree = {
        "model": {"name": given["MODEL"]},
        "task": {
            "name": given["TASK"],
            "train_set_seed": _whole("SEED", given),
            "num_train": _whole("TRAIN", given),
            "num_dev": _whole("DEV", {"DEV": dev}),
            "num_eval": _whole("EVAL", given),
        },
        "train_as": "lm" if task in BY_LANGUAGE_MODEL else "classification",
        "trainer": "zo",
        "learning_rate": _number("LR", given),
        "batch_size": _whole("BS", given),
        "stratified": False,
        "max_steps": _whole("STEPS", given),
        "eval_steps": _whole("EVAL_STEPS", given),
        "save_steps": _whole("EVAL_STEPS", given),
        **MODES[given["MODE"]],
    }
    tree["zo"] = {"epsilon": _number("EPS", given), **tree.get("zo", {})}
    if given["MODE"] == "xgblora":
        tree["boosting"] = {"steps_per_iteration": _whole("XGBLORA_STEPS", given)}
    return tree


def _whole(name: str, given: Mapping[str, str]) -> int:
    try:
        return int(given[name])
    except ValueError:
        raise ConfigError(f"{name}={given[name]!r} is not a whole number") from None


def _number(name: str, given: Mapping[str, str]) -> float:
    try:
        return float(given[name])
    except ValueError:
        raise ConfigError(f"{name}={given[name]!r} is not a number") from None
