"""The model's blocks compiled, by torch's own compiler, for the passes that train it and for no other."""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from lorica.errors import ConfigError, ModelError
from lorica.optim.backprop import Estimate, Estimator
from lorica.tasks.batching import Batch
from lorica.tasks.objectives import LossModule

OLDEST_TORCH = "2.7"
# What torch's compiler says of its own insides, which nobody who trains can do anything about.
OWN_WARNINGS = ("The .grad attribute of a Tensor that is not a leaf", "`torch.jit.script_method` is deprecated")
FROM_A_CACHE = "options of several tokens go on from a cache, for which each layer would be compiled by itself"


@dataclass
class CompiledBlocks:
    """A model's blocks, compiled while an estimator works, for any length and any number of rows.

    Blocks of one build share their code. What hangs on a block (hooks, the names of its parameters) stays as it is, and
    after a step the block is what it was: evaluation never meets compiled code, which rounds otherwise. Steps that
    cannot be had compiled go uncompiled, and `tell` is told why, once. So do all steps after one that wants more than
    `max_versions` of the code: such a run would compile rather than train.
    """

    blocks: Sequence[nn.Module]
    tell: Callable[[str], None]
    backend: str | Callable[..., Any] = "inductor"
    max_versions: int = 32
    gave_up: bool = field(default=False, init=False)
    told: set[str] = field(default_factory=set, init=False)
    forwards: list[Callable[..., Any]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for message in OWN_WARNINGS:
            warnings.filterwarnings("ignore", message)
        # Not Module.compile(): it takes a block's hooks into the code, and does not see that they come and go.
        self.forwards = [
            torch.compile(block.forward, dynamic=True, fullgraph=True, backend=self.backend) for block in self.blocks
        ]

    def around(self, estimator: Estimator) -> Estimator:
        """The estimator with the blocks compiled. It raises ModelError where torch cannot compile one whole."""
        return partial(self._estimate, estimator)

    def _estimate(
        self,
        estimator: Estimator,
        objective: LossModule,
        trainable: Mapping[str, nn.Parameter],
        batches: Sequence[Batch],
        step: int,
    ) -> Estimate:
        # Here, since older torch has them by other names, and trains as well.
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

        if any("continuation_ids" in batch.inputs for batch in batches):
            self._tell_once(FROM_A_CACHE)
        elif not self.gave_up:
            try:
                with self._in_place():
                    return estimator(objective, trainable, batches, step)
            except FailOnRecompileLimitHit:
                self.gave_up = True
                self._tell_once(f"the batches are of so many kinds that {self.max_versions} versions do not cover them")
            except TorchDynamoException as error:
                raise ModelError(f"compile=true: this model's blocks do not compile: {_reason(error)}") from None
        return estimator(objective, trainable, batches, step)

    def _tell_once(self, reason: str) -> None:
        if reason not in self.told:
            self.told.add(reason)
            self.tell(f"compile=true, and {reason}: such steps go uncompiled")

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        from torch._dynamo import config as dynamo

        for block, forward in zip(self.blocks, self.forwards, strict=True):
            block.forward = forward  # type: ignore[method-assign]
        try:
            with dynamo.patch(recompile_limit=self.max_versions):
                yield
        finally:
            for block in self.blocks:
                del block.forward


def check_compiler() -> None:
    """Raise ConfigError where torch is too old, or its compiler lacks the C++ compiler that it makes its code with."""
    if torch.__version__ < OLDEST_TORCH:
        raise ConfigError(f"compile=true needs torch {OLDEST_TORCH}, and {torch.__version__} is here: drop compile")
    name = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(name) is None:
        raise ConfigError(f"compile=true needs a C++ compiler, and {name} is not here: install it, or drop compile")


def _reason(error: Exception) -> str:
    """What a compiler's many lines say in one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if not line.endswith("raised:")), type(error).__name__)
