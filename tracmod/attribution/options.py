"""The options of `tracmod attribute`, from which its command line is made; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from tracmod.choices import (
    DEFAULT_MEMORY,
    MetricKind,
    ParameterSelection,
    PassDtype,
    StatedLossKind,
    StoreDtype,
    check_selection,
    positive_number,
    whole_number,
)


@dataclass(frozen=True)
class AttributionOptions:
    """Options of `attribute`, a command-line option each.

    The metadata of a field has the help of its command-line option and the bounds of its value.

    Raises:
        ValueError: a number is out of its bounds, a choice is not among those of its field, or a
            column or language is not valid.
    """

    model: str = field(
        metadata={"help": "Transformers folder with the model and its tokenizer, or a Hub name."}
    )
    train: Path = field(metadata={"help": "File of the training examples."})
    query: Path = field(metadata={"help": "File of the query examples, which are to be explained."})
    out: Path = field(metadata={"help": "Folder for the results."})
    columns: Mapping[str, str] = field(
        default_factory=dict,
        kw_only=True,
        metadata={
            "help": "Names of the columns in the files where they differ from id, language, "
            "text_a, text_b, label and group (of a token classifier: tokens and tags), such as "
            "text_a=premise,text_b=hypothesis. An empty name (text_b=) leaves a column out. Can be "
            "repeated."
        },
    )
    language: str | None = field(
        default=None,
        kw_only=True,
        metadata={
            "help": "Language of the examples of files without a column of languages. "
            "Default: und (undetermined)."
        },
    )
    checkpoints: Sequence[Path] = field(
        default=(),
        metadata={
            "help": "Folders saved during training, in order. Without any, the model itself is "
            "used, with weight 1."
        },
    )
    weights: Sequence[float] | Literal["uniform"] | None = field(
        default=None,
        metadata={
            "help": "Weights of the checkpoints in the scores: numbers separated by commas, or "
            "uniform for 1 each. Default: the mean learning rate of each checkpoint's steps."
        },
    )
    k: int = field(
        default=100,
        metadata={
            "help": "Number of proponents and of opponents per query; at most as many as there are "
            "training examples.",
            "min": 1,
        },
    )
    exact: bool = field(
        default=False,
        metadata={
            "help": "Use whole gradients, without projection; writes exact/ instead of features/."
        },
    )
    projection_dim: int | None = field(
        default=4096,
        metadata={
            "help": "Numbers per feature row. auto: the fewest, from 512 to 16384, whose error on "
            "an exactly scored sample stays below --share-error.",
            "min": 1,
        },
    )
    share_error: float = field(
        default=0.02,
        metadata={
            "help": "With --projection-dim auto: upper bound on the mean error in language shares, "
            "at 95% confidence.",
            "min": 0,
            "min_open": True,
        },
    )
    normalize: str | None = field(
        default="cosine",
        metadata={
            "help": "cosine: cosine of the gradients at each checkpoint; none: inner product."
        },
    )
    head_mask: Path | None = field(
        default=None,
        metadata={"help": "JSON file of a head mask, applied to the gradients of both files."},
    )
    parameters: ParameterSelection = field(
        default="encoder",
        metadata={
            "help": "Parameters whose gradients are used. encoder: all but the embeddings; all; "
            "attention: those of the attention heads; classifier; or patterns of the names of "
            "parameters or modules, such as '*.query,*.value'."
        },
    )
    include_frozen: bool = field(
        default=False,
        metadata={
            "help": "Also use parameters that training did not move. They are known from "
            "tracmod.json, or because they are the same at all checkpoints."
        },
    )
    preconditioner: MetricKind = field(
        default="none",
        metadata={
            "help": "Metric of the inner products. adam: that of Adam's steps, for checkpoints "
            "with its second moment (see tracmod.TracInCallback). ekfac: the curvature of the "
            "model, fitted on --train."
        },
    )
    loss: StatedLossKind | None = field(
        default=None,
        metadata={
            "help": "Loss that the model was trained with. Default: the one that the checkpoints "
            "record, or else the one that transformers chooses by the model's config."
        },
    )
    label_smoothing: float | None = field(
        default=None,
        metadata={
            "help": "Label smoothing of the training, the Trainer's label_smoothing_factor.",
            "min": 0,
            "max": 1,
        },
    )
    class_weights: str | None = field(
        default=None,
        metadata={
            "help": "Weights of the classes in the training's cross entropy, such as neg=1,pos=3, "
            "or numbers in the order of the classes."
        },
    )
    seed: int = field(default=0, metadata={"help": "Seed of the projection.", "min": 0})
    max_length: int | None = field(
        default=None,
        metadata={
            "help": "Tokens per example. Default: the limit of the model, at most 512.",
            "min": 1,
        },
    )
    batch_tokens: int = field(default=8192, metadata={"help": "Tokens per batch.", "min": 1})
    memory: int = field(
        default=DEFAULT_MEMORY,
        metadata={
            "help": "Memory for features, rankings and buffers while scoring.",
            "unit": "bytes",
        },
    )
    device: str | None = field(
        default=None,
        metadata={"help": "cpu, cuda, cuda:1, ... Default: a GPU if there is one."},
    )
    dtype: PassDtype = field(
        default="float32",
        metadata={
            "help": "Precision of the forward and backward pass. bfloat16 is faster; scores agree "
            "to about three digits."
        },
    )
    store_dtype: StoreDtype = field(
        default="float32",
        metadata={
            "help": "Precision of the features on disk. int8 takes a quarter of the space, with a "
            "scale per example."
        },
    )

    def __post_init__(self) -> None:
        # Imports pyarrow.
        from tracmod.tasks.columns import COLUMNS, check_columns, check_language

        annotations = get_type_hints(type(self))
        for option in fields(self):
            _check(option.name, getattr(self, option.name), annotations[option.name], option)
        check_selection("parameters", self.parameters)
        if self.normalize not in (None, "cosine"):
            raise ValueError(f"normalize: expected None or 'cosine', got {self.normalize!r}")
        check_columns(self.columns, (*COLUMNS, "tokens", "tags"))
        if self.language is not None:
            check_language(self.language)


def _check(name: str, value: Any, annotation: Any, option: Any) -> None:
    """Refuse a value that its option on the command line would refuse, by the same bounds."""
    parts = get_args(annotation)
    if NoneType in parts:
        if value is None:
            return
        annotation = next(part for part in parts if part is not NoneType)
    if annotation is int:
        whole_number(name, value, option.metadata.get("min", 1))
    elif annotation is float:
        positive_number(name, value)
    elif get_origin(annotation) is Literal and value not in get_args(annotation):
        raise ValueError(f"{name}: expected {', '.join(get_args(annotation))}, got {value!r}")
