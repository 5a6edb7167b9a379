"""tracmod: influence of training data by language, and how modular a multilingual model shares it.

Names are loaded when they are first used, so that `import tracmod` alone loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tracmod import kernels
    from tracmod.attribution.query import Attributor
    from tracmod.features.collector import collect_features
    from tracmod.features.projection import Projection
    from tracmod.features.store import FeatureStore
    from tracmod.gradients.ekfac import fit_ekfac
    from tracmod.gradients.preconditioner import Preconditioner, adam_preconditioner
    from tracmod.influence.blocks import block_influence
    from tracmod.influence.exact import exact_influence
    from tracmod.influence.scores import (
        influence_scores,
        self_influence,
        top_influences,
        top_of_scores,
    )
    from tracmod.models.adapters import adapted_model
    from tracmod.models.loss import ExampleLoss
    from tracmod.study.run_metagradient import metagradient
    from tracmod.subnetworks.head_mask import HeadMask
    from tracmod.subnetworks.pruned_model import load_pruned, save_masked, save_pruned
    from tracmod.training.callback import TracInCallback

__version__ = "0.1.0"

__all__ = [
    "Attributor",
    "ExampleLoss",
    "FeatureStore",
    "HeadMask",
    "Preconditioner",
    "Projection",
    "TracInCallback",
    "__version__",
    "adam_preconditioner",
    "adapted_model",
    "block_influence",
    "collect_features",
    "exact_influence",
    "fit_ekfac",
    "influence_scores",
    "kernels",
    "load_pruned",
    "metagradient",
    "save_masked",
    "save_pruned",
    "self_influence",
    "top_influences",
    "top_of_scores",
]

_MODULE_OF = {
    "Attributor": "tracmod.attribution.query",
    "ExampleLoss": "tracmod.models.loss",
    "FeatureStore": "tracmod.features.store",
    "HeadMask": "tracmod.subnetworks.head_mask",
    "Preconditioner": "tracmod.gradients.preconditioner",
    "Projection": "tracmod.features.projection",
    "TracInCallback": "tracmod.training.callback",
    "adam_preconditioner": "tracmod.gradients.preconditioner",
    "adapted_model": "tracmod.models.adapters",
    "block_influence": "tracmod.influence.blocks",
    "collect_features": "tracmod.features.collector",
    "exact_influence": "tracmod.influence.exact",
    "fit_ekfac": "tracmod.gradients.ekfac",
    "influence_scores": "tracmod.influence.scores",
    "load_pruned": "tracmod.subnetworks.pruned_model",
    "metagradient": "tracmod.study.run_metagradient",
    "save_masked": "tracmod.subnetworks.pruned_model",
    "save_pruned": "tracmod.subnetworks.pruned_model",
    "self_influence": "tracmod.influence.scores",
    "top_influences": "tracmod.influence.scores",
    "top_of_scores": "tracmod.influence.scores",
}


def __getattr__(name: str) -> Any:
    if name == "kernels":
        return import_module("tracmod.kernels")
    if name in _MODULE_OF:
        return getattr(import_module(_MODULE_OF[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
