"""The stage `sparse-finetune`: fine-tune again, each language through its subnetwork.

The training begins with the same weights as `finetune`. Each batch is in one language and updates
only that language's subnetwork. The model is in models/sparse/.
"""

from __future__ import annotations

from tracmod.study.context import RunContext
from tracmod.study.forecast import Estimate, Forecast
from tracmod.study.stages.finetune import estimate_training, fine_tune_model


def run(context: RunContext) -> None:
    """Fine-tune each language through its subnetwork."""
    fine_tune_model(context, "sparse", context.config.sparse, context.subnetworks)


def estimate(forecast: Forecast) -> Estimate:
    """Count the steps."""
    return estimate_training(forecast, forecast.config.sparse, by_language=True)
