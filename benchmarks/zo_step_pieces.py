"""The pieces of zo_step.py: random OPTs of the sizes compared, the MeZO step as its reference, and our step.

    python benchmarks/zo_step_pieces.py {inference | step | full_step | warm_start} SHAPE DTYPE BATCH LENGTH DEVICE

prints the peak of memory above the loaded model.
"""

from __future__ import annotations

import copy
import ctypes
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from lorica.adapters import injection
from lorica.adapters.branches import of_last_block
from lorica.adapters.injection import Live
from lorica.optim.backprop import Estimator, backprop
from lorica.optim.directions import Directions
from lorica.optim.probes import Probing
from lorica.optim.streamed import StreamedDescent, StreamedZerothOrder
from lorica.optim.updates import update_rule
from lorica.optim.zeroth_order import ZerothOrder
from lorica.tasks.batching import ChoiceBatch
from lorica.tasks.objectives import LossModule, scores
from lorica.training.fit import fit

RANK, ALPHA, EPSILON, RATE = 8, 16, 1e-2, 1e-6
NUM_OPTIONS, VOCABULARY, FIRST_WORD = 2, 50272, 4
SHAPES = {
    "opt-125m": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "word_embed_proj_dim": 768},
    "opt-350m": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "word_embed_proj_dim": 512},
    "opt-1.3b": {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32, "word_embed_proj_dim": 2048},
}
TARGETS = ("q_proj", "v_proj")


def random_opt(shape: str, dtype: str, device: str) -> Any:
    """An OPT with random weights, drawn from seed 0."""
    sizes = SHAPES[shape]
    config = transformers.OPTConfig(
        **sizes,
        ffn_dim=4 * sizes["hidden_size"],
        vocab_size=VOCABULARY,
        do_layer_norm_before=shape != "opt-350m",
        dtype=getattr(torch, dtype),
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.OPTForCausalLM(config).to(getattr(torch, dtype))
    return model.eval().requires_grad_(False)


def sharing(model: nn.Module) -> Any:
    """Another model of the very same parameters."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


@dataclass(frozen=True)
class Prompts:
    """A batch of random prompts of one length, two options of one token each, as both sides take it."""

    tokens: Tensor  # (b, t)
    options: Tensor  # (b, 2)
    labels: Tensor  # (b,)

    def ours(self) -> ChoiceBatch:
        positions = torch.arange(self.tokens.shape[1], device=self.tokens.device).expand_as(self.tokens)
        inputs = {
            "input_ids": self.tokens,
            "attention_mask": torch.ones_like(self.tokens),
            "position_ids": positions,
        }
        return ChoiceBatch(inputs, self.options, self.labels, NUM_OPTIONS, one_token=True)


def prompts(batch_size: int, length: int, device: str, seed: int = 0) -> Prompts:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(FIRST_WORD, VOCABULARY, (batch_size, length), generator=generator)
    options = torch.tensor([[100, 200]]).expand(batch_size, -1)
    labels = torch.randint(NUM_OPTIONS, (batch_size,), generator=generator)
    return Prompts(tokens.to(device), options.to(device), labels.to(device))


class MezoLinear(nn.Module):
    """LoRA as MeZO's code runs it: in the base's dtype, two products and a sum."""

    def __init__(self, base: nn.Linear, A: Tensor, B: Tensor) -> None:
        super().__init__()
        self.base = base
        self.lora_A = nn.Parameter(A.to(base.weight.dtype).clone())
        self.lora_B = nn.Parameter(B.to(base.weight.dtype).clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + (x @ self.lora_A.T @ self.lora_B.T) * (ALPHA / RANK)


@dataclass
class Mezo:
    """A MeZO step (arXiv 2305.17333, algorithm 1), as its code does it on a task of options.

    Every option of an example is a row of its own, prompt and option together; the logits of all positions are taken,
    and their log-softmax. The parameters are moved in place, three times a step, along z drawn anew from the seed.
    """

    model: Any
    parameters: list[nn.Parameter] = field(default_factory=list)
    seeds: Iterator[int] = field(default_factory=itertools.count)

    def step(self, batch: Prompts) -> None:
        seed = next(self.seeds)
        plus, minus = self.losses(batch, seed)
        slope = (plus - minus) / (2 * EPSILON)
        self._move(seed, -RATE * slope / EPSILON)

    def losses(self, batch: Prompts, seed: int) -> tuple[float, float]:
        """At θ + εz and θ - εz; the parameters are moved back afterwards, but for rounding."""
        self._move(seed, 1.0)
        plus = self._loss(batch)
        self._move(seed, -2.0)
        minus = self._loss(batch)
        self._move(seed, 1.0)
        return plus, minus

    def direction(self, seed: int) -> Tensor:
        """z (n,) of a seed."""
        torch.manual_seed(seed)
        return torch.cat([self._z(parameter).flatten().float() for parameter in self.parameters])

    def _move(self, seed: int, scale: float) -> None:
        torch.manual_seed(seed)
        for parameter in self.parameters:
            parameter.data = parameter.data + scale * self._z(parameter) * EPSILON

    def _z(self, like: Tensor) -> Tensor:
        return torch.normal(0, 1, like.shape, device=like.device, dtype=like.dtype)

    @torch.inference_mode()
    def _loss(self, batch: Prompts) -> float:
        rows = batch.tokens.repeat_interleave(NUM_OPTIONS, dim=0)
        tokens = torch.cat([rows, batch.options.reshape(-1, 1)], dim=1)  # (2b, t + 1)
        logits = self.model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
        shifted = logits[..., :-1, :].contiguous()
        targets = tokens[..., 1:].clone()
        asked = torch.zeros_like(targets, dtype=torch.bool)
        asked[:, -1] = True  # the option
        targets[~asked] = 0
        log_p = F.log_softmax(shifted, dim=-1)
        picked = log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        found = (picked * asked).sum(-1) / asked.sum(-1)  # (2b,)
        return float(F.cross_entropy(found.view(-1, NUM_OPTIONS), batch.labels))


@dataclass
class Ours:
    """Our step, as a run takes it: `fit` with the two-sided estimator and plain descent."""

    live: Live
    probing: Probing = field(default_factory=lambda: Probing(timed=True))

    def __post_init__(self) -> None:
        self.live.set_training(False)
        self.objective = LossModule(self.live.model, "classification")
        self.trainable = self.live.trainable()
        self.estimator: Estimator = ZerothOrder("spsa", EPSILON, Directions(), probing=self.probing)
        self.optimizer = update_rule("sgd", self.trainable.values(), learning_rate=RATE)

    def step(self, batch: Prompts, num_steps: int = 1) -> None:
        fit(
            self.objective,
            self.trainable,
            itertools.repeat(batch.ours()),
            estimator=self.estimator,
            optimizer=self.optimizer,
            learning_rate=lambda step: RATE,
            num_steps=num_steps,
        )

    def loss(self, batch: Prompts) -> float:
        """The mean of a step's losses, without taking the step."""
        return self.estimator(self.objective, self.trainable, [batch.ours()], 0).loss

    def num_branches(self, batch: Prompts) -> int:
        """Of a pass over the batch, as was chosen for it."""
        kind = self.probing.kind(2, batch.tokens.numel())
        return self.probing.chosen.get(kind, 1)

    def losses(self, batch: Prompts, z: Tensor) -> list[float]:
        """At θ + εz and θ - εz, z (n,) in the order of the trainable parameters."""
        offsets = torch.stack([z, -z]) * EPSILON
        return self.probing.losses(self.objective, self.trainable, [batch.ours()], offsets).tolist()


class WarmStart(Ours):
    """A step of a warm start: the factors of the last block by gradients that end there."""

    def __post_init__(self) -> None:
        last = of_last_block(self.live.model, list(self.live.layers))
        for path, layer in self.live.layers.items():
            layer.requires_grad_(path in last)
        super().__post_init__()
        self.estimator = backprop
        self.optimizer = update_rule("adamw", self.trainable.values(), learning_rate=RATE)


@dataclass
class Whole:
    """Our step of a whole model, without adapters: every parameter is probed and moved."""

    model: Any

    def step(self, batch: Prompts, num_steps: int = 1) -> None:
        trainable = dict(self.model.named_parameters())
        estimator = StreamedZerothOrder("spsa", EPSILON)
        fit(
            LossModule(self.model, "classification"),
            trainable,
            itertools.repeat(batch.ours()),
            estimator=estimator,
            optimizer=StreamedDescent(trainable, estimator, learning_rate=RATE),
            learning_rate=lambda step: RATE,
            num_steps=num_steps,
        )


def with_adapters(model: Any) -> tuple[Live, Mezo]:
    """The same random adapter on the model, ours, and on another model of the same parameters, MeZO's."""
    theirs = sharing(model)
    targets = [path for path, _ in model.named_modules() if path.endswith(TARGETS)]
    live = injection.inject(model, injection.create(model, targets, rank=RANK, alpha=ALPHA))
    parameters = []
    generator = torch.Generator().manual_seed(1)
    for path, layer in live.layers.items():
        layer.B.data.copy_(torch.randn(layer.B.shape, generator=generator) * 0.02)
        parent, _, name = path.rpartition(".")
        twin = MezoLinear(layer.base, layer.A.data, layer.B.data)  # type: ignore[arg-type]
        setattr(theirs.get_submodule(parent), name, twin)
        parameters += [twin.lora_A, twin.lora_B]
    return live, Mezo(theirs, parameters)


def body(model: Any, batch: Prompts) -> Callable[[], Any]:
    """A bare forward pass of the body, without logits."""
    inputs = batch.ours().inputs
    return torch.inference_mode()(lambda: model.model(**inputs, use_cache=False))


def memory(what: str, shape: str, dtype: str, batch_size: int, length: int, device: str) -> dict[str, float]:
    """MiB of the model's parameters, and above the loaded model at the peak of our steps or of scoring the batch."""
    model = random_opt(shape, dtype, device)
    kinds = {"step": Ours, "warm_start": WarmStart, "inference": Ours}
    ours = Whole(model) if what == "full_step" else kinds[what](with_adapters(model)[0])
    batch = prompts(batch_size, length, device)

    def work() -> None:
        if what != "inference":
            ours.step(batch, num_steps=5)
        else:
            with torch.no_grad():
                for _ in range(5):
                    scores(model, batch.ours())

    model_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return {"peak_mib": _peak_on(device, work), "model_mib": model_bytes / 2**20}


def _peak_on(device: str, work: Callable[[], None]) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what making the model left behind would serve the work unseen
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak until now
    work()
    return _status("VmHWM") - before


def _status(name: str) -> float:
    """A line of the kernel's account of this process's memory, in MiB."""
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) / 1024


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, shape, dtype, batch_size, length, device = sys.argv[1:]
    print(json.dumps(memory(what, shape, dtype, int(batch_size), int(length), device)))
