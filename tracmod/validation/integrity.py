"""Checks that the files of a run or store are complete and unchanged (`tracmod verify`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from tracmod.features.store import StorePath, verify_store
from tracmod.files import progress
from tracmod.files.durable import CHECKSUMS, read_checksums, read_json, unseal
from tracmod.files.object_storage import Location, entries, file_sha256, file_size, location


def verify(folder: StorePath) -> list[str]:
    """Check a run folder, a folder of `tracmod attribute` or a feature store.

    The files of finished stages are compared with checksums.json, the shards of feature stores and
    the files of an index with the checksums that they contain.

    Args:
        folder: path of the folder; for a feature store also a URL.

    Returns:
        One sentence per problem; an empty list if there is none.

    Raises:
        ValueError: the folder is none of these, or run.json is not valid JSON.
    """
    path = location(folder)
    if (path / "manifest.json").is_file():
        return _store_problems([path])
    if not isinstance(path, Path) or not (path / "run.json").is_file():
        raise ValueError(f"{path}: expected a run folder or a feature store, got neither")
    features = _features_path(path)
    problems = list(_checksum_problems(path, features)) + list(_index_problems(path))
    stores = [manifest.parent for manifest in features.rglob("manifest.json")]
    return problems + _store_problems(sorted(stores, key=str))


def _features_path(path: Path) -> Location:
    """Return the folder of the feature stores: `collect.features` of the run, or features/."""
    value = read_json(path / "run.json")
    for key in ("config", "collect", "features"):
        value = value.get(key) if isinstance(value, dict) else None
    return path / "features" if value is None else location(value)


def _store_problems(stores: Sequence[Location]) -> list[str]:
    """Return the problems of feature stores."""
    files = [file for store in stores for file in entries(store)]
    sizes = [file_size(file) for file in files if file.name.startswith("shard-")]
    with progress.bar("verify", sum(sizes), "B") as bar:
        return [problem for store in stores for problem in verify_store(store, bar.update)]


def _checksum_problems(path: Path, features: Location) -> Iterator[str]:
    """Yield the files that are missing or differ from checksums.json."""
    if not (path / CHECKSUMS).is_file():
        yield f"{path / CHECKSUMS} is missing: no stage has been finished, or it was removed"
        return
    try:
        sums = read_checksums(path)
    except ValueError as error:
        yield str(error)
        return
    for name, expected in progress.each(list(sums.items()), "verify", "file"):
        in_features = name.removeprefix("features/")
        file = path / name if in_features == name else features / in_features
        if not file.is_file():
            yield f"{file} is missing"
        elif file_sha256(file) != expected and not _has_grown(file):
            yield f"{file} is damaged: its checksum is not the one recorded when it was written"


def _has_grown(file: Location) -> bool:
    """Return whether this is the manifest of a store with rows that were appended later.

    Such a manifest is replaced after the stage that created it; it contains its own checksum.
    """
    return file.name == "manifest.json" and b'"appended": [' in file.read_bytes()


def _index_problems(path: Path) -> Iterator[str]:
    """Yield the problems of the files of `tracmod index`; FAISS is not needed."""
    folders = {file.parent for file in path.glob("index/**/index.*")}
    for folder in progress.each(sorted(folders), "verify", "index"):
        meta, index = folder / "index.json", folder / "index.faiss"
        missing = [file for file in (meta, index) if not file.is_file()]
        if missing:
            yield f"{missing[0]} is missing: build the index again"
            continue
        try:
            expected = unseal(meta, meta.read_bytes()).get("index_sha256")
        except ValueError as error:
            yield str(error)
            continue
        if file_sha256(index) != expected:
            yield f"{index} is damaged or does not belong to {meta.name}: build the index again"
