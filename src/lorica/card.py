"""The model card that a run leaves: what was trained, how well it does, how to load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class About:
    """What a card says of the thing that was trained: in words, by its size, how it is used."""

    what: str
    num_parameters: int
    usage: str
    tags: Sequence[str]
    library: str
    fitted: str | None = None  # how it was trained, where that was not by steps


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
    )


MODEL_USAGE = """```python
from lorica import load_base

base = load_base("FOLDER/model", kind="{kind}"{num_labels})
```

The folder `model/` is an ordinary transformers checkpoint."""


def model(*, kind: str, num_labels: int, num_parameters: int) -> About:
    """What a card says of a model that was trained whole."""
    usage = MODEL_USAGE.format(kind=kind, num_labels=_with_labels(kind, num_labels))
    return About("All parameters", num_parameters, usage, tags=("full", "lorica"), library="transformers")


PREFIX_USAGE = """The folder `adapter/` is an ordinary PEFT prefix: `peft.PeftModel.from_pretrained(model,
"FOLDER/adapter")` loads it."""


def prefix(*, num_tokens: int, num_layers: int, num_parameters: int) -> About:
    """What a card says of a prefix."""
    what = f"A prefix of {num_tokens} keys and values in each of the {num_layers} layers"
    return About(what, num_parameters, PREFIX_USAGE, tags=("prefix-tuning", "lorica"), library="peft")


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
        usage=about.usage.replace("FOLDER", folder),
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


MERGE_TEMPLATE = """---
base_model: {base_model}
library_name: peft
tags: [lora, lorica, merge]
---

# {title}

{num_sources} adapters of `{base_model}` merged by **{method}** ({params}), module by module over {num_modules} modules.
{size}

{learning}## What went in

| adapter | {weight} | rank | modules | SHA-256 |
|---|---|---|---|---|
{source_rows}

{dropped}## What was lost

{loss}

{evaluation}## How to use it

{usage}

Everything that was set is in `config.yaml`; options, errors of every module, hashes and versions in
`merge_metadata.json`.
"""

USAGE = {
    "adapter": "The folder is an ordinary PEFT adapter: `peft.PeftModel.from_pretrained(model, FOLDER)`.",
    "dense": "`delta.safetensors` holds each module's update, to be added to its weight.",
    "model": "`model/` is a whole checkpoint: `transformers.AutoModel.from_pretrained(FOLDER + '/model')`.",
    None: "No weights were saved (save_merged=false).",
}


def merge_card(metadata: Mapping[str, Any], summary: Mapping[str, Any], split: str) -> str:
    """The card of one merge, as Markdown; every figure comes from its own records."""
    sources = metadata["sources"]
    learning = metadata["learning"]
    options = {} if learning else metadata["method_params"]
    params = ", ".join(f"{name.removesuffix('_')}={value}" for name, value in options.items())
    weights = learning["mean_coefficients"] if learning else metadata["weights"]
    rows = [
        f"| {each['name']} | {weights[each['name']]:.4g} | {', '.join(map(str, each['ranks']))} | "
        f"{each['num_modules']} | `{each['sha256'][:12]}` |"
        for each in sources
    ]
    rank = summary["max_rank"]
    return MERGE_TEMPLATE.format(
        base_model=sources[0]["base_model"],
        title=f"{' + '.join(each['name'] for each in sources)}, merged by {metadata['method']}",
        num_sources=len(sources),
        method=metadata["method"],
        params="coefficients learned" if learning else params or "no options",
        learning=_learning(learning) if learning else "",
        weight="mean coefficient" if learning else "weight",
        num_modules=summary["num_modules"],
        size=f"The largest rank is {rank}." if rank else "The update is dense.",
        source_rows="\n".join(rows),
        dropped=_dropped(metadata["dropped_modules"]),
        loss=_loss(summary),
        evaluation=_survival(summary, split),
        usage=USAGE[metadata["save"]],
    )


def _learning(found: Mapping[str, Any]) -> str:
    options = ", ".join(f"{name}={value}" for name, value in found["options"].items())
    descent = found["descent"]
    rows = ", ".join(
        f"{each['num_fitted']} of {name} (and {each['num_validation']} to validate)"
        for name, each in found["tasks"].items()
    )
    best = "" if found["best_step"] is None else f" They are those of step {found['best_step']}, the best validated."
    return (
        "## How the coefficients were learned\n\n"
        f"By `{found['optimizer']}` ({options or 'no options'}), {descent['variant'].replace('_', '-')}, seed "
        f"{descent['seed']}, in {found['seconds']:.1f} s on {descent['split']} examples"
        f"{'' if found['labels_used'] else ' without their labels'}: {rows}. {found['stopped'].capitalize()}.{best} "
        "`learning.json` has every coefficient and the history, `learning.png` the picture.\n\n"
    )


def _dropped(paths: Sequence[str]) -> str:
    if not paths:
        return ""
    named = ", ".join(f"`{path}`" for path in paths[:8])
    return f"Not merged, because not every adapter has them: {named}{', …' if len(paths) > 8 else ''}.\n\n"


def _loss(summary: Mapping[str, Any]) -> str:
    text = (
        f"Relative error of what is saved against what the method made: {summary['total_error']:.4f} in all, "
        f"{summary['worst_error']:.4f} in the worst module."
        if summary["total_error"]
        else "Nothing: what the method made is saved exactly."
    )
    if summary["distance"] is not None:
        text += f" The method averages factors: it lies up to {summary['distance']:.3f} from the exact merge."
    return text


def _survival(summary: Mapping[str, Any], split: str) -> str:
    if not summary["tasks"]:
        return ""
    rows = []
    for each in summary["tasks"]:
        delta = each["interference_delta"]
        shown = f"{delta[0]:.3f} ({delta[1]:.3f} to {delta[2]:.3f})" if delta else "no headroom"
        rows.append(f"| {each['task']} | {each['base']:.4f} | {each['single']:.4f} | {each['merged']:.4f} | {shown} |")
    head = "| task | base | own adapter | merged | recovered (95 % interval) |\n|---|---|---|---|---|\n"
    return f"## What survives, on {split}\n\n{head}" + "\n".join(rows) + "\n\n"
