"""The fidelity certificate of a run: exact scores of sampled pairs beside those from features."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor
from tqdm import tqdm

from tracmod.files.durable import write_json
from tracmod.study.context import RunContext
from tracmod.study.run_features import (
    Digests,
    LoadedCheckpoint,
    store_identity,
    view_features,
)
from tracmod.validation.fidelity import (
    Sample,
    Terms,
    certify_table,
    draw_sample,
    exact_sample_scores,
    failure,
    over_checkpoints,
    projected_sample_scores,
    sample_table,
)


def _sample(context: RunContext) -> Sample:
    """Draw the pairs of the certificate, the same at every checkpoint of both models."""
    config = context.config.influence.certify
    return draw_sample(
        context.example_languages("test"),
        len(context.table("train")),
        context.examples_per_checkpoint(),
        context.config.seed,
        config.queries,
        config.train,
    )


def score_sample(context: RunContext, loaded: LoadedCheckpoint, keep_in: Path) -> Tensor:
    """Return the (Q, N) exact scores of the sample at one checkpoint, with all heads.

    Args:
        context: The run.
        loaded: The checkpoint.
        keep_in: The folder where they stay between two attempts.
    """
    sample, collect = _sample(context), context.config.collect
    queries, trains = (
        context.encode(loaded.tokenizer, context.table(split).take(rows), loaded.model)
        for split, rows in (("test", sample.queries), ("train", sample.trains))
    )
    identity = {
        "normalize": context.normalize,
        "sample": asdict(sample),
        **{
            split: store_identity(context, split, None, loaded.digests)
            for split in ("train", "test")
        },
    }
    return exact_sample_scores(
        loaded.model,
        queries,
        trains,
        parameters=collect.parameters,
        head_mask=None,
        normalize=context.normalize,
        dtype=collect.dtype,
        batch_tokens=collect.batch_tokens,
        keep_in=keep_in,
        identity=identity,
        preconditioner=loaded.preconditioner,
        loss=context.loss,
    )


def compare_sample(
    context: RunContext, model_name: str, digests: Sequence[Digests], exact: Sequence[Tensor]
) -> pa.Table:
    """Return exact scores over all checkpoints beside those from the features of view `full`.

    Args:
        context: The run.
        model_name: `full` or `sparse`.
        digests: (C,) digests of the checkpoints.
        exact: (C,) exact scores from `score_sample`.
    """
    sample = _sample(context)
    weights = context.weights(context.checkpoints(model_name))
    queries, trains = (
        view_features(context, model_name, "full", None, split, digests)
        for split in ("test", "train")
    )
    return sample_table(
        model_name,
        sample,
        context.table("test"),
        context.table("train"),
        over_checkpoints(exact, weights),
        projected_sample_scores(sample, queries, trains, weights, context.normalize),
    )


def certify_run(context: RunContext) -> None:
    """Write analysis/fidelity.json and run.json's `fidelity`, from influence/fidelity.parquet."""
    run, config = context.run, context.config
    run.record.pop("fidelity", None)
    if not run.exact_sample.is_file():  # made by an earlier version of tracmod
        return
    terms = Terms(
        config.influence.ks[0],
        len(context.table("train")),
        config.influence.certify.least_spearman,
        config.analyze.bootstrap,
        config.analyze.confidence,
        config.seed,
    )
    certificates = certify_table(pq.read_table(run.exact_sample), terms)
    write_json(run.analysis / "fidelity.json", certificates)
    run.record["fidelity"] = certificates
    for model_name, certificate in certificates.items():
        if warning := failure(certificate, f"the {model_name} model"):
            tqdm.write(f"tracmod: WARNING: {warning}", file=sys.stderr)
