"""The configuration of a run: one model per section, read from YAML, overridden by key=value."""

from tracmod.config.reading import load_config, override_config, parse_bytes, parse_config
from tracmod.config.run import (
    AnalyzeConfig,
    CertifyConfig,
    CollectConfig,
    FinetuneConfig,
    InfluenceConfig,
    MetagradientConfig,
    ModelConfig,
    PruneConfig,
    RetrainConfig,
    RunConfig,
    SparseFinetuneConfig,
    ViewsConfig,
)
from tracmod.config.task import TaskConfig

__all__ = [
    "AnalyzeConfig",
    "CertifyConfig",
    "CollectConfig",
    "FinetuneConfig",
    "InfluenceConfig",
    "MetagradientConfig",
    "ModelConfig",
    "PruneConfig",
    "RetrainConfig",
    "RunConfig",
    "SparseFinetuneConfig",
    "TaskConfig",
    "ViewsConfig",
    "load_config",
    "override_config",
    "parse_bytes",
    "parse_config",
]
