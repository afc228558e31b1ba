"""Merge two adapters exactly, compress the merge, and see what TIES makes of them: python examples/merge_adapters.py"""

from __future__ import annotations

import torch

from lorica import Adapter, LowRank, compress, load_method, prepare_merge


def random_adapter(seed: int) -> Adapter:
    """Two modules of rank 4; a real one comes from load_adapter(Path(...))."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"layers.0.q": (64, 48), "layers.0.v": (64, 48)}
    return Adapter(
        {
            path: LowRank(torch.randn(4, width, generator=generator), torch.randn(out, 4, generator=generator), 0.5)
            for path, (out, width) in shapes.items()
        }
    )


def main() -> None:
    adapters = {"first": random_adapter(1), "second": random_adapter(2)}
    mean = prepare_merge(adapters, load_method("uniform_delta", {}, num_adapters=2))
    for merged in mean.modules():
        smaller, error = compress(merged.update, rank=4)
        print(f"{merged.path}: exact at rank {merged.update.rank}; at rank {smaller.rank} {error:.1%} is lost")
    ties = prepare_merge(adapters, load_method("ties", {"k": 20}, num_adapters=2))
    for merged in ties.modules():
        print(f"{merged.path}: ties keeps {merged.update.count_nonzero().item() / merged.update.numel():.1%} of ΔW")


if __name__ == "__main__":
    main()
