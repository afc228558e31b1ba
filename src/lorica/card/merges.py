"""The card of a merge: what went in, what was lost, what survives, how to load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lorica.card.lm_eval as lm_eval

MERGE_TEMPLATE = """---
base_model: {base_model}
library_name: peft
tags: [lora, lorica, merge]
---

# {title}

{num_sources} adapters of `{base_model}` merged by **{method}** ({params}), module by module over {num_modules} modules.
{asked} {size}

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


FORM = {
    "adapter": "There is no module in it.",
    "dense": "The update is dense.",
    "model": "It is fused into the base.",
    None: "The update is dense.",
}  # of a merge without ranks


def merge_card(
    metadata: Mapping[str, Any], summary: Mapping[str, Any], split: str, *, folder: str, is_causal: bool
) -> str:
    """The card of one merge, of a causal base model or of another, as Markdown; figures come from its own records."""
    sources = metadata["sources"]
    learning = metadata["learning"]
    params = "coefficients learned" if learning else ", ".join(_options(metadata)) or "no options"
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
        params=params,
        asked=_asked(metadata),
        learning=_learning(learning) if learning else "",
        weight="mean coefficient" if learning else "weight",
        num_modules=summary["num_modules"],
        size=f"The largest rank is {rank}." if rank else FORM[metadata["save"]],
        source_rows="\n".join(rows),
        dropped=_dropped(metadata["dropped_modules"]),
        loss=_loss(summary, metadata["save"]),
        evaluation=_survival(summary, split),
        usage=USAGE[metadata["save"]] + (_merge_in_lm_eval(metadata, folder) if is_causal else ""),
    )


def _options(metadata: Mapping[str, Any]) -> list[str]:
    """The method's options, its lambda as a policy has it where there is one."""
    told = _told(metadata["method_params"])
    policy = metadata["lambda_policy"] or {"type": None}
    if policy["type"] == "scalar":
        told.append(f"lambda={policy['value']:g}")
    if policy["type"] == "per_layer":
        layers = "".join(f", {value:g} in layer {layer}" for layer, value in policy["overrides"].items())
        told.append(f"lambda={policy['default']:g}{layers}")
    return told


def _asked(metadata: Mapping[str, Any]) -> str:
    """How modules were chosen, changed and compressed."""
    size = [f"{name}={value}" for name, value in metadata["size"].items() if value is not None]
    changes = " then ".join(" ".join([f"`{each['name']}`", *_told(each["params"])]) for each in metadata["transforms"])
    return (
        f"Asked for: merge_mode={metadata['merge_mode']}, {size[0] if size else 'no size'}, "
        f"{f'transforms {changes}' if changes else 'no transforms'}."
    )


def _told(options: Mapping[str, Any]) -> list[str]:
    return [f"{name.removesuffix('_')}={value}" for name, value in options.items()]


def _merge_in_lm_eval(metadata: Mapping[str, Any], folder: str) -> str:
    sources = metadata["sources"]
    args = {
        "adapter": lm_eval.args(sources[0]["base_model"], "causal", folder),
        "model": lm_eval.args(f"{folder}/model", "causal"),
    }
    return lm_eval.command(args.get(metadata["save"], ""), [each["name"] for each in sources])


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
        f"{_clipped(found.get('num_clipped'))}"
        "`learning.json` has every coefficient and the history, `learning.png` the picture.\n\n"
    )


def _clipped(num_clipped: int | None) -> str:
    return f"{num_clipped} of them were below 0 and are 0 here (constraint_nonnegative). " if num_clipped else ""


def _dropped(paths: Sequence[str]) -> str:
    if not paths:
        return ""
    named = ", ".join(f"`{path}`" for path in paths[:8])
    return f"Not merged, because not every adapter has them: {named}{', …' if len(paths) > 8 else ''}.\n\n"


def _loss(summary: Mapping[str, Any], save: str | None) -> str:
    text = "Nothing: what the method made is saved exactly." if save else "Nothing was saved."
    if summary["total_error"]:
        text = (
            f"Relative error of what is saved against what the method made: {summary['total_error']:.3g} in all, "
            f"{summary['worst_error']:.3g} in the worst module."
        )
        text += " That is the rounding of base + update to the base's own dtype." if save == "model" else ""
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
