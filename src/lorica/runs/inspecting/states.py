"""How a run has moved what its base makes of examples: hidden states of every stage of it that is still at hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from lorica import files
from lorica.adapters import peft_format
from lorica.adapters.adapter import Adapter
from lorica.adapters.delta import LowRank
from lorica.analysis.equivalence import laid_on
from lorica.analysis.representations import hidden_states, linear_cka, relative_distance
from lorica.config import TrainConfig
from lorica.errors import ConfigError
from lorica.progress import tracked
from lorica.results import RunFolder
from lorica.runs.inspecting.texts import padded, text_of
from lorica.runs.ready import Ready, chosen, prepare
from lorica.training.checkpoints import Snapshot, whole_checkpoints
from lorica.training.ledger import Ledger
from lorica.training.stretch import inside

FOLDER = "representations"
BATCH_SIZE = 16


@dataclass(frozen=True)
class Stage:
    """The run after so many steps, against its base: a value for the embeddings and for each layer above them."""

    name: str
    step: int | None  # None: of an adapter of which the step is not known
    cka: tuple[float, ...]
    distance: tuple[float, ...]  # relative, in the Frobenius norm


def stages(run: RunFolder, cfg: TrainConfig, *, num_examples: int, device: str, output: Path | None) -> list[Stage]:
    """Every stage that the run keeps: whole checkpoints or rounds, the best by dev loss, the last.

    The states are means over the tokens of `num_examples` dev examples; with `output` each stage's (layers + 1, n, d),
    and the base's, are written there as safetensors.
    """
    ready = prepare(cfg.model, cfg.task, device, cfg.seed)
    examples = chosen(ready.task, "dev", cfg.task)[:num_examples]
    if len(examples) < 2:
        raise ConfigError(f"representations are compared over examples, and {ready.task.name} has {len(examples)} dev")
    texts = [text_of(row, ready.max_length) for row in ready.encoded(examples)]
    base = _states(ready, texts)
    _keep(output, "base", base)
    found = []
    adapters = _adapters(run, cfg)
    for name, step, read in tracked(adapters, len(adapters), "looking at stages"):
        with laid_on(ready.base.model, read()):
            states = _states(ready, texts)
        _keep(output, name, states)
        pairs = list(zip(states, base, strict=True))
        cka = tuple(linear_cka(now, before) for now, before in pairs)
        found.append(Stage(name, step, cka, tuple(relative_distance(now, before) for now, before in pairs)))
    return found


def _adapters(run: RunFolder, cfg: TrainConfig) -> list[tuple[str, int | None, Callable[[], Adapter]]]:
    """(name, steps done, how its adapter is had), the last one last."""
    last = peft_format.read(run.adapter)
    found: list[tuple[str, int | None, Callable[[], Adapter]]] = []
    if cfg.adapter.kind == "xgblora":
        ledger = Ledger.open(run.path)
        for number, booster in enumerate(ledger.boosters, 1):
            found.append((f"round-{booster.entry.round}", booster.entry.last_step, ledger.truncated(number).chain))
    else:
        for snapshot in whole_checkpoints(run.checkpoints):
            found.append((f"step-{snapshot.step}", snapshot.step, partial(_of_checkpoint, snapshot, last)))
    if run.best("adapter").is_dir():
        losses = files.read_records(run.eval_loss)
        best = min(losses, key=lambda line: line["loss"])["step"]
        found.append(("best", best, partial(peft_format.read, run.best("adapter"))))
    steps = files.read_records(run.training_loss)
    return [*found, ("last", steps[-1]["step"] if steps else None, lambda: last)]


def _of_checkpoint(snapshot: Snapshot, like: Adapter) -> Adapter:
    """The adapter that was live at a checkpoint; scales do not change in a run, and are those of the last one."""
    live = inside("live", snapshot.tensors)
    updates = {
        path: LowRank(live[f"{path}.A"], live[f"{path}.B"], update.scale) for path, update in like.updates.items()
    }
    heads = {path: {part: live[f"{path}.{part}"] for part in head} for path, head in like.heads.items()}
    return Adapter(updates, heads, like.base_model)


def _states(ready: Ready, texts: Sequence[Sequence[int]]) -> Tensor:
    """(layers + 1, n, d), a few texts at a time."""
    parts = [texts[start : start + BATCH_SIZE] for start in range(0, len(texts), BATCH_SIZE)]
    return torch.cat([hidden_states(ready.base.model, padded(ready.base, part)).cpu() for part in parts], dim=1)


def _keep(output: Path | None, name: str, states: Tensor) -> None:
    if output is not None:
        output.mkdir(exist_ok=True)
        files.write_atomic(output / f"{name}.safetensors", save({"hidden_states": states.contiguous()}))
