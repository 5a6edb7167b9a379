"""Influence by head and layer, from mean gradients and without projection."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from tracmod.files import progress
from tracmod.files.durable import canonical_json, sha256, write_parquet
from tracmod.influence.blocks import block_influence, weighted_sum
from tracmod.models.checkpoints import Checkpoint
from tracmod.study.context import RunContext
from tracmod.study.run_features import Digests, store_identity
from tracmod.subnetworks.head_mask import HeadMask

BLOCK_VIEWS = ("full", "subnetwork")


class _Pass(NamedTuple):
    """One mask of a view, and the language whose test examples it is for (None: all)."""

    language: str | None
    mask: HeadMask | None


def influence_by_block(
    context: RunContext, model_name: str, digests: Sequence[Digests]
) -> set[Path]:
    """Write blocks.parquet of the views full and subnetwork; return the files it is the sum of."""
    checkpoints, used_files = context.checkpoints(model_name), set[Path]()
    tables: dict[str, list[pa.Table]] = {}
    for checkpoint, its_digests in zip(checkpoints, digests, strict=True):
        for view in context.views_at(model_name, checkpoint.epoch):
            if view.name not in BLOCK_VIEWS:
                continue
            passes = [_Pass(language, mask) for language, mask in view.masks]
            files = {_file(context, one, its_digests): one for one in passes}
            _compute_missing(context, checkpoint, files)
            table = pa.concat_tables(map(pq.read_table, files))
            tables.setdefault(view.name, []).append(table)
            used_files |= files.keys()
    weights = context.weights(checkpoints) or [1.0] * len(checkpoints)
    for view_name, of_checkpoints in tables.items():
        path = context.run.influence(model_name, view_name) / "blocks.parquet"
        write_parquet(path, weighted_sum(of_checkpoints, weights))
    return used_files


def _file(context: RunContext, one: _Pass, digests: Digests) -> Path:
    """Return where influence by block at one checkpoint, under one mask, is kept.

    The name is a digest of all that the content depends on. So a stage that is done again finds
    what is still right, and never takes anything else for it.
    """
    identity = {
        "language": one.language,
        "normalize": context.config.influence.normalize,
        **{split: store_identity(context, split, one.mask, digests) for split in ("train", "test")},
    }
    name = sha256(canonical_json(identity))
    return context.run.blocks / f"{name[:32]}.parquet"


def _compute_missing(context: RunContext, checkpoint: Checkpoint, files: dict[Path, _Pass]) -> None:
    """Compute influence by block at one checkpoint, for each pass that has no file yet."""
    missing = {file: one for file, one in files.items() if not file.is_file()}
    if not missing:
        return
    model, tokenizer = context.load(checkpoint)
    encoded = {
        split: context.encode(tokenizer, context.table(split), model) for split in ("train", "test")
    }
    total = sum(
        len(context.rows(split, one.language)) for one in missing.values() for split in encoded
    )
    collect = context.config.collect
    with progress.bar(f"blocks of epoch {checkpoint.epoch}", total) as bar:
        for file, one in missing.items():
            train, test = (
                _by_language(context, split, encoded[split], one.language) for split in encoded
            )
            table = block_influence(
                model,
                train,
                test,
                collect.parameters,
                one.mask,
                context.normalize,
                dtype=getattr(torch, collect.dtype),
                advance=bar.update,
                loss=context.loss,
            )
            write_parquet(file, table)


def _by_language(
    context: RunContext, split: str, examples: Sequence[dict[str, Any]], language: str | None
) -> dict[str, list[dict[str, Any]]]:
    """Group the examples of a split that a mask is applied to by their own language."""
    languages = context.example_languages(split)
    grouped: dict[str, list[dict[str, Any]]] = {}
    for row in context.rows(split, language):
        grouped.setdefault(languages[row], []).append(examples[row])
    return grouped
