"""An adapter live, fused and taken off again: what is trained, what it changes, and whether all forms are the same.

Two forms of an adapter that does nothing are always the same, so the adapter is amplified until its effect on the
logits is plain, and differences are told as shares of that effect.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorica.adapters import injection
from lorica.adapters.adapter import Adapter
from lorica.adapters.injection import Live
from lorica.analysis.checks import Check, counted, judged

PLAIN_EFFECT = 0.1  # of the logits' norm
LARGEST_FACTOR = 1e6  # with which a tiny effect is amplified; one that needs more is none
TOLERANCES = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}  # difference over effect
FLIPS = {torch.float32: 0.01, torch.float16: 0.05, torch.bfloat16: 0.05}  # share of predictions that may change
NUM_STEPS, STEP, LEAST_CHANGE = 10, 1e-3, -1e-6  # of Adam, and of the loss, for a look whether it falls


@dataclass(frozen=True)
class Subject:
    """A bare base model, an adapter for it, and what it is asked: the logits and the loss of one fixed batch."""

    model: nn.Module
    adapter: Adapter
    logits: Callable[[], Tensor]  # (..., classes) float32
    loss: Callable[[], Tensor]

    @property
    def dtype(self) -> torch.dtype:
        """Of the base's floating-point parameters."""
        return next(each.dtype for each in self.model.parameters() if each.is_floating_point())

    @property
    def heads(self) -> Adapter:
        """The adapter without its updates: heads are the same in every form."""
        return Adapter({}, self.adapter.heads, self.adapter.base_model)


@contextlib.contextmanager
def laid_on(model: nn.Module, adapter: Adapter) -> Iterator[Live]:
    """The adapter live on the model within the block."""
    live = injection.inject(model, adapter)
    try:
        yield live
    finally:
        injection.remove(live)


def of_training(subject: Subject, *, only_B: bool = False) -> Iterator[Check]:
    """trainable, forward, backward, base_gradients: a step of training, short of the step."""
    with laid_on(subject.model, subject.adapter) as live:
        live.train_only("B" if only_B else "both")
        factors = "B" if only_B else "AB"
        meant = {f"{path}.{name}" for path in live.layers for name in factors}
        meant |= {f"{path}.{name}" for path, head in live.heads.items() for name, _ in head.named_parameters()}
        wrong = sorted(meant ^ set(live.trainable()))
        yield counted("trainable", wrong, f"{len(meant)} tensors are trainable, factors and heads alone")
        loss = subject.loss()
        yield judged("forward", 0.0 if math.isfinite(loss.item()) else 1.0, 0.0, f"loss {loss.item():.4f}")
        loss.backward()  # type: ignore[no-untyped-call]
        yield _of_gradients(live)
        base = [name for name, each in subject.model.named_parameters() if name not in meant and each.grad is not None]
        yield counted("base_gradients", base, "no parameter of the base has a gradient")


def _of_gradients(live: Live) -> Check:
    """Every trainable tensor has a finite gradient, and one of them is not zero."""
    gradients = {name: parameter.grad for name, parameter in live.trainable().items()}
    wrong = [name for name, each in gradients.items() if each is None or not bool(torch.isfinite(each).all())]
    total = sum(float(each.double().square().sum()) for each in gradients.values() if each is not None) ** 0.5
    if not wrong and total == 0:
        wrong = ["every gradient is zero"]
    return counted("backward", wrong, f"{len(gradients)} finite gradients of norm {total:.3g}")


def of_learning(subject: Subject, fresh: Adapter) -> Check:
    """learns: a few steps of Adam on the fixed batch, from an adapter that does nothing yet, lower the loss."""
    with laid_on(subject.model, fresh) as live:
        optimizer = torch.optim.Adam(live.trainable().values(), lr=STEP)
        before = subject.loss().item()
        for _ in range(NUM_STEPS):
            optimizer.zero_grad()
            subject.loss().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        after = subject.loss().item()
    said = f"change of a fixed batch's loss, {NUM_STEPS} steps from a fresh adapter: {before:.4f} to {after:.4f}"
    return judged("learns", after - before, LEAST_CHANGE, said)


@torch.no_grad()
def of_removal(subject: Subject) -> Check:
    """removal: the model without the adapter is the one before it, to the last bit of its logits."""
    before = subject.logits()
    with laid_on(subject.model, subject.adapter):
        pass
    difference = float((subject.logits() - before).abs().max())
    return judged("removal", difference, 0.0, "largest change of the base's logits by laying on and taking off")


@dataclass(frozen=True)
class Amplified:
    """A subject's adapter, its updates times `factor`, and the logits with it and without its updates."""

    adapter: Adapter
    factor: float
    live: Tensor
    off: Tensor

    def difference(self, other: Tensor) -> float:
        """How far other logits are from the live ones, as a share of the updates' effect."""
        return _length(other - self.live) / _length(self.live - self.off)

    @property
    def said(self) -> str:
        """What the difference is a share of."""
        times = f", the updates {self.factor:g}-fold" if self.factor != 1 else ""
        return f"of the effect on the logits ({_length(self.live - self.off) / _length(self.off):.2g} of them{times})"


@torch.no_grad()
def amplified(subject: Subject) -> Amplified | None:
    """The adapter with its updates made strong enough for their effect to be plain; None if nothing does that."""
    with laid_on(subject.model, subject.heads):
        off = subject.logits()
    factor = 1.0
    while factor <= LARGEST_FACTOR:
        strong = Adapter((subject.adapter * factor).updates, subject.adapter.heads)
        with laid_on(subject.model, strong):
            live = subject.logits()
        if _length(live - off) >= PLAIN_EFFECT * _length(off):
            return Amplified(strong, factor, live, off)
        factor *= 4
    return None


@torch.no_grad()
def of_fusing(subject: Subject, strong: Amplified) -> Iterator[Check]:
    """fused, top_1: cast(W0 + ΔW) against W0 beside B·A."""
    with fused(subject.model, strong.adapter):
        found = subject.logits()
    tolerance = TOLERANCES[subject.dtype]
    yield judged("fused", strong.difference(found), tolerance, f"fused against live, {strong.said}")
    flips = float((found.argmax(dim=-1) != strong.live.argmax(dim=-1)).double().mean())
    yield judged("top_1", flips, FLIPS[subject.dtype], "share of predictions that differ, fused against live")


@torch.no_grad()
def of_unfusing(subject: Subject) -> Check:
    """unfuse: the base's weights after fusing and unfusing are those before, bit for bit."""
    bare = {path: _weight(subject.model, path).clone() for path in subject.adapter.updates}
    injection.unfuse(subject.model, injection.fuse(subject.model, subject.adapter))
    drift = [float((_weight(subject.model, path) - weight).abs().max()) for path, weight in bare.items()]
    return judged("unfuse", max(drift, default=0.0), 0.0, "largest change of a weight by fusing and unfusing")


@contextlib.contextmanager
def fused(model: nn.Module, adapter: Adapter) -> Iterator[None]:
    """The updates in the weights and the heads in place within the block; the pristine weights afterwards."""
    pristine = injection.fuse(model, adapter)
    try:
        with laid_on(model, Adapter({}, adapter.heads)):
            yield
    finally:
        injection.unfuse(model, pristine)


@dataclass(frozen=True)
class Speed:
    """What running the adapter beside the weights costs; `ratio` is the median over rounds of live over fused."""

    live_seconds: float
    fused_seconds: float
    ratio: float
    num_rounds: int
    adapter_bytes: int  # that live layers hold beside the base
    live_peak_bytes: int | None  # of the device during a pass; None where there is no such count
    fused_peak_bytes: int | None


@torch.no_grad()
def speed(subject: Subject, num_rounds: int) -> Speed:
    """Time the batch fused and live in turn, so that what slows the machine slows both."""
    rounds = [_timed_both(subject) for _ in range(num_rounds + 1)][1:]  # the first warms up
    live, still = zip(*rounds, strict=True)
    updates = subject.adapter.updates.values()
    return Speed(
        live_seconds=statistics.median(each.seconds for each in live),
        fused_seconds=statistics.median(each.seconds for each in still),
        ratio=statistics.median(one.seconds / other.seconds for one, other in rounds),
        num_rounds=num_rounds,
        adapter_bytes=sum(4 * (update.A.numel() + update.B.numel()) for update in updates),
        live_peak_bytes=live[-1].peak_bytes,
        fused_peak_bytes=still[-1].peak_bytes,
    )


@dataclass(frozen=True)
class _Pass:
    seconds: float
    peak_bytes: int | None


def _timed_both(subject: Subject) -> tuple[_Pass, _Pass]:
    """(live, fused)"""
    with laid_on(subject.model, subject.adapter):
        live = _timed(subject)
    with fused(subject.model, subject.adapter):
        return live, _timed(subject)


def _timed(subject: Subject) -> _Pass:
    device = next(subject.model.parameters()).device
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    subject.logits()
    if on_cuda:
        torch.cuda.synchronize(device)
    return _Pass(time.perf_counter() - begin, torch.cuda.max_memory_allocated(device) if on_cuda else None)


def _weight(model: nn.Module, path: str) -> Tensor:
    return model.get_submodule(path).weight  # type: ignore[return-value]


def _length(logits: Tensor) -> float:
    return float(torch.linalg.vector_norm(logits.double()))
