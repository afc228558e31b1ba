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
from lorica.config.reading import check, documented, dump, keys, read, read_yaml, set_key, targets_apart
from lorica.config.schema import (
    AdapterConfig,
    BoostingConfig,
    ModelConfig,
    PrefixConfig,
    TaskConfig,
    TrainConfig,
    ZerothOrderConfig,
)
from lorica.config.studies import LEARNING_RATE_SEARCH, AblateConfig, ArmConfig, CompareConfig, StudyConfig
from lorica.config.verbs import (
    DemoConfig,
    EvaluateConfig,
    ExportConfig,
    InspectConfig,
    PlanConfig,
    ReplayConfig,
    ReportConfig,
    VerifyConfig,
)

__all__ = [
    "FLAGS",
    "LEARNING_RATE_SEARCH",
    "AblateConfig",
    "AdapterConfig",
    "ArmConfig",
    "BoostingConfig",
    "CompareConfig",
    "DemoConfig",
    "EvalSubsetConfig",
    "EvaluateConfig",
    "ExportConfig",
    "Flag",
    "InspectConfig",
    "LambdaPolicyConfig",
    "MergeConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PlanConfig",
    "PrefixConfig",
    "ReplayConfig",
    "ReportConfig",
    "SearchConfig",
    "StudyConfig",
    "SweepConfig",
    "TaskConfig",
    "TrainConfig",
    "TransformConfig",
    "VerifyConfig",
    "ZerothOrderConfig",
    "check",
    "documented",
    "dump",
    "keys",
    "mezo",
    "read",
    "read_yaml",
    "set_key",
    "targets_apart",
]
