"""What a training config asks for that contradicts itself, or would do nothing: each is refused with its reason."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from pydantic import BaseModel

if TYPE_CHECKING:
    from lorica.config.schema import TrainConfig

LOW_RANK = ("lora", "xgblora")  # the kinds of adapter that have factors
STEPS = (
    *("optimizer", "learning_rate", "weight_decay", "max_grad_norm", "schedule", "warmup", "batch_size", "train_as"),
    *(
        "gradient_accumulation_steps",
        "max_steps",
        "num_epochs",
        "max_seconds",
        "bucketing",
        "stratified",
        "base_dropout",
    ),
    *("eval_steps", "compile"),
)  # keys of a training by steps


def refuse_set(section: BaseModel, name: str, reason: str, allowed: Collection[str] = ()) -> None:
    """Raise ValueError if a key of the section is not at its default."""
    for key, field in type(section).model_fields.items():
        if key not in allowed and getattr(section, key) != field.default:
            raise ValueError(f"{name}.{key} is set, and {reason}")


def of_kind(cfg: TrainConfig) -> list[str]:
    """What adapter.kind does not go with."""
    rules = {"full": _of_full, "prefix": _of_prefix, "linear_probe": _of_linear_probe}
    return [mistake for made, mistake in rules.get(cfg.adapter.kind, _of_low_rank)(cfg) if made]


def _of_low_rank(cfg: TrainConfig) -> list[tuple[bool, str]]:
    is_informed = cfg.adapter.init == "discriminant"
    return [
        (
            is_informed and cfg.boosting.orthogonal,
            "adapter.init=discriminant and boosting.orthogonal=true both decide A: drop one of them",
        ),
        (
            is_informed and cfg.zo.space == "update",
            "adapter.init=discriminant sets the lengths of A's rows, and zo.space=update divides them out: drop one",
        ),
    ]


def _of_full(cfg: TrainConfig) -> list[tuple[bool, str]]:
    zo, zeroth_order = cfg.zo, cfg.trainer == "zo"
    model_sized = "holds as many numbers as the model, and adapter.kind=full under zo holds none: "
    return [
        (
            cfg.model.quantization != "none",
            f"adapter.kind=full trains the weights, and model.quantization={cfg.model.quantization} has none that can "
            "be trained: drop it",
        ),
        (
            not zeroth_order and cfg.model.dtype != "float32",
            f"adapter.kind=full by backprop in model.dtype={cfg.model.dtype}: its steps would be rounded away; use "
            "float32, or trainer=zo, which rounds at random",
        ),
        (
            zeroth_order and zo.estimator == "forward_gradient",
            f"zo.estimator=forward_gradient {model_sized}use spsa or one_sided",
        ),
        (
            zeroth_order and cfg.optimizer in ("adamw", "momentum"),
            f"optimizer={cfg.optimizer} {model_sized}use sgd",
        ),
        (
            zeroth_order and cfg.max_grad_norm is not None,
            f"max_grad_norm wants a gradient, which {model_sized}use zo.clip",
        ),
        (
            zeroth_order and zo.branches not in ("auto", 1),
            f"zo.branches={zo.branches}: under adapter.kind=full a pass takes one probe, which moves every weight",
        ),
    ]


def _of_prefix(cfg: TrainConfig) -> list[tuple[bool, str]]:
    asked = cfg.model.kind if cfg.model.kind not in ("auto", "causal") else cfg.task.kind
    return [
        (
            asked == "classification" or asked == "seq2seq",
            f"adapter.kind=prefix puts keys and values before the prompt of a causal model, and {asked} is asked for: "
            "use adapter.kind=lora",
        ),
    ]


def _of_linear_probe(cfg: TrainConfig) -> list[tuple[bool, str]]:
    by_steps = [key for key in STEPS if getattr(cfg, key) != type(cfg).model_fields[key].default]
    # What a resolved config says of steps is that there are none.
    by_steps = [key for key in by_steps if (key, cfg.max_steps) != ("max_steps", 0)]
    key = next(iter(by_steps), "")
    return [
        (
            cfg.trainer == "zo",
            "adapter.kind=linear_probe is fitted exactly, on features that are computed once: drop trainer=zo",
        ),
        (
            bool(by_steps),
            f"{key} is set, and adapter.kind=linear_probe takes no steps: its head is fitted to the end; drop it",
        ),
        (
            cfg.task.kind == "choice" or cfg.model.kind not in ("auto", "classification"),
            "adapter.kind=linear_probe fits a classification head: use task.kind=classification",
        ),
    ]


def of_no_trainer(cfg: TrainConfig) -> list[str]:
    """What trainer=none would not use, and what only it does."""
    if cfg.trainer != "none":
        rules = [
            (cfg.task.num_train == 0, "task.num_train=0 leaves nothing to train on: add trainer=none, or give more"),
            (
                cfg.task.demonstrations != "one_set",
                f"task.demonstrations={cfg.task.demonstrations} is of trainer=none: add it, or drop this",
            ),
        ]
        return [mistake for made, mistake in rules if made]
    fields = type(cfg).model_fields
    unused = [key for key in (*STEPS, "adapter", "save_steps", "trackers") if getattr(cfg, key) != fields[key].default]
    return [f"{key} is set, and trainer=none trains nothing: drop it" for key in unused]


def of_zeroth_order(cfg: TrainConfig) -> list[str]:
    """What contradicts itself, or would do nothing, under trainer=zo."""
    zo, in_update_space = cfg.zo, cfg.zo.space == "update"
    exact = zo.estimator == "forward_gradient"
    factors = cfg.boosting.train_factors if "train_factors" in cfg.boosting.model_fields_set else zo.train
    rules = [
        (
            cfg.base_dropout,
            "base_dropout=true under trainer=zo: two probes would differ by their dropout; drop it",
        ),
        (
            zo.estimator == "one_sided" and zo.num_directions == 1,
            "zo.estimator=one_sided needs zo.num_directions=2 or more: a probe's baseline is the mean of the others",
        ),
        (
            zo.estimator is None and zo.num_directions == 1 and cfg.adapter.kind in LOW_RANK and factors != "both",
            "zo.num_directions=1 is two-sided, and where B alone is trained zo.estimator is one_sided, which needs 2 "
            "or more: add zo.estimator=spsa",
        ),
        (
            exact and zo.objective != "loss",
            f"zo.objective={zo.objective} has no slope to differentiate: use zo.estimator=spsa or one_sided",
        ),
        (
            exact and zo.epsilon != type(zo).model_fields["epsilon"].default,
            f"zo.epsilon={zo.epsilon:g} does nothing under zo.estimator=forward_gradient, which is exact: drop it",
        ),
        (
            exact and zo.branches != "auto",
            f"zo.branches={zo.branches} does nothing under zo.estimator=forward_gradient, which has no probes: drop it",
        ),
        (
            exact and zo.normalize == "std",
            "zo.normalize=std is the spread of probes, which zo.estimator=forward_gradient does not take: use rms",
        ),
        (
            zo.objective != "loss" and cfg.train_as == "lm",
            f"zo.objective={zo.objective} compares all options, and train_as=lm sees the gold one: drop one of them",
        ),
        (
            in_update_space and cfg.optimizer == "adamw",
            "zo.space=update needs optimizer=sgd or momentum: adamw divides the units out again",
        ),
        (
            in_update_space and cfg.max_grad_norm is not None,
            "max_grad_norm is a norm in the parameters' units: under zo.space=update use zo.clip",
        ),
        (
            (in_update_space or zo.normalize != "none") and cfg.learning_rate is None,
            "learning_rate has no default under zo.space=update or zo.normalize, which change its units: give one",
        ),
        (
            cfg.adapter.kind not in LOW_RANK and (zo.train != "auto" or in_update_space),
            f"zo.{'space=update' if in_update_space else f'train={zo.train}'} speaks of low-rank factors, and "
            f"adapter.kind={cfg.adapter.kind} has none: drop it",
        ),
        (
            cfg.adapter.kind not in LOW_RANK and bool(zo.warm_start_steps),
            f"zo.warm_start_steps={zo.warm_start_steps} fits low-rank factors, and adapter.kind={cfg.adapter.kind} has "
            "none: drop it",
        ),
        (
            cfg.adapter.kind == "xgblora" and zo.train not in ("auto", factors),
            f"zo.train={zo.train} and boosting.train_factors={factors} contradict each other: drop one of them",
        ),
    ]
    return [mistake for made, mistake in rules if made]


def of_compiling(cfg: TrainConfig) -> list[str]:
    """What a run with compiled blocks does not go with."""
    zeroth_order = cfg.trainer == "zo"
    rules = [
        (
            cfg.adapter.kind == "prefix",
            "adapter.kind=prefix enters each layer by a cache, so that each would be compiled by itself",
        ),
        (
            cfg.adapter.kind == "full" and zeroth_order,
            "adapter.kind=full under zo replaces single operations as they run, and compiled code has none",
        ),
        (
            zeroth_order and cfg.zo.estimator == "forward_gradient",
            "zo.estimator=forward_gradient carries tangents, and compiled code loses them",
        ),
        (
            cfg.adapter.dropout > 0 and not zeroth_order,
            f"adapter.dropout={cfg.adapter.dropout:g} draws from a generator of its own, and compiled code cannot",
        ),
        (
            cfg.model.quantization != "none",
            f"model.quantization={cfg.model.quantization} has layers that torch does not compile",
        ),
        (
            cfg.boosting.ensemble,
            "boosting.ensemble=true gives the model other layers each round, which would be compiled anew",
        ),
    ]
    return [f"compile=true is set, and {mistake}: drop one of them" for made, mistake in rules if made]
