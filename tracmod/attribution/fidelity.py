"""How far the features of an attribution can be trusted: certificate, and choice of dimension."""

from __future__ import annotations

import sys
from dataclasses import asdict
from functools import partial
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor
from tqdm import tqdm

from tracmod.attribution.context import AttributionContext
from tracmod.choices import selection_record
from tracmod.features.collector import collect_features
from tracmod.features.projection import VERSION
from tracmod.files.durable import identity_differences, read_json, write_json
from tracmod.influence.scores import influence_scores
from tracmod.models.checkpoints import Checkpoint
from tracmod.validation.fidelity import (
    CHOICE_QUERIES,
    CHOICE_TRAINS,
    Sample,
    Terms,
    certify,
    choose_dim,
    describe_choice,
    draw_sample,
    exact_sample_scores,
    failure,
    over_checkpoints,
    projected_sample_scores,
)


def certify_features(context: AttributionContext) -> dict[str, Any]:
    """Compare the scores of stored features with exact ones on a sample; write fidelity.json.

    Returns:
        The certificate.
    """
    sample = certificate_sample(context)
    projected_QN = projected_sample_scores(
        sample,
        context.stores_of("query"),
        context.stores_of("train"),
        context.weights,
        context.options.normalize,
    )
    exact_QN = _exact_scores(context, sample)
    certificate = _certificate(context, sample, exact_QN, projected_QN)
    write_json(context.options.out / "fidelity.json", certificate)
    if warning := failure(certificate, "these features"):
        tqdm.write(f"tracmod: WARNING: {warning}", file=sys.stderr)
    return certificate


def choose_projection_dim(context: AttributionContext) -> dict[str, Any]:
    """Choose as few numbers per row as a sample allows; the choice stays in projection.json.

    Args:
        context: The attribution, whose `projection_dim` is set.

    Returns:
        The choice (see `choose_dim`).

    Raises:
        ValueError: The choice that is there was made with other settings.
    """
    file = context.options.out / "projection.json"
    choice: dict[str, Any] | None = read_json(file) if file.is_file() else None
    settings = _choice_settings(context)
    if choice is None:
        sample = _sample(context, None, CHOICE_QUERIES, CHOICE_TRAINS)
        exact_QN = _exact_scores(context, sample)
        choice = choose_dim(
            partial(_projected_scores, context, sample),
            partial(_certificate, context, sample, exact_QN),
            context.options.share_error,
        )
        choice |= {"chosen_for": settings}
        write_json(file, choice)
    differences = identity_differences(settings, choice.get("chosen_for", {}))
    if differences:
        raise ValueError(
            f"{file}: this projection was chosen for something else: {'; '.join(differences)}; "
            f"take another folder or remove this one"
        )
    context.projection_dim = choice["projection_dim"]
    tqdm.write(f"tracmod: {describe_choice(choice)}", file=sys.stderr)
    return choice


def _choice_settings(context: AttributionContext) -> dict[str, Any]:
    """Return the settings that a chosen dimension depends on.

    The data is not among them, because rows may be appended later.
    """
    options = context.options
    return {
        "share_error": options.share_error,
        "projection_version": VERSION,
        "parameters": selection_record(options.parameters),
        "head_mask": None if context.mask is None else context.mask.digest(),
        "normalize": options.normalize,
        "weights": context.weights,
        **({} if context.loss.identity is None else {"loss": context.loss.identity}),
        "checkpoints": [context.digests(checkpoint) for checkpoint in context.checkpoints],
    }


def certificate_sample(context: AttributionContext) -> Sample:
    """Draw the pairs of examples that the certificate compares, the same at every call."""
    return _sample(context, sum(len(table) for table in context.tables.values()))


def _sample(context: AttributionContext, passes: int | None, *most: int) -> Sample:
    num_train = len(context.tables["train"])
    return draw_sample(
        context.example_languages("query"), num_train, passes, context.options.seed, *most
    )


def _encoded(
    context: AttributionContext, sample: Sample
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the encoded queries and training examples of a sample."""
    queries, trains = (
        context.encode(context.tables[split].take(pa.array(rows, pa.int64())))
        for split, rows in (("query", sample.queries), ("train", sample.trains))
    )
    return queries, trains


def sample_scores(context: AttributionContext, sample: Sample, checkpoint: Checkpoint) -> Tensor:
    """Return (Q, N) exact scores of a sample at a checkpoint, which stay in progress/."""
    options = context.options
    model = context.loaded(checkpoint)
    with context.naming_examples({"query": sample.queries, "train": sample.trains}):
        return exact_sample_scores(
            model,
            *_encoded(context, sample),
            parameters=options.parameters,
            head_mask=context.mask,
            normalize=options.normalize,
            dtype=options.dtype,
            batch_tokens=options.batch_tokens,
            keep_in=context.progress,
            identity=context.exact_identity(checkpoint) | {"sample": asdict(sample)},
            preconditioner=context.preconditioner(checkpoint, model),
            include_frozen=options.include_frozen,
            loss=context.loss,
        )


def _exact_scores(context: AttributionContext, sample: Sample) -> Tensor:
    """Return (Q, N) exact scores of a sample over all checkpoints."""
    scores = [sample_scores(context, sample, checkpoint) for checkpoint in context.checkpoints]
    return over_checkpoints(scores, context.weights)


def _projected_scores(context: AttributionContext, sample: Sample, dim: int) -> Tensor:
    """Return (Q, N) scores of a sample over all checkpoints, from features of `dim` numbers."""
    options, scores = context.options, []
    for checkpoint in context.checkpoints:
        model = context.loaded(checkpoint)
        preconditioner = context.preconditioner(checkpoint, model)
        queries, trains = (
            collect_features(
                model,
                examples,
                context.recipe(dim).projection,
                options.parameters,
                context.mask,
                options.batch_tokens,
                dtype=getattr(torch, options.dtype),
                preconditioner=preconditioner,
                include_frozen=options.include_frozen,
                loss=loss,
            )
            for examples, loss in zip(
                _encoded(context, sample), (context.loss.measured, context.loss), strict=True
            )
        )
        scores.append(influence_scores(queries, trains, None, options.normalize).cpu())
    return over_checkpoints(scores, context.weights)


def _certificate(
    context: AttributionContext, sample: Sample, exact_QN: Tensor, projected_QN: Tensor
) -> dict[str, Any]:
    query_languages, train_languages = (
        context.tables[split].column("language").take(rows).to_pylist()
        for split, rows in (("query", sample.queries), ("train", sample.trains))
    )
    terms = Terms(context.options.k, len(context.tables["train"]), seed=context.options.seed)
    return certify(exact_QN, projected_QN, query_languages, train_languages, terms)
