"""Feature stores with known rows: created, grown in steps, in parts, and merged."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch

from tracmod.features.store import FeatureStore
from tracmod.files.object_storage import Location

IDENTITY = {
    "projection": {"dim": 5, "kind": "rademacher", "seed": 0},
    "parameters": "encoder",
    "head_mask": None,
    "model": "a" * 64,
    "tokenizer": "b" * 64,
    "data": "c" * 64,
}


DIM = 5


def names(count: int) -> list[str]:
    return [f"zh-é-{row}\n" for row in range(count)]


def rows_of(count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, DIM, generator=generator).to(dtype)


def create(path: Location, count: int = 10, shard_rows: int = 4, **changes: object) -> FeatureStore:
    arguments: dict = {"ids": names(count), "dim": DIM, "identity": IDENTITY} | changes
    return FeatureStore.create(path, shard_rows=shard_rows, **arguments)


def fill(store: FeatureStore) -> None:
    features = rows_of(store.num_rows)
    for shard in store.missing_shards():
        rows = store.shard_range(shard)
        store.write_shard(shard, features[rows.start : rows.stop])


def made(path: Location, count: int = 10, **arguments: object) -> Location:
    with create(path, count, **arguments) as store:
        fill(store)
    return path


GROWN = 23


def grown(path: Location, counts: list[int], **arguments: object) -> FeatureStore:
    """Grow a store of the first of GROWN rows to each of `counts`, and fill it each time."""
    for count in counts:
        shape: dict = {"dim": DIM, "identity": IDENTITY, "shard_rows": 4} | arguments
        store = FeatureStore.grow(path, ids=names(count), data="{}-{}".format, **shape)
        with store:
            for shard in store.missing_shards():
                rows = store.shard_range(shard)
                store.write_shard(shard, rows_of(GROWN)[rows.start : rows.stop])
    return store


def part(path: Location, start: int, stop: int, total: int, **arguments: object) -> Location:
    """Create a store of rows [start, stop) of `total`, for merging."""
    changes: dict = {"ids": names(total)[start:stop], "identity": IDENTITY | {"data": str(start)}}
    with create(path, **changes | arguments) as store:
        for shard in range(store.num_shards):
            rows = store.shard_range(shard)
            store.write_shard(shard, rows_of(total)[start + rows.start : start + rows.stop])
    return path


def parts(folder: Location, total: int = 17, **arguments: object) -> list[Location]:
    cuts = [0, total // 3, total // 2, total]
    return [
        part(folder / f"part-{start}", start, stop, total, **arguments)
        for start, stop in pairwise(cuts)
    ]


def contents(path: Location) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def merge(path: Path) -> None:
    """Merge the stores beside it that `parts` has made."""
    FeatureStore.merge(path, sorted(path.parent.glob("part-*")))
