"""What a training run takes: how much of the model it trains, and how much memory at once."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Any

import torch

from lorica.results import RunFolder
from lorica.runs.training.tuning import Outcome, RunUnderWay

CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
FORGET_PEAK = "5"


def efficiency(learning: RunUnderWay, num_parameters: int, run: RunFolder, outcome: Outcome) -> dict[str, Any]:
    """Of a run that has come to its end: what it trained at once, what that left on disk, and its forward passes."""
    num_trainable = learning.tuning.num_trainable()
    weights = run.outcome(outcome.place).glob("*.safetensors")
    return {
        "num_trainable": num_trainable,
        "num_parameters": num_parameters,
        "trainable_share": num_trainable / num_parameters,
        "adapter_bytes": sum(path.stat().st_size for path in weights),
        "forwards": learning.progress.forwards,
    }


def forget_peak(device: str) -> None:
    """Let `peak_bytes` be that of what comes now, where the system can forget what was before."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif CLEAR_REFS.exists():
        try:
            CLEAR_REFS.write_text(FORGET_PEAK)
        except OSError:  # a sandbox that forbids it: then the peak is that of the process's whole life
            return


def peak_bytes(device: str) -> int:
    """The most memory held at once: of the device's own, or, on a CPU, resident in this process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if STATUS.exists():
        lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines() if ":" in line)
        if "VmHWM" in lines:
            return int(lines["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
