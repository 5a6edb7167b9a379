"""Versions of the packages that results depend on, recorded beside the results."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "pyarrow", "safetensors", "faiss-cpu")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that results depend on."""
    packages = {name: package_version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), **{k: v for k, v in packages.items() if v}}


def package_version(package: str) -> str:
    """Return the version of an installed package, or an empty string."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
