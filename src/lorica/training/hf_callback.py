"""Boosting inside somebody else's transformers `Trainer` (or TRL's): `boost`'s rounds and ledger as one callback.

The Trainer keeps its data order, optimizer, schedule and log; the callback lays on, rolls back and writes the ledger.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from lorica.adapters import injection
from lorica.adapters.adapter import Adapter
from lorica.errors import ConfigError, OutputExistsError, ResumeError
from lorica.randomness import torch_generator
from lorica.training.boosting import Foundation, Round, judged
from lorica.training.fit import MAX_STEPS, Progress, Step, stop_if_hopeless
from lorica.training.ledger import Entry, Ledger
from lorica.training.rounds import RoundRule

Hears = Literal["model", "caller"]


class BoostingCallback(TrainerCallback):  # type: ignore[misc]
    """XGBLoRA (MATH section 2) in a stock Trainer. Make it first: the Trainer's optimizer must find the factors.

        boosting = BoostingCallback(model, ["q_proj", "v_proj"], folder="run", rule=EverySteps(100))
        Trainer(model, args, train_dataset=rows, callbacks=[boosting]).train()
        lorica.save_adapter(boosting.chain(), Path("adapter"))

    `targets` are suffixes, full paths or one regex; `heads` the modules trained whole; `alpha` is `rank` unless given.
    The rule is fed with the raw loss of every optimizer step, which the model's own outputs tell; where the Trainer
    computes its loss elsewhere (compute_loss_func, label smoothing, a preference loss), give `hears="caller"` and call
    `hear(loss)` there. A step whose loss or gradient is not finite is not applied. After the last step the model is
    an ordinary one again, with everything laid on and its heads trained. A checkpoint of the Trainer's holds the live
    layers and cannot be resumed from: what lasts is the ledger in `folder`, written at the end of every round.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: str | Sequence[str],
        *,
        folder: str | Path,
        rule: RoundRule,
        rank: int = 1,
        alpha: float | None = None,
        seed: int = 0,
        shrinkage: float = 1.0,
        heads: Sequence[str] = (),
        dropout: float = 0.0,
        base_model: str | None = None,
        hears: Hears = "model",
        on_round: Callable[[Entry], None] = lambda entry: None,
    ) -> None:
        self.rule, self.seed, self.shrinkage, self.on_round = rule, seed, shrinkage, on_round
        self.base_model = base_model
        self.ledger = _new_ledger(Path(folder))
        self.foundation = Foundation(model)
        paths = injection.find_targets(model, targets, heads)
        alpha = rank if alpha is None else alpha
        self._draw = partial(injection.create, model, paths, rank=rank, alpha=alpha, seed=seed, heads=heads)
        self.live = injection.inject(model, self._new_booster(0), dropout)
        self.listener = LossListener(model, hears)
        self.progress = Progress()
        self.round: Round | None = None
        self.finished = False
        self._step: Step | None = None
        self._begun = 0.0

    def chain(self) -> Adapter:
        """Everything laid on so far as one adapter of the untouched base, with the heads as of the last round."""
        return self.ledger.chain(self.base_model)

    def hear(self, loss: Tensor) -> None:
        """Take the mean loss of one micro-batch, under `hears="caller"`."""
        self.listener.hear(loss)

    def finish(self) -> None:
        """End the round under way and leave an ordinary model.

        `on_train_end` does so; call it yourself if a training broke off.
        """
        if self.finished:
            return
        if self.round is not None and self.progress.step > self.round.first_step:
            self._end_round(self.round, MAX_STEPS)
        self.finished, self.round = True, None
        self.listener.stop()
        injection.remove(self.live)
        for path, head in self.chain().heads.items():
            self.foundation.model.get_submodule(path).load_state_dict(dict(head))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check that the Trainer is one that boosting can live in, and start the first round."""
        if self.finished or self.round is not None:
            raise ConfigError("this callback has been in a training already: make a new one, in another folder")
        _check_trainer(args, state)
        self._check_optimizer(kwargs["model"], kwargs["optimizer"])
        self._begun = time.monotonic()
        self._begin_round(kwargs["optimizer"])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Know the step's raw loss; leave the optimizer no gradient where the step is not to be applied."""
        parameters = list(self.live.trainable().values())
        loss = self.listener.take(state.global_step + 1)
        applied = math.isfinite(loss) and _are_finite(parameter.grad for parameter in parameters)
        if not applied:
            for parameter in parameters:
                parameter.grad = None
        rate = float(kwargs["optimizer"].param_groups[0]["lr"])
        self._step = self._counted(loss, rate, applied, state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the rule the step; where it ends the round, lay on and start the next."""
        assert self.round is not None and self._step is not None
        reason = self.round.watch(self._step)
        if reason is None:
            stop_if_hopeless(self.progress, self._step.learning_rate)
        else:
            self._end_round(self.round, reason)
            self._begin_round(kwargs["optimizer"])
        if state.global_step >= state.max_steps:
            self.finish()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Lay the last booster on, also where something else than the number of steps ended the training."""
        self.finish()

    def _begin_round(self, optimizer: torch.optim.Optimizer) -> None:
        """Write the next booster into the parameters that the optimizer holds; it forgets the last one's moments."""
        number = len(self.ledger.boosters)
        start = self._new_booster(number)
        self.live.put(start)
        device = next(iter(self.live.layers.values())).A.device
        self.live.set_dropout_generator(torch_generator(self.seed, "dropout", number, device=device))
        optimizer.state.clear()
        self.round = Round(number, self.progress.step, self.live, self.rule, start)
        self.rule.begin(self.progress.step)

    def _end_round(self, round: Round, reason: str) -> None:
        """Roll back where the rule says so, write the ledger, lay on. The live layers are off the model meanwhile."""
        entry, booster = judged(round, reason, self.progress, self.shrinkage)
        injection.remove(self.live)
        self.ledger.append(entry, booster)
        self.foundation.lay_on(self.ledger.chain())
        injection.restore(self.live)
        self.on_round(entry)

    def _new_booster(self, number: int) -> Adapter:
        """Round `number`'s booster as drawn, with the heads as they were left."""
        before = self.ledger.boosters
        new = self._draw(round=number)
        return Adapter(new.updates, before[-1].heads if before else new.heads, self.base_model)

    def _check_optimizer(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        missing = [name for name, parameter in self.live.trainable().items() if id(parameter) not in held]
        if model is not self.foundation.model or missing:
            raise ConfigError(
                "the Trainer does not train the booster's factors: make the callback first, on the very model that the "
                "Trainer is then given (no model_init, PEFT wrapper, FSDP or DeepSpeed), and an own optimizer after it"
            )

    def _counted(self, loss: float, rate: float, applied: bool, state: Any) -> Step:
        progress = self.progress
        progress.step = state.global_step + 1
        progress.forwards = self.listener.num_heard
        progress.tokens = int(state.num_input_tokens_seen)  # counted if the Trainer is asked to
        progress.seconds = time.monotonic() - self._begun
        progress.num_bad += not applied
        progress.bad_in_a_row = 0 if applied else progress.bad_in_a_row + 1
        return Step(progress.step, loss, rate, progress.forwards, progress.tokens, progress.seconds, applied)


class LossListener:
    """The raw loss of each optimizer step over its micro-batches; what a Trainer logs are averages since its last log.

    Where a step has several micro-batches the Trainer tells the model how many items they have together. Most language
    models then give each micro-batch's share of the one mean, so the shares add up; other models ignore it and give
    the micro-batch's own mean. Which it is shows in whether the loss depends on that number, and is asked once.
    """

    def __init__(self, model: nn.Module, hears: Hears = "model") -> None:
        self.hears = hears
        self.num_heard = 0
        self.gives_shares = False
        self._losses: list[Tensor] = []
        self._num_items: Tensor | None = None  # of the one forward that is asked
        self._asked = False
        self._hooks: list[RemovableHandle] = []
        if hears == "model":
            self._hooks.append(model.register_forward_pre_hook(self._before, with_kwargs=True))
            self._hooks.append(model.register_forward_hook(self._after))

    def hear(self, loss: Tensor) -> None:
        """Take one micro-batch's loss; it is not looked at before the step, so that no device has to wait."""
        self._losses.append(loss.detach())
        self.num_heard += 1

    def take(self, step: int) -> float:
        """The loss of `step`: the sum of its micro-batches' shares, or the mean of their means."""
        if not self._losses:
            raise ConfigError(_nothing_heard(step, self.hears))
        heard = torch.stack([loss.float() for loss in self._losses])
        self._losses = []
        return float(heard.sum() if self.gives_shares else heard.mean())

    def stop(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _before(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        count = kwargs.get("num_items_in_batch")
        if self._asked or count is None or not _is_training(model):
            return None
        self._num_items = torch.as_tensor(count).float().requires_grad_()
        return args, {**kwargs, "num_items_in_batch": self._num_items}

    def _after(self, model: nn.Module, args: Any, outputs: Any) -> None:
        if not _is_training(model):
            return
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs[0]
        if not isinstance(loss, Tensor) or loss.dim() > 0:
            return
        if self._num_items is not None and loss.requires_grad:
            (slope,) = torch.autograd.grad(loss, self._num_items, retain_graph=True, allow_unused=True)
            self.gives_shares, self._asked, self._num_items = slope is not None, True, None
        self.hear(loss)


def _is_training(model: nn.Module) -> bool:
    return model.training and torch.is_grad_enabled()


def _nothing_heard(step: int, hears: Hears) -> str:
    if hears == "caller":
        return f"step {step}: hears='caller', and hear(loss) was not called since the last step"
    return (
        f"step {step}: the model's outputs held no loss, so the Trainer computes it elsewhere (compute_loss_func, "
        "label smoothing, a preference loss): make the callback with hears='caller' and call its hear(loss) there"
    )


def _new_ledger(folder: Path) -> Ledger:
    ledger = Ledger(folder)
    if ledger.lines.exists():
        raise OutputExistsError(f"folder={str(folder)!r} holds a ledger already: give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    return ledger


def _check_trainer(args: Any, state: Any) -> None:
    if state.global_step > 0:
        raise ResumeError(
            f"the Trainer resumes at step {state.global_step}, and its checkpoints do not hold the rounds: "
            "train afresh, or use lorica's own loop, which resumes"
        )
    if args.world_size > 1 or args.n_gpu > 1:
        raise ConfigError(
            f"boosting wants one process and one device, and this Trainer has {args.world_size} and {args.n_gpu}"
        )
    if args.load_best_model_at_end:
        raise ConfigError("load_best_model_at_end=True would write an older round over the last: set it to False")


def _are_finite(gradients: Iterable[Tensor | None]) -> bool:
    norms = torch._foreach_norm([gradient for gradient in gradients if gradient is not None])
    return not norms or bool(torch.isfinite(torch.stack(norms)).all())
