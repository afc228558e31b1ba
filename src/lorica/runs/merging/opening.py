"""A merge opened: whatever it can be refused for is found here, by headers and configs, before any work is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from lorica import files, models, results
from lorica.adapters.injection import Placement
from lorica.config import MergeConfig, ModelConfig
from lorica.errors import ConfigError
from lorica.merging import saving
from lorica.merging.merge import Merge
from lorica.runs.bodies import Bodies
from lorica.runs.merging.evaluation import Arena, judged_sources, model_of, open_arenas
from lorica.runs.merging.settling import lay_out, learner_of
from lorica.runs.sources import Source, resolve


@dataclass(frozen=True)
class Opened:
    """A merge that nothing is known against: its adapters, its folder to be, and the tasks that judge it."""

    sources: Sequence[Source]
    merge: Merge  # laid out, and not yet surveyed
    arenas: Sequence[Arena]
    bodies: Bodies
    folder: Path


def opened(cfg: MergeConfig, say: Console) -> Opened:
    """Read the adapters, and open what the merge needs beside them.

    Raises ConfigError, ShapeError, AdapterFormatError, ModelError, MissingPathError or OutputExistsError, each in one
    line, with nothing written.
    """
    _check_asked(cfg)
    sources = resolve(cfg.adapters, Path(cfg.runs_dir))
    judged_on = judged_sources(cfg, sources)
    merge = lay_out(cfg, sources)
    if len(sources) == 1:
        say.print(f"warning: {sources[0].name} is the only adapter: nothing is merged with it", soft_wrap=True)
    if cfg.save_merged and cfg.save == "model":
        saving.homes(merge, *fusion(cfg, sources))
    folder = _folder(cfg, merge, sources)
    files.check_makeable(folder)
    bodies = Bodies(cfg.device, cfg.seed)
    return Opened(sources, merge, open_arenas(judged_on, cfg, cfg.split, bodies), bodies, folder)


def fusion(cfg: MergeConfig, sources: Sequence[Source]) -> tuple[Path, dict[str, Placement]]:
    """(folder of the base model's checkpoint, where each module's weight stands in it)"""
    model = model_of(sources[0], cfg)
    return models.checkpoint_folder(model.name, model.revision), placements(model)


def placements(model: ModelConfig) -> dict[str, Placement]:
    """Where each module's weight stands in the model's checkpoint, and its shape."""
    return models.placements(
        model.name,
        kind=None if model.kind == "auto" else model.kind,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
    )


def _check_asked(cfg: MergeConfig) -> None:
    if not cfg.save_merged and not cfg.eval_tasks:
        raise ConfigError(
            "save_merged=false writes no weights, and without eval_tasks nothing is told of the merge either: give "
            "--eval-tasks all, or drop save_merged=false"
        )
    if cfg.output_dir is not None:
        results.check_free(cfg.output_dir)


def _folder(cfg: MergeConfig, merge: Merge, sources: Sequence[Source]) -> Path:
    if cfg.output_dir is not None:
        return Path(cfg.output_dir)
    method = merge.method.name if cfg.optimizer is None else learner_of(cfg.optimizer, cfg.seed).name
    combo = files.slug("_".join(source.name for source in sources))
    return files.dated(Path(cfg.artifacts_dir) / "merged" / method / combo / "runs", "run")
