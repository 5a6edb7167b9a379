"""Whether what is on disk is what was written: `tracmod verify`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from tracmod.features.store import StorePath, verify_store
from tracmod.files.durable import CHECKSUMS, read_checksums, read_json, unseal
from tracmod.files.object_storage import Location, entries, file_sha256, file_size, location


def verify(place: StorePath) -> list[str]:
    """Every problem of a run folder, a folder of `tracmod attribute` or a feature store.

    What a finished stage wrote is compared with checksums.json; the shards of feature stores and
    the files of an index with the checksums that they carry.

    Args:
        place: the folder; of a feature store also its URL.

    Returns:
        One sentence per problem, none where all is sound.

    Raises:
        ValueError: nothing of ours there; run.json is not JSON.
    """
    path = location(place)
    if (path / "manifest.json").is_file():
        return _store_problems([path])
    if not isinstance(path, Path) or not (path / "run.json").is_file():
        raise ValueError(f"{path}: expected a run folder or a feature store, found neither")
    features = _features_path(path)
    problems = list(_checksum_problems(path, features)) + list(_index_problems(path))
    stores = [manifest.parent for manifest in features.rglob("manifest.json")]
    return problems + _store_problems(sorted(stores, key=str))


def _features_path(path: Path) -> Location:
    """features/, or where the run's `collect.features` has them."""
    found = read_json(path / "run.json")
    for key in ("config", "collect", "features"):
        found = found.get(key) if isinstance(found, dict) else None
    return path / "features" if found is None else location(found)


def _store_problems(stores: Sequence[Location]) -> list[str]:
    files = [file for store in stores for file in entries(store)]
    sizes = [file_size(file) for file in files if file.name.startswith("shard-")]
    with tqdm(total=sum(sizes), desc="verify", unit="B", unit_scale=True, disable=None) as bar:
        return [problem for store in stores for problem in verify_store(store, bar.update)]


def _checksum_problems(path: Path, features: Location) -> Iterator[str]:
    if not (path / CHECKSUMS).is_file():
        yield f"{path / CHECKSUMS} is missing: no stage has been finished, or it was removed"
        return
    try:
        sums = read_checksums(path)
    except ValueError as error:
        yield str(error)
        return
    for name, expected in tqdm(sums.items(), desc="verify", unit="file", disable=None):
        of_features = name.removeprefix("features/")
        file = path / name if of_features == name else features / of_features
        if not file.is_file():
            yield f"{file} is missing"
        elif file_sha256(file) != expected and not _has_grown(file):
            yield f"{file} is damaged: its checksum is not the one recorded when it was written"


def _has_grown(file: Location) -> bool:
    """Whether it is the manifest of a store with appended rows; its own checksum is in it."""
    return file.name == "manifest.json" and b'"appended": [' in file.read_bytes()


def _index_problems(path: Path) -> Iterator[str]:
    """What is wrong with the files of `tracmod index`; needs no FAISS."""
    folders = {file.parent for file in path.glob("index/**/index.*")}
    for folder in tqdm(sorted(folders), desc="verify", unit="index", disable=None):
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
            yield f"{index} is damaged, or not of this {meta.name}: build the index again"
