"""Large parts of a page, compressed in the page and unpacked by its script when they are needed."""

from __future__ import annotations

import base64
import gzip
import json
from typing import Any

import numpy as np
from markupsafe import Markup


def packed(text: str) -> Markup:
    """Base64 of the gzipped text: it stands in a script element and cannot end it."""
    return Markup(base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode())


def packed_json(content: Any) -> Markup:
    """The same of JSON; arrays in it as the base64 of their bytes, lowest byte first."""
    compact = (",", ":")
    return packed(
        json.dumps(content, ensure_ascii=False, separators=compact, allow_nan=False, default=_bytes)
    )


def _bytes(array: np.ndarray) -> str:
    return base64.b64encode(array.astype(array.dtype.newbyteorder("<")).tobytes()).decode()
