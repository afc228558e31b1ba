"""What `lorica verify` looks at: an adapter, its base, what its run recorded, and one fixed batch of text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lorica import files, models, plugins, randomness
from lorica.adapters import injection, peft_format
from lorica.adapters.adapter import Adapter
from lorica.analysis import equivalence
from lorica.analysis.equivalence import Amplified, Subject
from lorica.config import ModelConfig, TrainConfig, VerifyConfig
from lorica.config.contradictions import LOW_RANK
from lorica.errors import ConfigError, LoricaError, MissingPathError
from lorica.models import Base, Kind
from lorica.results import RunFolder
from lorica.runs.evaluating.targets import Target, resolve_target
from lorica.runs.inspecting.boosters import ledger_of
from lorica.runs.inspecting.texts import padded, text_of
from lorica.runs.ready import chosen, kinds, load_base, loaded_task, ready
from lorica.runs.training.lora import factors
from lorica.training.ledger import Ledger

NUM_ROWS, NUM_TOKENS = 8, 32
RUNS, NAMING = Path("runs"), ("config.yaml", peft_format.CONFIG_FILE)  # where runs lie, what tells a run or an adapter


@dataclass(frozen=True)
class FixedBatch:
    """Rows of tokens, padded on the right, and a class for each; `origin` says where they are from."""

    inputs: Mapping[str, Tensor]
    labels: Tensor  # (b,)
    origin: str

    def loss(self, logits: Tensor, kind: Kind) -> Tensor:
        """Cross-entropy of the classes, or of each next token of the text; of a decoder, of what it is given."""
        if kind == "classification":
            return F.cross_entropy(logits, self.labels % logits.shape[-1])
        tokens = self.inputs["decoder_input_ids" if kind == "seq2seq" else "input_ids"]
        if kind == "causal":
            tokens = tokens.masked_fill(self.inputs["attention_mask"] == 0, -100)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


@dataclass(frozen=True)
class Case:
    """An adapter in its folder, and the base model that it is checked on, bare."""

    folder: Path
    adapter: Adapter
    base: Base
    checksum: str  # of the base, before anything was laid on it
    run: RunFolder | None
    cfg: TrainConfig | None
    batch: FixedBatch
    max_trainable_share: float

    @cached_property
    def record(self) -> Mapping[str, Any]:
        """What the run recorded at its end; empty of an adapter alone, and of a run that did not end."""
        return files.read_json(self.run.record) if self.run is not None and self.run.record.exists() else {}

    @cached_property
    def ledger(self) -> Ledger | None:
        """The boosters of a boosted run; None of any other. Raises AdapterFormatError as `ledger_of` does."""
        return ledger_of(self.run) if self.run is not None else None

    @property
    def only_B(self) -> bool:
        """Whether the run left A as it was drawn."""
        return self.cfg is not None and factors(self.cfg) == "B"

    @cached_property
    def subject(self) -> Subject:
        """The model, the adapter and the batch, for the checks that know nothing else."""
        model, batch, kind = self.base.model, self.batch, self.base.kind

        def logits() -> Tensor:
            found: Tensor = model(**batch.inputs).logits
            return found.float()

        return Subject(model, self.adapter, logits, lambda: batch.loss(logits(), kind))

    @cached_property
    def misfit(self) -> str | None:
        """What of the adapter the base cannot take, if anything."""
        try:
            injection.remove(injection.inject(self.base.model, self.adapter))
        except LoricaError as error:
            return str(error)
        return None

    @property
    def unsound(self) -> str | None:
        """Why no number that the adapter gives means anything; None if it is finite and fits the base."""
        return self.misfit if self.adapter.is_finite() else "the adapter holds NaN or infinity"

    @cached_property
    def unfusable(self) -> str | None:
        """Why no update can be written into the base's weights; None if those that it is for are float matrices."""
        model = self.base.model
        tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
        weights = {path: tensors.get(f"{path}.weight") for path in self.adapter.updates}
        quantised = [path for path, weight in weights.items() if weight is None or not weight.is_floating_point()]
        return f"the base is quantised: the weight of {quantised[0]} takes no update" if quantised else None

    @cached_property
    def strong(self) -> Amplified | None:
        """The adapter with its effect on the logits made plain; None of one that has none."""
        return equivalence.amplified(self.subject)


def case_of(word: str, given: VerifyConfig) -> Case:
    """A run or an adapter folder, loaded with its base.

    Raises MissingPathError for what is not there, with the nearest names, ConfigError for what has no low-rank updates.
    """
    if word != "demo" and not Path(word).expanduser().exists():
        raise MissingPathError(_missing(word))
    target = resolve_target(word, given.model)
    model = target.model
    if target.cfg is not None and given.model is not None:
        said = {key: getattr(given.model, key) for key in given.model.model_fields_set}
        model = target.cfg.model.model_copy(update=said)  # what is not said is as the run had it
    adapter = _adapter_of(word, target)
    assert target.folder is not None
    base = _loaded(model, target.cfg, adapter, given)
    return Case(
        folder=target.folder,
        adapter=adapter,
        base=base,
        checksum=models.checksum(base),
        run=target.run,
        cfg=target.cfg,
        batch=_batch(model, target.cfg, base, given.seed),
        max_trainable_share=given.max_trainable_share,
    )


def _missing(word: str) -> str:
    """The message for a word that names nothing: the nearest runs and adapters, beside it and in runs/."""
    beside = [each for folder in (Path(word).parent, RUNS) if folder.is_dir() for each in sorted(folder.iterdir())]
    known = {each.name: str(each) for each in beside if any((each / name).is_file() for name in NAMING)}
    near = [known[name] for name in plugins.nearest(Path(word).name, known)]
    hint = f": did you mean {' or '.join(near)}?" if near else ": give the folder of a run or of an adapter"
    return f"there is no run, adapter or model folder {word!r}{hint}"


def _adapter_of(word: str, target: Target) -> Adapter:
    kind = target.cfg.adapter.kind if target.cfg else "lora"
    if kind not in LOW_RANK or target.folder is None or target.prefix is not None:
        raise ConfigError(
            f"{word!r} has no low-rank updates to verify: name a run by adapter.kind=lora or xgblora, or its adapter"
        )
    adapter = peft_format.as_stored(target.folder)
    if not adapter.updates:
        raise ConfigError(f"{word!r} holds heads alone: there are no low-rank updates to verify")
    return adapter


def _loaded(model: ModelConfig, cfg: TrainConfig | None, adapter: Adapter, given: VerifyConfig) -> Base:
    """The base as the run loaded it; of an adapter alone, a classifier if it has a head."""
    if cfg is not None:
        kind = kinds(model, cfg.task)[0]
    elif model.kind != "auto":
        kind = model.kind
    else:
        config = models.read_config(model.name, model.revision, model.trust_remote_code)
        kind = "classification" if adapter.heads else models.natural_kind(config)
    device = models.choose_device(given.device)
    return load_base(model, kind, device, cfg.seed if cfg else given.seed, _num_labels(adapter))


def _num_labels(adapter: Adapter) -> int | None:
    """The outputs of the heads' narrowest matrix, which gives the logits; None without a head."""
    outputs = [value.shape[0] for head in adapter.heads.values() for value in head.values() if value.dim() == 2]
    return min(outputs, default=None)


def _batch(model: ModelConfig, cfg: TrainConfig | None, base: Base, seed: int) -> FixedBatch:
    """Texts of the run's task, if they can be had; else tokens drawn at random."""
    origin = "tokens drawn at random"
    if cfg is not None:
        try:
            return _of_task(model, cfg, base)
        except LoricaError as error:
            origin = f"{origin}: {error}"
    generator = randomness.torch_generator(seed, "verify")
    labels = torch.randint(1 << 30, (NUM_ROWS,), generator=generator).to(base.model.device)
    return FixedBatch(padded(base, _drawn(base, generator)), labels, origin)


def _of_task(model: ModelConfig, cfg: TrainConfig, base: Base) -> FixedBatch:
    task = loaded_task(model, cfg.task)[1]
    examples = chosen(task, "train", cfg.task)[:NUM_ROWS]
    rows = ready(base, task, cfg.task, str(base.model.device)).encoded(examples)
    labels = torch.tensor([row.label for row in rows], device=base.model.device)
    texts = padded(base, [text_of(row, NUM_TOKENS) for row in rows])
    return FixedBatch(texts, labels, f"{len(rows)} examples of {task.name}")


def _drawn(base: Base, generator: torch.Generator) -> list[list[int]]:
    return torch.randint(len(base.tokenizer), (NUM_ROWS, NUM_TOKENS), generator=generator).tolist()
