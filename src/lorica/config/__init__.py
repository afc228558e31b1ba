"""One schema for every verb, filled from YAML files, `key=value` words and flags. Imports no torch."""

import lorica.config.mezo as mezo
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
    ModelConfig,
    PrefixConfig,
    TaskConfig,
    TrainConfig,
    ZerothOrderConfig,
)
from lorica.config.verbs import DemoConfig, EvaluateConfig, ExportConfig, PlanConfig, ReplayConfig

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
