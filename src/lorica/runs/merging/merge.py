"""`lorica merge`: many adapters to one, from config to a folder that says what was done and what it cost."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from lorica import card, config, files, results
from lorica.adapters import peft_format
from lorica.adapters.adapter import Adapter
from lorica.config import MergeConfig
from lorica.evaluation.evaluate import Evaluation
from lorica.evaluation.recovery import Recovery, summarise
from lorica.merging import saving
from lorica.merging.merge import Merge, Merged, total_error
from lorica.progress import tracked
from lorica.runs.heads import HEADS, write_heads
from lorica.runs.merging.evaluation import Arena, evaluation_name, model_of
from lorica.runs.merging.learned import learn
from lorica.runs.merging.learning_figure import draw_learning
from lorica.runs.merging.opening import fusion, opened, placements
from lorica.runs.merging.settling import surveyed
from lorica.runs.sources import Source

LONG = ("history", "coefficients", "method_params")  # what learning.json alone says of the learning


@dataclass(frozen=True)
class MergedRun:
    """What a merge left: its folder, what it lost, and how the tasks fared."""

    folder: Path
    method: str
    modules: Mapping[str, Mapping[str, Any]]  # path -> record of the merged module
    dropped: tuple[str, ...]
    seconds: float
    evaluations: Mapping[str, Evaluation] = field(default_factory=dict)
    recoveries: Sequence[Recovery] = ()
    learning: Mapping[str, Any] | None = None  # how its coefficients were learned

    def as_record(self) -> dict[str, Any]:
        modules = self.modules.values()
        summary = summarise(self.recoveries)
        return {
            "method": self.method,
            "optimizer": self.learning["optimizer"] if self.learning else None,
            "num_modules": len(modules),
            "max_rank": max((each["rank"] for each in modules if each["rank"] is not None), default=None),
            "total_error": total_error([(each["error"], each["norm"] or 0.0) for each in modules]),
            "worst_error": max((each["error"] for each in modules), default=0.0),
            "distance": max((each["distance"] for each in modules if each["distance"] is not None), default=None),
            "tasks": [each.as_record() for each in self.recoveries],
            "recovery": summary.as_record() if summary else None,
            "merge_seconds": self.seconds,
        }


def merge(cfg: MergeConfig, say: Console) -> MergedRun:
    """Merge, evaluate on the tasks asked for, and write the folder; whatever can be refused is refused before any work.

    Raises the errors of `opened`, each in one line, with nothing written.
    """
    asked = opened(cfg, say)
    begin = time.monotonic()
    sources, folder = asked.sources, asked.folder
    settled, learning = surveyed(asked.merge, cfg, sources, bodies=asked.bodies), None
    if cfg.optimizer is not None:
        settled, learning = learn(settled, cfg, sources, asked.bodies, say)
        _warn_of_leak(learning, cfg, say)
    making = Making(settled, keeps=cfg.save == "adapter" or not cfg.save_merged)
    say.print(f"{' + '.join(settled.names)} by {settled.method.name}, {len(settled.paths)} modules", highlight=False)
    with files.staged_folder(folder) as staging:
        if cfg.save_merged:
            _write_weights(cfg, making, sources, staging)
        seconds = time.monotonic() - begin
        evaluations, recoveries = _evaluated(asked.arenas, making, say)
        run = MergedRun(
            folder, settled.method.name, making.records, settled.dropped, seconds, evaluations, recoveries, learning
        )
        _write_records(cfg, settled, sources, run, staging)
    _index_evaluations(cfg, run, folder)
    return run


class Making:
    """A merge under way: its modules one by one, with a record of each; kept where they are small and needed again."""

    def __init__(self, merge: Merge, keeps: bool) -> None:
        self.merge = merge
        self.records: dict[str, dict[str, Any]] = {}
        self._keeps = keeps
        self._kept: list[Merged] = []

    def modules(self) -> Iterator[Merged]:
        """Every module, computed anew unless it was kept."""
        if self._kept:
            yield from self._kept
            return
        made = []
        for each in tracked(self.merge.modules(), len(self.merge.paths), f"merging by {self.merge.method.name}"):
            self.records.setdefault(each.path, each.as_record())  # a module may be made again for each task
            if self._keeps:
                made.append(each)
            yield each
            del each  # or a dense update would live on while the next is made
        self._kept = made


def _warn_of_leak(learning: Mapping[str, Any], cfg: MergeConfig, say: Console) -> None:
    if cfg.eval_tasks and learning["descent"]["split"] == cfg.split:
        say.print(f"warning: coefficients were fitted to split={cfg.split}, which judges the merge", soft_wrap=True)


def _evaluated(arenas: Sequence[Arena], making: Making, say: Console) -> tuple[dict[str, Evaluation], list[Recovery]]:
    evaluations, recoveries = {}, []
    for arena in arenas:
        evaluations[arena.source.name], found = arena.judged(making.modules())
        recoveries.append(found)
        if not found.has_headroom:
            say.print(
                f"warning: {found.task}'s own adapter is not surely better than the base: left out of the minimum"
            )
    return evaluations, recoveries


def _write_weights(cfg: MergeConfig, making: Making, sources: Sequence[Source], folder: Path) -> None:
    """The merged weights in the form asked for, and every task's head beside them."""
    if cfg.save == "dense":
        shapes = {path: making.merge.shape(path) for path in making.merge.paths}
        saving.dense_patch(making.modules(), shapes, folder / saving.DENSE_PATCH)
    elif cfg.save == "model":
        base, layout = fusion(cfg, sources)
        fused = saving.fused_model(making.merge, base, folder / "model", layout)
        making.records |= {path: fused[path].as_record() for path in making.merge.paths}
    else:
        _write_adapter(cfg, sources, list(making.modules()), folder)
    for source in sources:
        if source.adapter.heads:
            write_heads(source.adapter.heads, folder / HEADS / f"{source.name}.safetensors")


def _write_adapter(cfg: MergeConfig, sources: Sequence[Source], modules: Sequence[Merged], folder: Path) -> None:
    """The PEFT files; a head goes with them only if it is the one adapter's own."""
    first = sources[0]
    merged = saving.adapter(modules)
    heads = first.adapter.heads if len(sources) == 1 else {}
    own = peft_format.settings(first.folder)
    layout = None
    if cfg.profile == "portable":
        layout = {path: each.shape for path, each in placements(model_of(first, cfg)).items()}
    peft_format.write_into(
        Adapter(merged.updates, heads, first.adapter.base_model),
        folder,
        profile=cfg.profile,
        layout=layout,
        task_type=own.task_type if heads or own.task_type != "SEQ_CLS" else None,
        fan_in_fan_out=own.fan_in_fan_out,
    )


def _write_records(cfg: MergeConfig, prepared: Merge, sources: Sequence[Source], run: MergedRun, folder: Path) -> None:
    files.write_atomic(folder / "config.yaml", config.dump(cfg))
    metadata = {
        "method": run.method,
        "method_params": _options(prepared),
        "merge_mode": cfg.merge_mode,
        "transforms": [{"name": each.name, "params": dict(each.options)} for each, _ in prepared.transforms],
        "lambda_policy": cfg.lambda_policy.model_dump(mode="json") if cfg.lambda_policy else None,
        "weights": dict(zip(prepared.names, prepared.weights, strict=True)),
        "size": asdict(prepared.size),
        "save": cfg.save if cfg.save_merged else None,
        "learning": {key: value for key, value in run.learning.items() if key not in LONG} if run.learning else None,
        "sources": [source.as_record() for source in sources],
        "modules": run.modules,
        "dropped_modules": list(run.dropped),
        "total_error": run.as_record()["total_error"],
        "origin": results.origin(cfg.seed, cfg.device),
        "timing": {"merge_seconds": run.seconds},
    }
    files.write_json(folder / "merge_metadata.json", metadata)
    files.write_json(folder / "summary.json", run.as_record())
    if run.learning:
        files.write_json(folder / "learning.json", run.learning)
        draw_learning(run.learning["history"], folder / "learning.png")
    if run.evaluations:
        name = evaluation_name(cfg.split, cfg.eval_subset)
        files.write_json(folder / f"eval_results_{name}.json", _evaluation_record(run))
    is_causal = peft_format.settings(sources[0].folder).task_type == "CAUSAL_LM"
    text = card.merge_card(metadata, run.as_record(), cfg.split, folder=str(run.folder), is_causal=is_causal)
    files.write_atomic(folder / "README.md", text)


def _options(merge: Merge) -> dict[str, Any]:
    """The method's options that it was run with: under a policy its own `lambda` is at no module."""
    return {name: value for name, value in merge.method.options.items() if name != "lambda_" or merge.policy is None}


def _evaluation_record(run: MergedRun) -> dict[str, Any]:
    by_task = {each.task: each.as_record() for each in run.recoveries}
    return {name: {**found.as_record(), "recovery": by_task[name]} for name, found in run.evaluations.items()}


def _index_evaluations(cfg: MergeConfig, run: MergedRun, folder: Path) -> None:
    """One line in the index of all evaluations, and each task's metrics beside those of every other merge."""
    if not run.evaluations:
        return
    unified = Path(cfg.artifacts_dir).resolve() / "evaluations"  # a relative link counts from where it really lies
    name = evaluation_name(cfg.split, cfg.eval_subset)
    results_file = folder.resolve() / f"eval_results_{name}.json"
    for task in run.evaluations:
        link = unified / name / files.slug(task) / f"{_link_name(cfg, folder)}.json"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)  # of an earlier merge in the same output_dir
        files.link_or_copy(results_file, link)
    line = {"folder": str(folder), "split": name, "finished": time.time(), **run.as_record()}
    files.append_record(unified / "index.jsonl", line)


def _link_name(cfg: MergeConfig, folder: Path) -> str:
    """A merge's own name among all others'; an output_dir's has a hash of where it lies."""
    if cfg.output_dir is None:
        return "-".join([*folder.parts[-4:-2], folder.name])  # method or optimizer, tasks, run
    return f"{files.slug(folder.name)}-{files.content_hash(str(folder.resolve()))}"
