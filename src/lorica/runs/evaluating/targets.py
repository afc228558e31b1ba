"""What can be evaluated, found by what the user calls it, and laid on its base model for as long as that takes."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lorica import config, files, models, plugins, results
from lorica.adapters import injection, outline, peft_format
from lorica.adapters import prefix as prefixes
from lorica.adapters.adapter import Adapter
from lorica.adapters.prefix import Prefix
from lorica.config import ModelConfig, TrainConfig
from lorica.errors import ConfigError, MissingPathError
from lorica.merging import saving
from lorica.merging.live import attach
from lorica.merging.merge import Merged
from lorica.results import RunFolder
from lorica.runs.heads import HEADS, read_heads
from lorica.runs.ready import Ready
from lorica.runs.training.prefix import lay_on

BASE = "base"  # the word for a base model alone
METADATA = "merge_metadata.json"  # of a merge's folder


@dataclass(frozen=True)
class Target:
    """A base model, and the folder of what is laid on it: nothing, an adapter, a prefix, a merge, or heads alone."""

    model: ModelConfig
    folder: Path | None = None
    run: RunFolder | None = None
    cfg: TrainConfig | None = None  # of the run
    is_whole: bool = False  # the model itself is what was trained or merged

    @cached_property
    def prefix(self) -> Prefix | None:
        if self.folder is None or not _is_adapter(self.folder) or not prefixes.is_prefix(self.folder):
            return None
        return prefixes.read(self.folder)

    @cached_property
    def adapter(self) -> Adapter:
        """What the folder holds of low-rank updates and of heads that are not kept by task."""
        if self.folder is None or self.is_whole or self.prefix is not None or self._dense is not None:
            return Adapter({})
        return peft_format.read(self.folder)

    @property
    def num_prefix(self) -> int:
        return self.prefix.num_tokens if self.prefix else 0

    @property
    def is_low_rank(self) -> bool:
        """Whether low-rank updates are all that there is to it."""
        return bool(self.adapter.updates) and not self.adapter.heads

    @property
    def eval_batch_size(self) -> int:
        return self.cfg.eval_batch_size if self.cfg else 64

    def for_task(self, task: str) -> Adapter:
        """The adapter, with the head that a merge keeps beside it for the task, if there is one."""
        file = self.folder / HEADS / f"{files.slug(task)}.safetensors" if self.folder is not None else None
        if self.adapter.heads or file is None or not file.is_file():
            return self.adapter
        return Adapter(self.adapter.updates, read_heads(file), self.adapter.base_model)

    @contextlib.contextmanager
    def laid_on(self, ready: Ready) -> Iterator[None]:
        """Within the block the model is what is to be evaluated on its task; afterwards it is the base again.

        Raises AdapterFormatError if the target does not fit the base or the task.
        """
        model = ready.base.model
        with ExitStack() as undo:
            if self.prefix is not None:
                undo.callback(prefixes.remove, lay_on(ready.base, self.prefix))
            elif self.folder is not None:
                if self._dense is not None:
                    dense = saving.read_dense_patch(self._dense).items()
                    undo.enter_context(attach(model, (Merged(path, update, None) for path, update in dense)))
                undo.callback(injection.remove, injection.inject(model, self.for_task(ready.task.name)))
            yield

    @cached_property
    def sha256(self) -> str | None:
        """Of all that the folder holds to be laid on; None for a model alone."""
        if self.folder is None:
            return None
        names = (peft_format.CONFIG_FILE, peft_format.WEIGHTS_FILE, saving.DENSE_PATCH)
        found = [self.folder / name for name in names if (self.folder / name).is_file()]
        digest = hashlib.sha256()
        for path in [*found, *sorted((self.folder / HEADS).glob("*.safetensors"))]:
            with files.open_regular(path) as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    @property
    def _dense(self) -> Path | None:
        file = self.folder / saving.DENSE_PATCH if self.folder is not None else None
        return file if file is not None and file.is_file() else None


def lacks_head(ready: Ready, target: Target) -> bool:
    """Whether the base's classification head was drawn, and the target brings none for the task."""
    return ready.base.has_drawn_head and not target.for_task(ready.task.name).heads


def resolve_target(word: str, model: ModelConfig | None) -> Target:
    """The target that a word means: a run, an adapter, a prefix or a merge by its folder, or a model by its name.

    A `model` that is given goes before the one that the folder names. Raises MissingPathError, with the nearest names,
    for a folder that is none of these, ConfigError for a run that trained nothing.
    """
    path = Path(word)
    if _is_adapter(path) or (path / saving.DENSE_PATCH).is_file():
        return Target(model or ModelConfig(name=_base_of(path)), path)
    if (path / METADATA).is_file():
        return _fused_merge(word, path, model)
    if (path / "config.yaml").is_file():
        return _of_run(word, results.open_run(path), model)
    if path.is_dir() and not (path / "config.json").is_file():
        raise MissingPathError(
            f"{word!r} is neither a run folder (config.yaml) nor an adapter (adapter_config.json), nor a model's "
            "folder (config.json)"
        )
    try:
        models.locate(word)
    except MissingPathError:
        siblings = path.parent.iterdir() if path.parent.is_dir() else ()
        near = plugins.nearest(str(path), [str(each) for each in siblings if each.is_dir()])
        hint = f": did you mean {' or '.join(near)}?" if near else ""
        raise MissingPathError(f"{word!r} is no run, adapter, merge or model: there is no such folder{hint}") from None
    if model is not None:
        raise ConfigError(f"{word!r} is a model, and is evaluated as that: drop model={model.name}")
    return Target(ModelConfig(name=word))


def _of_run(word: str, run: RunFolder, model: ModelConfig | None) -> Target:
    cfg = config.check(TrainConfig, config.read_yaml(run.config))
    if cfg.trainer == "none":
        raise ConfigError(f"{word!r} trained nothing: give model={cfg.model.name} task={cfg.task.name}")
    if cfg.adapter.kind != "full":
        return Target(model or cfg.model, run.adapter, run, cfg)
    _refuse_another(word, model)
    return Target(cfg.model.model_copy(update={"name": str(run.model), "revision": None}), None, run, cfg, True)


def _fused_merge(word: str, path: Path, model: ModelConfig | None) -> Target:
    """A merge that was saved as a whole model, its tasks' heads beside it."""
    if not (path / "model" / "config.json").is_file():
        raise MissingPathError(f"{word!r} is a merge without weights (save_merged=false): merge again to evaluate it")
    _refuse_another(word, model)
    return Target(ModelConfig(name=str(path / "model")), path, is_whole=True)


def _refuse_another(word: str, model: ModelConfig | None) -> None:
    if model is not None:
        raise ConfigError(f"{word!r} holds a whole model and is evaluated as that: drop model={model.name}")


def _is_adapter(folder: Path) -> bool:
    return (folder / peft_format.CONFIG_FILE).is_file()


def _base_of(folder: Path) -> str:
    """The base model that an adapter, or a dense merge, says it is for."""
    if not _is_adapter(folder):
        return str(files.read_json(folder / METADATA)["sources"][0]["base_model"])
    name = (prefixes.read(folder) if prefixes.is_prefix(folder) else outline.contents(folder)).base_model
    if not name:
        raise ConfigError(f"adapter {str(folder)!r} does not say which base model it is for: give model=NAME")
    return name
