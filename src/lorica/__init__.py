"""lorica: the whole life of a LoRA adapter, from training to merging.

The names below are the public ones; they are imported when they are first asked for, so that `import lorica` is quick.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Adapter": "lorica.adapters.adapter:Adapter",
    "BoostingCallback": "lorica.training.hf_callback:BoostingCallback",
    "LowRank": "lorica.adapters.delta:LowRank",
    "attach_merge": "lorica.merging.live:attach",
    "compress": "lorica.adapters.compression:compress",
    "create_adapter": "lorica.adapters.injection:create",
    "extract": "lorica.adapters.injection:extract",
    "fit": "lorica.training.fit:fit",
    "fuse": "lorica.adapters.injection:fuse",
    "inject": "lorica.adapters.injection:inject",
    "load_adapter": "lorica.adapters.peft_format:read",
    "load_base": "lorica.models:load",
    "load_method": "lorica.merging.method:load",
    "load_task": "lorica.tasks.sources:load_task",
    "prepare_merge": "lorica.merging.merge:prepare",
    "remove": "lorica.adapters.injection:remove",
    "save_adapter": "lorica.adapters.peft_format:write",
    "target_modules": "lorica.models:target_modules",
    "unfuse": "lorica.adapters.injection:unfuse",
}

__all__ = [*sorted(_HOMES), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lorica' has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
