"""Merge feature stores: check that they belong together, and copy their rows shard by shard."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tracmod.features.shards import Shards
from tracmod.features.store_format import Manifest
from tracmod.files.durable import identity_differences
from tracmod.files.object_storage import Location


@dataclass(frozen=True)
class Source:
    """One of the stores that are merged."""

    ids: Sequence[str]
    manifest: Manifest
    shards: Shards

    @property
    def made_with(self) -> dict[str, Any]:
        """The identity, which must be the same in all parts except for `data`."""
        manifest = self.manifest
        return {"dim": manifest.dim, "dtype": manifest.content["dtype"], **manifest.identity}


def check_mergeable(sources: Sequence[Source]) -> None:
    """Check that stores agree in all but their data, share no id and have all of their shards.

    A damaged shard is found when it is copied.

    Raises:
        ValueError: They cannot be merged.
    """
    if not sources:
        raise ValueError("stores to merge: expected at least one, got none")
    first = sources[0]
    path_of: dict[str, Location] = {}
    for source in sources:
        path = source.shards.path
        differing = identity_differences(first.made_with, source.made_with, ignore=["data"])
        if differing:
            raise ValueError(f"{path} differs from {first.shards.path}: {'; '.join(differing)}")
        for name in source.ids:
            if name in path_of:
                raise ValueError(f"{path_of[name]} and {path} both contain example {name!r}")
            path_of[name] = path
        for shard in range(len(source.shards)):
            if not source.shards.file(shard).is_file():
                raise ValueError(f"{source.shards.file(shard)} is missing: merge complete stores")


def copy_shards(
    sources: Sequence[Source],
    target: Shards,
    missing: Sequence[int],
    advance: Callable[[int], Any],
) -> None:
    """Write the missing shards of the merged store, holding one of them in memory at a time.

    Stored tensors are copied as they are, so no row is rounded again.

    Args:
        sources: The stores, in the order of their rows in the merged store.
        target: The shards of the merged store.
        missing: The numbers of the shards to write.
        advance: Called with the number of rows that are there already, then with those of every
            shard.
    """
    num_rows = sum(len(rows) for rows in target.ranges)
    advance(num_rows - sum(len(target.ranges[shard]) for shard in missing))
    for shard in missing:
        rows = target.ranges[shard]
        target.write(shard, {name: _rows(sources, name, rows) for name in target.tensor_names})
        advance(len(rows))


def _rows(sources: Sequence[Source], name: str, rows: range) -> Tensor:
    """Return rows of a stored tensor, counted through all sources."""
    parts, start = [], 0
    for source in sources:
        num_rows = source.manifest.num_rows
        first, last = max(rows.start - start, 0), min(rows.stop - start, num_rows)
        if first < last:
            parts.append(source.shards.rows(name, first, last))
        start += num_rows
    return torch.cat(parts)
