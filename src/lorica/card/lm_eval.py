"""The command line by which EleutherAI's lm-eval takes what was trained or merged here."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

# Tasks of the catalog that EleutherAI's lm-eval has too, under the same names but for case, hyphens and underscores.
TASKS = (
    *("boolq", "cb", "cola", "copa", "drop", "mnli", "mrpc", "multirc", "qnli", "qqp", "record", "rte", "squadv2"),
    *("sst2", "wic", "winogrande", "wsc"),
)
TEMPLATE = """

EleutherAI's lm-eval, which has prompts of its own, takes it too{place}:

```sh
lm_eval --model hf --model_args {args} --tasks {tasks}
```"""


def args(base_model: str | None, kind: str, adapter: str | None = None) -> str:
    """How lm-eval is told of a causal model, or of an adapter for it; empty for what it could not load."""
    if kind != "causal" or base_model in (None, "demo"):
        return ""
    return f"pretrained={base_model}" + (f",peft={adapter}" if adapter else "")


def command(args: str, tasks: Sequence[str]) -> str:
    """The command line, on those of the tasks that lm-eval has."""
    if not args:
        return ""
    bare = (task.lower().replace("-", "").replace("_", "") for task in tasks)
    known = ",".join(name for name in bare if name in TASKS)
    place = "" if known else "; it has no task of this name, so put one of `lm_eval ls tasks` in the place of TASK"
    return TEMPLATE.format(place=place, args=shlex.quote(args), tasks=known or "TASK")
