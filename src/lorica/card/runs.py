"""The card of a training run: what was trained, how well it does, how to load it; and that of its export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lorica.card.lm_eval as lm_eval


@dataclass(frozen=True)
class About:
    """What a card says of the thing that was trained: in words, by its size, how it is used."""

    what: str
    num_parameters: int
    usage: str
    tags: Sequence[str]
    library: str
    fitted: str | None = None  # how it was trained, where that was not by steps
    lm_eval: str = ""  # how EleutherAI's lm-eval is told of it, as its model_args; empty where it cannot load it


TEMPLATE = """---
base_model: {base_model}
library_name: {library}
tags: [{tags}]
---

# {title}

{what} of `{base_model}`, trained {by}on the task `{task}`: {num_parameters:,} trainable parameters.

## How well it does

| metric | {split} | 95 % interval | n |
|---|---|---|---|
{metric_rows}

## How it was trained

{trained} {examples}

{rounds}Everything that was set is in `config.yaml`, every step in `training_loss.jsonl`, versions and command in
`origin.json`.

## How to use it

```sh
lorica evaluate {folder}
```

{usage}
"""

STEPS = """
{num_steps} steps of batch {batch_size}, {optimizer} at learning rate {learning_rate:g} ({schedule}), seed {seed}:
{forwards:,} forward passes and {tokens:,} tokens in {seconds:.1f} s. The loss went from {first_loss:.4f} (mean of the
first tenth of the steps) to {last_loss:.4f} (mean of the last).
""".strip()

ADAPTER_USAGE = """```python
from pathlib import Path
from lorica import inject, load_adapter, load_base

base = load_base("{base_model}", kind="{kind}"{num_labels})
live = inject(base.model, load_adapter(Path("FOLDER/adapter")))
```

The folder `adapter/` is an ordinary PEFT adapter: `peft.PeftModel.from_pretrained(model, "FOLDER/adapter")` loads it
too."""


def adapter(
    *,
    base_model: str,
    kind: str,
    num_labels: int,
    modules: Sequence[str],
    rank: int,
    alpha: float,
    heads: Sequence[str],
    num_parameters: int,
) -> About:
    """What a card says of an adapter."""
    names = ", ".join(sorted({path.rpartition(".")[2] for path in modules}))
    trained_heads = f" and the head {', '.join(heads)}" if heads else ""
    return About(
        f"A LoRA adapter of rank {rank} (alpha {alpha:g}) on {len(modules)} modules ({names}){trained_heads}",
        num_parameters,
        ADAPTER_USAGE.format(
            base_model=base_model,
            kind=kind,
            num_labels=_with_labels(kind, num_labels),
        ),
        tags=("lora", "lorica"),
        library="peft",
        lm_eval=lm_eval.args(base_model, kind, "FOLDER/adapter"),
    )


MODEL_USAGE = """```python
from lorica import load_base

base = load_base("FOLDER/model", kind="{kind}"{num_labels})
```

The folder `model/` is an ordinary transformers checkpoint."""


def model(*, kind: str, num_labels: int, num_parameters: int) -> About:
    """What a card says of a model that was trained whole."""
    usage = MODEL_USAGE.format(kind=kind, num_labels=_with_labels(kind, num_labels))
    return About(
        "All parameters",
        num_parameters,
        usage,
        tags=("full", "lorica"),
        library="transformers",
        lm_eval=lm_eval.args("FOLDER/model", kind),
    )


PREFIX_USAGE = """The folder `adapter/` is an ordinary PEFT prefix: `peft.PeftModel.from_pretrained(model,
"FOLDER/adapter")` loads it."""


def prefix(*, base_model: str | None, num_tokens: int, num_layers: int, num_parameters: int) -> About:
    """What a card says of a prefix."""
    return About(
        f"A prefix of {num_tokens} keys and values in each of the {num_layers} layers",
        num_parameters,
        PREFIX_USAGE,
        tags=("prefix-tuning", "lorica"),
        library="peft",
        lm_eval=lm_eval.args(base_model, "causal", "FOLDER/adapter"),
    )


FITTED = """
Nothing was trained by steps: the {num_features} features that come in to `{layer}` were computed once for each example,
and scikit-learn's LogisticRegression was fitted to them. C = {strength:g} has the least cross-entropy on dev.
""".strip()
PROBE_USAGE = "The folder `adapter/` holds the heads alone: `lorica evaluate FOLDER/adapter task=NAME` lays them on."


def linear_probe(*, layer: str, num_features: int, strength: float, num_parameters: int) -> About:
    """What a card says of a linear probe."""
    return About(
        f"A linear classifier (`{layer}`) on the frozen features",
        num_parameters,
        PROBE_USAGE,
        tags=("linear-probe", "lorica"),
        library="peft",
        fitted=FITTED.format(num_features=num_features, layer=layer, strength=strength),
    )


def _with_labels(kind: str, num_labels: int) -> str:
    return f", num_labels={num_labels}" if kind == "classification" else ""


def run_card(
    *,
    about: About,
    config: Mapping[str, Any],
    task: str,
    base_model: str,
    num_examples: Mapping[str, int],
    evaluation: Mapping[str, Any],
    losses: Sequence[float],
    last_step: Mapping[str, Any],
    rounds: Sequence[Mapping[str, Any]],
    folder: str,
) -> str:
    """The card of one training run, as Markdown; every figure comes from the run's own record."""
    rows = [
        f"| {name} | {score['value']:.4f} | {score['low']:.4f} to {score['high']:.4f} | {score['n']} |"
        for name, score in evaluation["metrics"].items()
    ]
    return TEMPLATE.format(
        base_model=base_model,
        library=about.library,
        tags=", ".join(about.tags),
        title=f"{task} on {base_model.rstrip('/').rpartition('/')[2]}",
        what=about.what,
        by="" if about.fitted else f"by {config['trainer']} ",
        task=task,
        num_parameters=about.num_parameters,
        split=evaluation["split"],
        metric_rows="\n".join(rows),
        trained=about.fitted or _steps(config, losses, last_step),
        examples="Examples: " + ", ".join(f"{count} {split}" for split, count in num_examples.items()) + ".",
        rounds=_rounds(rounds),
        folder=folder,
        usage=about.usage.replace("FOLDER", folder) + lm_eval.command(about.lm_eval.replace("FOLDER", folder), [task]),
    )


def _steps(config: Mapping[str, Any], losses: Sequence[float], last_step: Mapping[str, Any]) -> str:
    tenth = max(1, len(losses) // 10)
    return STEPS.format(
        num_steps=last_step.get("step", 0),
        batch_size=config["batch_size"] * config["gradient_accumulation_steps"],
        optimizer=config["optimizer"],
        learning_rate=config["learning_rate"],
        schedule=config["schedule"],
        seed=config["seed"],
        forwards=last_step.get("forwards", 0),
        tokens=last_step.get("tokens", 0),
        seconds=last_step.get("seconds", 0.0),
        first_loss=sum(losses[:tenth]) / tenth if losses else float("nan"),
        last_loss=sum(losses[-tenth:]) / tenth if losses else float("nan"),
    )


def _rounds(rounds: Sequence[Mapping[str, Any]]) -> str:
    if not rounds:
        return ""
    accepted = sum(each["accepted"] for each in rounds)
    back = sum(each["rolled_back"] for each in rounds)
    return (
        f"It is a chain of {accepted} boosters, laid on one after the other in {len(rounds)} rounds "
        f"({len(rounds) - accepted} rejected, {back} rolled back to their best): `ledger.jsonl` has a line for each, "
        "`boosters/` their factors.\n\n"
    )


EXPORT_TEMPLATE = """---
base_model: {base_model}
library_name: {library}
tags: [lorica]
---

# {task} on {base_name}

Exported from `{run}`: {told}.

## How to use it

{usage}
"""


def export_card(*, base_model: str, kind: str, task: str, told: str, run: str, folder: str, is_model: bool) -> str:
    """The card of what a run was exported to: a folder that is a PEFT adapter, or a whole model."""
    if is_model:
        usage = f"The folder is an ordinary transformers checkpoint: `lorica evaluate {folder} task=NAME`."
    else:
        usage = (
            f"The folder is an ordinary PEFT adapter: `peft.PeftModel.from_pretrained(model, {folder!r})`, or\n"
            f"`lorica evaluate {folder} task=NAME`."
        )
    args = lm_eval.args(folder, kind) if is_model else lm_eval.args(base_model, kind, folder)
    return EXPORT_TEMPLATE.format(
        base_model=base_model,
        library="transformers" if is_model else "peft",
        task=task,
        base_name=base_model.rstrip("/").rpartition("/")[2],
        run=run,
        told=told,
        usage=usage + lm_eval.command(args, [task]),
    )
