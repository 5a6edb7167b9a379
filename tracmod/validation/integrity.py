"""Whether what is on disk is what was written: `tracmod verify`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from tracmod.durable import CHECKSUMS, file_sha256
from tracmod.store import verify_store


def verify(path: Path) -> list[str]:
    """Every problem of a run folder, a folder of `tracmod attribute` or a feature store.

    Feature stores carry a checksum per file; everything else that a finished stage wrote is
    compared with checksums.json.

    Returns:
        One sentence per problem, none where all is sound.

    Raises:
        ValueError: nothing of ours at `path`.
    """
    if (path / "manifest.json").is_file():
        return verify_store(path)
    if not (path / "run.json").is_file():
        raise ValueError(f"{path}: expected a run folder or a feature store, found neither")
    problems = list(_checksum_problems(path))
    stores = sorted(manifest.parent for manifest in path.glob("features/**/manifest.json"))
    for store in tqdm(stores, desc="verify", unit="store", disable=None):
        problems += verify_store(store)
    return problems


def _checksum_problems(path: Path) -> Iterator[str]:
    if not (path / CHECKSUMS).is_file():
        yield f"{path / CHECKSUMS} is missing: no stage has been finished, or it was removed"
        return
    try:
        sums = json.loads((path / CHECKSUMS).read_text(encoding="utf-8"))
    except ValueError as error:
        yield f"{path / CHECKSUMS} is damaged: {error}"
        return
    for name, expected in tqdm(sums.items(), desc="verify", unit="file", disable=None):
        file = path / name
        if not file.is_file():
            yield f"{file} is missing"
        elif file_sha256(file) != expected:
            yield f"{file} is damaged: its checksum is not the one recorded when it was written"
