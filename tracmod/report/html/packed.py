"""Compresses large parts of a page, which the page's script unpacks when they are needed."""

from __future__ import annotations

import base64
import gzip
import json
from typing import Any

import numpy as np
from markupsafe import Markup


def packed(text: str) -> Markup:
    """Return base64 of the gzipped text, which cannot end the script element that holds it."""
    return Markup(base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode())


def packed_json(content: Any) -> Markup:
    """Pack content as JSON, with arrays as base64 of their little-endian bytes."""
    compact = (",", ":")
    return packed(
        json.dumps(content, ensure_ascii=False, separators=compact, allow_nan=False, default=_bytes)
    )


def _bytes(array: np.ndarray) -> str:
    return base64.b64encode(array.astype(array.dtype.newbyteorder("<")).tobytes()).decode()
