"""Choices that several settings share, each written down once; imports nothing but `typing`.

The configuration, the command line and the functions that take a choice read it here, so that none
of them has to import torch or pydantic for it.
"""

from __future__ import annotations

from typing import Literal

ParameterSet = Literal["encoder", "all", "attention", "classifier"]
MetricKind = Literal["none", "adam", "ekfac"]
PassDtype = Literal["float32", "bfloat16"]
StoreDtype = Literal["float32", "bfloat16", "float16", "int8"]
