"""tracmod: influence of training data by language, and how modular a multilingual model shares it.

Names are loaded when they are first used, so that `import tracmod` alone loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tracmod import kernels
    from tracmod.blocks import block_influence
    from tracmod.ekfac import fit_ekfac
    from tracmod.features import Projection, collect_features
    from tracmod.heads import HeadMask
    from tracmod.influence import (
        exact_influence,
        influence_scores,
        self_influence,
        top_influences,
    )
    from tracmod.preconditioner import Preconditioner, adam_preconditioner
    from tracmod.pruned import load_pruned, save_masked, save_pruned
    from tracmod.query import Attributor
    from tracmod.store import FeatureStore
    from tracmod.trainer_callback import TracInCallback

__version__ = "0.1.0"

__all__ = [
    "Attributor",
    "FeatureStore",
    "HeadMask",
    "Preconditioner",
    "Projection",
    "TracInCallback",
    "__version__",
    "adam_preconditioner",
    "block_influence",
    "collect_features",
    "exact_influence",
    "fit_ekfac",
    "influence_scores",
    "kernels",
    "load_pruned",
    "save_masked",
    "save_pruned",
    "self_influence",
    "top_influences",
]

_MODULE_OF = {
    "Attributor": "tracmod.query",
    "FeatureStore": "tracmod.store",
    "HeadMask": "tracmod.heads",
    "Preconditioner": "tracmod.preconditioner",
    "Projection": "tracmod.features",
    "TracInCallback": "tracmod.trainer_callback",
    "adam_preconditioner": "tracmod.preconditioner",
    "block_influence": "tracmod.blocks",
    "collect_features": "tracmod.features",
    "exact_influence": "tracmod.influence",
    "fit_ekfac": "tracmod.ekfac",
    "influence_scores": "tracmod.influence",
    "load_pruned": "tracmod.pruned",
    "save_masked": "tracmod.pruned",
    "save_pruned": "tracmod.pruned",
    "self_influence": "tracmod.influence",
    "top_influences": "tracmod.influence",
}


def __getattr__(name: str) -> Any:
    if name == "kernels":
        return import_module("tracmod.kernels")
    if name in _MODULE_OF:
        return getattr(import_module(_MODULE_OF[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
