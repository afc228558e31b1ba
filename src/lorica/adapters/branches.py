"""G candidates of some parameters in one forward pass: what runs before them is computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lorica.adapters.lora import LoraLinear
from lorica.adapters.prefix import Direct

KEPT_SHARE = 0.05  # of the parameters' bytes, which blocks that run once may keep of what they gave


def can_branch(model: nn.Module, names: Sequence[str]) -> bool:
    """Whether each of these parameters is a live layer's, a prefix's, or a linear head's outside the blocks."""
    stacks = _stacks(model)
    return all(
        isinstance(owner, LoraLinear | Direct) or (type(owner) is nn.Linear and _place(path, stacks) is None)
        for path, owner in _owners(model, names).items()
    )


def can_share(model: nn.Module, names: Sequence[str]) -> bool:
    """Whether every live layer with one of these parameters lies in the model's last stack of blocks.

    What comes before is then the same for all branches, and the rest of the stack meets nothing that is not its own. An
    encoder's branches would meet its decoder, which has masks made for the rows that went in.
    """
    stacks, owners = _stacks(model), _owners(model, names)
    places = [_place(path, stacks) for path, owner in owners.items() if isinstance(owner, LoraLinear)]
    last = next(reversed(stacks), None)
    return bool(places) and all(place is not None and place[0] == last for place in places)


@contextmanager
def branched(model: nn.Module, names: Sequence[str], *, num_branches: int, at_blocks: bool = False) -> Iterator[None]:
    """Within the block the model takes values (G, *shape) for the parameters of these names, one for each branch.

    Its inputs hold the branches' rows one after the other. Or, `at_blocks` and where the model `can_share`, the rows of
    one branch alone: what goes into a block is then repeated, from the first block with such a parameter on.
    """
    with ExitStack() as undo:
        for owner in _owners(model, names).values():
            if isinstance(owner, nn.Linear):
                owner.forward = partial(_by_branch, owner, num_branches)  # type: ignore[method-assign]
                undo.callback(delattr, owner, "forward")
        blocks = _blocks_from(model, names) if at_blocks else []
        repeating = _Repeating(num_branches, next(iter(blocks), None))
        for block in blocks:
            undo.callback(block.register_forward_pre_hook(repeating, with_kwargs=True).remove)
        yield


@contextmanager
def unchanged_once(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Within the block passes over one batch differ by the parameters of these names alone, none in training mode.

    Where the model `can_share`, blocks before the first such parameter run in the first pass, and in the others give
    what they gave then: the same bits. Not in a pass with a cache, which they have to fill.
    """
    with ExitStack() as undo:
        below = _blocks_before(model, names) if can_share(model, names) else []
        if below:
            kept = _Kept(KEPT_SHARE * sum(parameter.nbytes for parameter in model.parameters()))
        for block in below:
            undo.callback(_set_forward, block, vars(block).get("forward"))
            _set_forward(block, partial(kept.run, block, block.forward))
        yield


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The members of every stack of the model, in order."""
    return [block for stack in _stacks(model).values() for block in stack]


def of_last_block(model: nn.Module, paths: Sequence[str]) -> list[str]:
    """Those of the modules at `paths` that lie in the last block of the model's last stack."""
    stacks = _stacks(model)
    if not stacks:
        return []
    last = next(reversed(stacks))
    return [path for path in paths if _place(path, stacks) == (last, len(stacks[last]) - 1)]


def _owners(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """Path -> module, of the modules that hold the parameters themselves."""
    paths = dict.fromkeys(name.rpartition(".")[0] for name in names)
    return {path: model.get_submodule(path) for path in paths}


def _by_branch(linear: nn.Linear, num_branches: int, x: Tensor) -> Tensor:
    """(G · b, ..., in) -> (G · b, ..., out), by weight (G, out, in) and bias (G, out) where they are stacked."""
    weight = linear.weight.expand(num_branches, -1, -1)  # (G, out, in)
    y = torch.bmm(x.reshape(num_branches, -1, x.shape[-1]), weight.transpose(1, 2))
    if linear.bias is not None:
        y = y + linear.bias.expand(num_branches, -1).unsqueeze(1)
    return y.view(*x.shape[:-1], -1)


def _blocks_from(model: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """The blocks of the last stack, from the first that holds one of the parameters on."""
    blocks, first = _last_stack(model, names)
    return blocks[first:]


def _blocks_before(model: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """The blocks of the other stacks, and of the last one those before the first that holds one of the parameters."""
    blocks, first = _last_stack(model, names)
    return blocks_of(model)[: first - len(blocks) or None]


def _last_stack(model: nn.Module, names: Sequence[str]) -> tuple[list[nn.Module], int]:
    """The blocks of the last stack, and the number of the first that holds one of the parameters."""
    path, blocks = list(_stacks(model).items())[-1]
    numbers = [place[1] for name in names if (place := _place(name, {path: blocks})) is not None]
    return list(blocks), min(numbers, default=len(blocks))


def _place(name: str, stacks: Mapping[str, nn.ModuleList]) -> tuple[str, int] | None:
    """(path of the stack, number of the block) that a module or parameter lies in."""
    for path in stacks:
        if name.startswith(f"{path}."):
            return path, int(name.removeprefix(f"{path}.").partition(".")[0])
    return None


def _stacks(module: nn.Module, prefix: str = "") -> dict[str, nn.ModuleList]:
    """The model's stacks of blocks by their paths: its outermost module lists, in order."""
    found: dict[str, nn.ModuleList] = {}
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList):
            found[prefix + name] = child
        else:
            found |= _stacks(child, f"{prefix}{name}.")
    return found


@dataclass
class _Repeating:
    """Repeats a block's inputs for the branches, where that was not done in a block before."""

    num_branches: int
    first: nn.Module | None
    num_rows: int = 0  # of one branch, as they go into the first block

    def __call__(
        self, block: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if block is self.first:
            self.num_rows = len(inputs[0] if inputs else next(iter(options.values())))
        return tuple(map(self._repeated, inputs)), {name: self._repeated(value) for name, value in options.items()}

    def _repeated(self, value: Any) -> Any:
        """A tensor of one branch's rows, or what of a tuple is one, repeated; anything else as it is.

        A vector is no tensor of rows: it counts positions.
        """
        if isinstance(value, tuple):
            return tuple(map(self._repeated, value))
        if isinstance(value, Tensor) and value.dim() > 1 and len(value) == self.num_rows:
            return value.repeat(self.num_branches, *(1,) * (value.dim() - 1))
        return value


@dataclass
class _Kept:
    """What blocks gave for the hidden states that they were handed, as far as there is `room` (bytes) for it."""

    room: float
    outputs: dict[nn.Module, _Output] = field(default_factory=dict)

    def run(self, block: nn.Module, forward: Callable[..., Any], /, *inputs: Any, **options: Any) -> Any:
        given = (*inputs, *options.values())  # the hidden states first
        before = self.outputs.get(block)
        if before is not None and before.is_of(given[0]) and _is_plain(given):
            return before.value
        found = forward(*inputs, **options)
        if _is_plain((*given, found)):
            self._keep(block, _Output(given[0], found))
        return found

    def _keep(self, block: nn.Module, output: _Output) -> None:
        self.outputs.pop(block, None)
        held = {id(each): each.nbytes for kept in (*self.outputs.values(), output) for each in kept.tensors}
        if sum(held.values()) <= self.room:
            self.outputs[block] = output


class _Output:
    """What a block gave, and the hidden states that it was of; of no use from when a tensor of these is written."""

    def __init__(self, hidden: Tensor, value: Any) -> None:
        self.hidden, self.value = hidden, value
        found = value if isinstance(value, tuple) else (value,)
        self.tensors = [each for each in (hidden, *found) if isinstance(each, Tensor)]
        self.versions = self._versions()

    def is_of(self, hidden: Tensor) -> bool:
        """Whether the hidden states that a block is handed are those."""
        return self.versions == self._versions() and (hidden is self.hidden or torch.equal(hidden, self.hidden))

    def _versions(self) -> list[int]:
        return [tensor._version for tensor in self.tensors]


def _is_plain(value: Any) -> bool:
    """Whether it is tensors and numbers, nested in tuples: nothing that a block could write more into, as a cache."""
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, Tensor | bool | int | float | str)


def _set_forward(module: nn.Module, forward: Callable[..., Any] | None) -> None:
    """Let a module run by this, or by its class where that is None."""
    if forward is None:
        del module.forward
    else:
        module.forward = forward  # type: ignore[method-assign]
