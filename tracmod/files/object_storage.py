"""Locations of feature stores: folders on disk, or URLs of object storage through fsspec.

A location on disk is a `pathlib.Path`, one on object storage (S3, GCS, ...) an `ObjectPath`, which
has the methods of `Path` that a feature store needs. A put is atomic, as is the renaming of a file.
Credentials, endpoints and other options of a driver are set as fsspec documents: in its
configuration files, in FSSPEC_* variables, or where the driver itself looks (AWS_* for s3fs).
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
    """An object, or a folder of objects; the methods are those of `pathlib.Path`.

    Every failure is an OSError that names the URL, so that the driver's own exceptions end a
    command in one sentence; a missing object is a FileNotFoundError.

    Attributes:
        url: The URL as it was given, without a slash at the end.
        fs: The driver.
        key: The driver's name of the object.
    """

    # universal-pathlib cannot replace this class: it reports an unreachable store as an empty one,
    # so all methods that reach the storage would have to be overridden.

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
        """Yield the objects and folders directly below; nothing if there is nothing."""
        for path, _ in self._entries():
            yield path

    def rglob(self, name: str) -> Iterator[ObjectPath]:
        """Yield the objects with this name at any depth."""
        for path, kind in self._entries():
            if kind == "directory":
                yield from path.rglob(name)
            elif path.name == name:
                yield path

    # fs.exists, fs.find and similar methods are not used: they report an error as a missing object,
    # and a store that cannot be reached would be created anew.

    def _type(self) -> str | None:
        try:
            with self._named("read"):
                return str(self.fs.info(self.key)["type"])
        except FileNotFoundError:
            return None

    def _entries(self) -> list[tuple[ObjectPath, str]]:
        try:
            with self._named("list"):
                listing = self.fs.ls(self.key, detail=True)
        except FileNotFoundError:
            return []
        entries = [(entry["name"].rstrip("/"), entry["type"]) for entry in listing]
        own = self.key.strip("/")  # some stores have an object for the folder itself
        return [
            (self / key.rpartition("/")[2], kind) for key, kind in entries if key.strip("/") != own
        ]

    @contextmanager
    def _named(self, operation: str) -> Iterator[None]:
        """Turn every exception of the driver into an OSError that names the URL."""
        try:
            yield
        except Exception as error:  # any class: drivers pass on what their client library raises
            if isinstance(error, FileNotFoundError) and operation != "write":
                raise FileNotFoundError(f"{self.url} is missing") from error
            raise OSError(
                f"cannot {operation} {self.url}: {str(error) or type(error).__name__}; what was "
                "written before is kept: run the same command again when the storage is reachable"
            ) from error


Location = Path | ObjectPath


def location(path: str | os.PathLike[str] | ObjectPath) -> Location:
    """Return the location of a path or of a URL such as `s3://bucket/x`; `file:///x` is /x.

    Raises:
        ValueError: The protocol is unknown or its driver is not installed (fsspec names the
            package), or a URL was passed as a `Path`.
    """
    if isinstance(path, ObjectPath):
        return path
    text = os.fspath(path)
    if "://" not in text:
        if re.match(r"[a-z0-9]{2,}:/", text):
            raise ValueError(f"{text}: expected a path, or a URL as str (a Path loses a slash)")
        return Path(text)
    try:
        # Listings are not cached, since other processes may write.
        fs, key = fsspec.url_to_fs(text, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{text}: {error}") from error
    key = key.rstrip("/")
    return Path(key) if isinstance(fs, LocalFileSystem) else ObjectPath(text.rstrip("/"), fs, key)


def write_file(file: Location, data: bytes, writer: str = "") -> None:
    """Write a file, or put an object, whole or not at all; it is stored when this returns."""
    if isinstance(file, Path):
        durable.write_file(file, data, writer)
    else:
        file.write_bytes(data)


def link_file(source: Location, target: Location) -> None:
    """Link a file if both locations are on disk, otherwise copy it."""
    if isinstance(source, Path) and isinstance(target, Path):
        durable.link_file(source, target)
    else:
        write_file(target, source.read_bytes())


def entries(folder: Location) -> list[Location]:
    """Return the entries of a folder, sorted by name."""
    return sorted(folder.iterdir(), key=lambda entry: entry.name)


def file_size(file: Location) -> int:
    """Return the size of a file in bytes."""
    return file.stat().st_size if isinstance(file, Path) else file.size()


def file_sha256(file: Location) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    return (
        durable.file_sha256(file) if isinstance(file, Path) else durable.sha256(file.read_bytes())
    )


@contextmanager
def opened(file: Location) -> Iterator[bytes | mmap.mmap]:
    """Yield all bytes of a file: mapped into memory from disk, or fetched."""
    if isinstance(file, ObjectPath):
        yield file.read_bytes()
    elif file.stat().st_size == 0:  # an empty file cannot be mapped
        yield b""
    else:
        with (
            open(file, "rb") as data,
            mmap.mmap(data.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        ):
            yield mapped
