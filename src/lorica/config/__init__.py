"""One schema for every verb, filled from YAML files, `key=value` words and flags. Imports no torch."""

from lorica.config import mezo
from lorica.config.flags import FLAGS, Flag
from lorica.config.merging import (
    EvalSubsetConfig,
    LambdaPolicyConfig,
    MergeConfig,
    OptimizerConfig,
    SearchConfig,
    SweepConfig,
    TransformConfig,
)
from lorica.config.reading import check, documented, dump, keys, read, read_yaml
from lorica.config.schema import (
    AdapterConfig,
    BoostingConfig,
    DemoConfig,
    EvaluateConfig,
    ExportConfig,
    ModelConfig,
    PlanConfig,
    PrefixConfig,
    ReplayConfig,
    TaskConfig,
    TrainConfig,
    ZerothOrderConfig,
)

__all__ = [
    "FLAGS",
    "AdapterConfig",
    "BoostingConfig",
    "DemoConfig",
    "EvalSubsetConfig",
    "EvaluateConfig",
    "ExportConfig",
    "Flag",
    "LambdaPolicyConfig",
    "MergeConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PlanConfig",
    "PrefixConfig",
    "ReplayConfig",
    "SearchConfig",
    "SweepConfig",
    "TaskConfig",
    "TrainConfig",
    "TransformConfig",
    "ZerothOrderConfig",
    "check",
    "documented",
    "dump",
    "keys",
    "mezo",
    "read",
    "read_yaml",
]
