"""Where a feature store lies: a folder on disk or, by URL, objects on S3, GCS, ... through fsspec.

On disk a place is a `pathlib.Path`. On object storage it is an `ObjectPath`, which has of a path
what a feature store asks for; a put is whole or absent, as a renamed file is. Credentials,
endpoints and other options of a driver are fsspec's own: its configuration files and FSSPEC_*
variables, or what the driver reads by itself (AWS_* of s3fs).
"""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from tracmod.files import durable


@dataclass(frozen=True)
class ObjectPath:
    """An object, or the objects whose names begin with it and a slash; methods as of `Path`.

    What does not work, but for an object that is not there, is an OSError that names the URL.

    Attributes:
        url: as it was given, without a slash at its end.
        fs: the driver.
        key: what the driver calls it.
    """

    url: str
    fs: Any
    key: str

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> ObjectPath:
        return ObjectPath(f"{self.url}/{name}", self.fs, f"{self.key}/{name}")

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> ObjectPath:
        return ObjectPath(self.url.rpartition("/")[0], self.fs, self.key.rpartition("/")[0])

    def exists(self) -> bool:
        return self._type() is not None

    def is_file(self) -> bool:
        return self._type() == "file"

    def size(self) -> int:
        with self._named("read"):
            return int(self.fs.info(self.key)["size"])

    def read_bytes(self) -> bytes:
        with self._named("read"):
            data: bytes = self.fs.cat_file(self.key)
            return data

    def write_bytes(self, data: bytes) -> None:
        with self._named("write"):
            self.fs.pipe_file(self.key, data)

    def unlink(self) -> None:
        with self._named("remove"):
            self.fs.rm_file(self.key)

    def iterdir(self) -> Iterator[ObjectPath]:
        """What lies directly below; nothing where there is nothing."""
        for path, _ in self._entries():
            yield path

    def rglob(self, name: str) -> Iterator[ObjectPath]:
        """The objects of this name at any depth."""
        for path, kind in self._entries():
            if kind == "directory":
                yield from path.rglob(name)
            elif path.name == name:
                yield path

    # Not fs.exists, fs.find and the like: they take an error for an object that is not there.

    def _type(self) -> str | None:
        try:
            with self._named("read"):
                return str(self.fs.info(self.key)["type"])
        except FileNotFoundError:
            return None

    def _entries(self) -> list[tuple[ObjectPath, str]]:
        try:
            with self._named("list"):
                found = self.fs.ls(self.key, detail=True)
        except FileNotFoundError:
            return []
        entries = [(entry["name"].rstrip("/"), entry["type"]) for entry in found]
        own = self.key.strip("/")  # some stores keep an object for the folder itself
        return [
            (self / key.rpartition("/")[2], kind) for key, kind in entries if key.strip("/") != own
        ]

    @contextmanager
    def _named(self, does: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # drivers let through what their client library raises
            if isinstance(error, FileNotFoundError) and does != "write":
                raise FileNotFoundError(f"{self.url} is missing") from error
            raise OSError(
                f"cannot {does} {self.url}: {str(error) or type(error).__name__}; what was written "
                "before is kept: when the storage can be reached, start the same command again"
            ) from error


Location = Path | ObjectPath


def location(path: str | os.PathLike[str] | ObjectPath) -> Location:
    """The place of a path, or of a URL: `s3://bucket/x`; `file:///x` is the path /x.

    Raises:
        ValueError: no such protocol, or its driver is not installed (fsspec says which package).
    """
    if isinstance(path, ObjectPath):
        return path
    text = os.fspath(path)
    if "://" not in text:
        if re.match(r"[a-z0-9]{2,}:/", text):
            raise ValueError(f"{text}: expected a path, or a URL as text: a Path loses a slash")
        return Path(text)
    try:
        # Listings are not cached: other processes write too.
        fs, key = fsspec.url_to_fs(text, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{text}: {error}") from error
    key = key.rstrip("/")
    return Path(key) if isinstance(fs, LocalFileSystem) else ObjectPath(text.rstrip("/"), fs, key)


def write_file(file: Location, data: bytes, writer: str = "") -> None:
    """`durable.write_file`, or a put: whole or not at all, and safe when this returns."""
    if isinstance(file, Path):
        durable.write_file(file, data, writer)
    else:
        file.write_bytes(data)


def link_file(source: Location, target: Location) -> None:
    """`durable.link_file` on disk; else a copy."""
    if isinstance(source, Path) and isinstance(target, Path):
        durable.link_file(source, target)
    else:
        write_file(target, source.read_bytes())


def entries(folder: Location) -> list[Location]:
    """What lies directly in a folder, by name."""
    return sorted(folder.iterdir(), key=lambda one: one.name)


def file_size(file: Location) -> int:
    """Bytes."""
    return file.stat().st_size if isinstance(file, Path) else file.size()


def file_sha256(file: Location) -> str:
    """SHA-256 of a file, 64 hexadecimal digits."""
    return (
        durable.file_sha256(file) if isinstance(file, Path) else durable.sha256(file.read_bytes())
    )


@contextmanager
def opened(file: Location) -> Iterator[bytes | mmap.mmap]:
    """All bytes of a file: mapped from disk, or fetched."""
    if isinstance(file, ObjectPath):
        yield file.read_bytes()
    elif file.stat().st_size == 0:  # which cannot be mapped
        yield b""
    else:
        with (
            open(file, "rb") as data,
            mmap.mmap(data.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        ):
            yield mapped
