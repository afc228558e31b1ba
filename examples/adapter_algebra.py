"""Adapters add, scale and subtract exactly, in their factors: average two of them and save the result for PEFT."""

import tempfile
from pathlib import Path

import torch

from lorica import Adapter, LowRank, load_adapter, save_adapter

generator = torch.Generator().manual_seed(0)


def random_adapter(rank: int) -> Adapter:
    paths = [f"model.layers.{layer}.self_attn.{name}" for layer in range(2) for name in ("q_proj", "v_proj")]
    draws = {
        path: (torch.randn(rank, 64, generator=generator), torch.randn(64, rank, generator=generator)) for path in paths
    }
    return Adapter({path: LowRank(A, B, scale=2.0) for path, (A, B) in draws.items()})


one, other = random_adapter(rank=4), random_adapter(rank=8)
mean = 0.5 * one + 0.5 * other  # exact, of rank 12: nothing is densified, nothing is lost
smaller, errors = mean.compress(rank=8)  # the best of rank 8 there is
print(f"norms: {one.norm():.2f} and {other.norm():.2f}, their mean's {mean.norm():.2f}")
print(f"to rank 8: relative error {max(errors.values()):.3f} in the worst module")
print(f"cosine of the two: {one.inner(other) / (one.norm() * other.norm()):+.3f}")

with tempfile.TemporaryDirectory() as folder:
    save_adapter(smaller, Path(folder) / "mean", task_type="CAUSAL_LM")
    again = load_adapter(Path(folder) / "mean")
    print(f"read back: difference {(again - smaller).norm():.1e}")
