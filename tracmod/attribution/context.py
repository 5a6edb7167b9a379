"""An attribution: checked options, checkpoints, examples and feature stores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tracmod.attribution.options import AttributionOptions
from tracmod.features.collector import collect_to_store
from tracmod.features.projection import Projection
from tracmod.features.recipe import FeatureRecipe, checkpoint_digests
from tracmod.features.store import FeatureStore
from tracmod.files import progress
from tracmod.files.durable import file_sha256, read_json, write_json
from tracmod.gradients.ekfac import checkpoint_preconditioner
from tracmod.gradients.preconditioner import Preconditioner
from tracmod.influence.exact import NotFiniteError
from tracmod.models.checkpoints import (
    Checkpoint,
    check_checkpoint,
    load_checkpoints,
    load_second_moment,
)
from tracmod.models.digests import tokenizer_digest
from tracmod.models.inputs import encode
from tracmod.models.loading import class_names, load_classifier, load_model
from tracmod.models.modes import frozen, resolve_device, to_device
from tracmod.subnetworks.head_mask import HeadMask, matching_layers
from tracmod.tasks.examples import rows_digest
from tracmod.tasks.files import read_model_files

SPLITS = ("train", "query")


class AttributionContext:
    """The inputs of an attribution; the examples are read at their first use.

    Attributes:
        options: The options.
        device: The device to compute on.
        mask: The head mask that is applied to train and query gradients, or None.
        checkpoints: (C,) the checkpoints, `epoch` being their position from 1.
        weights: (C,) the weights of the checkpoints in the scores.
        label_names: The names of the labels, in order.
        max_length: The number of tokens at which texts are cut.
        projection_dim: The numbers per feature row; None until it is chosen.
    """

    def __init__(self, options: AttributionOptions) -> None:
        """Check the options and load the model.

        Raises:
            ValueError: See `attribute`.
        """
        self.options = options
        for name, value in (("k", options.k), ("batch_tokens", options.batch_tokens)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        self.device = resolve_device(options.device)
        self.projection_dim = options.projection_dim
        if options.projection_dim is not None:
            Projection(options.projection_dim)  # refuses a dimension out of range
        self.mask = None if options.head_mask is None else HeadMask.load(options.head_mask)
        self.checkpoints = _numbered_checkpoints(options)
        self.weights = _weights(self.checkpoints)
        model, self.tokenizer = load_model(options.model)
        if self.mask is not None:
            matching_layers(model, self.mask)  # refuses a mask of another shape
        for path in options.checkpoints:
            check_checkpoint(path, model.config)
        if options.preconditioner == "adam":
            for checkpoint in self.checkpoints:
                load_second_moment(checkpoint.path)  # refuses a checkpoint without one
        self.label_names = class_names(model)
        longest = min(512, self.tokenizer.model_max_length)
        self.max_length = longest if options.max_length is None else options.max_length
        self._tokenizer_digest = tokenizer_digest(self.tokenizer)
        self._preconditioners: dict[int, Preconditioner] = {}

    # --- examples ---------------------------------------------------------------------------

    @cached_property
    def tables(self) -> dict[str, pa.Table]:
        """The examples of both files; each file shows whether labels are names or numbers."""
        files = [self.options.train, self.options.query]
        return dict(zip(SPLITS, read_model_files(files, self.label_names), strict=True))

    @cached_property
    def examples(self) -> dict[str, list[dict[str, Any]]]:
        """The examples of both files, encoded."""
        return {split: self.encode(table) for split, table in self.tables.items()}

    def example_languages(self, split: str) -> list[str]:
        """Return the language of every example of a file."""
        return self.tables[split].column("language").to_pylist()

    def encode(self, table: pa.Table) -> list[dict[str, Any]]:
        """Encode examples as the model takes them."""
        num_labels = len(self.label_names)
        return encode(self.tokenizer, table, self.max_length, num_labels=num_labels)

    def num_cut(self, split: str) -> int:
        """Return how many examples of a file have more than `max_length` tokens, and were cut."""
        lengths = [len(example["input_ids"]) for example in self.examples[split]]
        full = [row for row, length in enumerate(lengths) if length >= self.max_length]
        return num_cut(
            self.tokenizer, self.tables[split].take(pa.array(full, pa.int64())), self.max_length
        )

    def data_digest(self, split: str) -> str:
        """Return the SHA-256 of an example file."""
        return file_sha256(self.options.train if split == "train" else self.options.query)

    @contextmanager
    def naming_examples(self, rows: Mapping[str, Sequence[int]]) -> Iterator[None]:
        """Add the example's id to an error about a gradient that is not finite.

        Args:
            rows: Split -> the rows of its table that are worked on.
        """
        try:
            yield
        except NotFiniteError as error:
            name = self.tables[error.split].column("id")[rows[error.split][error.row]].as_py()
            raise ValueError(
                f"{error.split} example {name!r}: expected a finite gradient, got NaN or infinity"
            ) from None

    # --- checkpoints ------------------------------------------------------------------------

    def load(self, checkpoint: Checkpoint) -> PreTrainedModel:
        """Load a checkpoint's model, on the device."""
        return to_device(load_classifier(checkpoint.path), self.device)

    def preconditioner(
        self, checkpoint: Checkpoint, model: PreTrainedModel
    ) -> Preconditioner | None:
        """Return a checkpoint's preconditioner.

        A fitted one stays as it is when training examples are added later.
        """
        options, number = self.options, checkpoint.epoch
        if options.preconditioner == "none":
            return None
        if number not in self._preconditioners:
            folder = options.out / "preconditioners"
            identity = self._settings_digests() | checkpoint_digests(
                model, self._tokenizer_digest, None
            )
            if options.preconditioner == "ekfac":
                identity["data"] = self._fitted_on(folder)
            preconditioner = checkpoint_preconditioner(
                options.preconditioner,
                model,
                checkpoint.path,
                lambda: self.examples["train"],
                parameters=options.parameters,
                batch_tokens=options.batch_tokens,
                keep_in=folder / f"checkpoint-{number}.safetensors",
                identity=identity,
            )
            self._preconditioners = {number: preconditioner}  # one: as large as several models
        return self._preconditioners[number]

    def _fitted_on(self, folder: Path) -> str:
        """Return the digest of the training examples that preconditioners are fitted on.

        These are the examples of the first call; new ones must come after them.
        """
        file, table = folder / "fitted-on.json", self.tables["train"]
        if not file.is_file():
            write_json(file, {"rows": len(table), "digest": rows_digest(table, 0, len(table))})
        first = read_json(file)
        if rows_digest(table, 0, first["rows"]) != first["digest"]:
            raise ValueError(
                f"{folder}: the saved preconditioner was fitted on examples that are not the first "
                f"rows of {self.options.train}; take another --out or remove this one"
            )
        return str(first["digest"])

    def _settings_digests(self) -> dict[str, str]:
        return {
            "max_length": str(self.max_length),
            "batch_tokens": str(self.options.batch_tokens),
        }

    def digests(self, checkpoint: Checkpoint, model: PreTrainedModel) -> dict[str, str]:
        """Return the digests of all that scores depend on at a checkpoint, apart from examples."""
        preconditioner = self.preconditioner(checkpoint, model)
        digests = checkpoint_digests(model, self._tokenizer_digest, preconditioner)
        return digests | self._settings_digests()

    def exact_identity(self, checkpoint: Checkpoint, model: PreTrainedModel) -> dict[str, Any]:
        """Return what exact scores at a checkpoint depend on."""
        options = self.options
        return {
            "parameters": options.parameters,
            "head_mask": None if self.mask is None else self.mask.digest(),
            "normalize": options.normalize,
            "pass_dtype": options.dtype,
            **{split: self.data_digest(split) for split in SPLITS},
            **self.digests(checkpoint, model),
        }

    # --- features ---------------------------------------------------------------------------

    def recipe(self, dim: int | None = None) -> FeatureRecipe:
        """Return the recipe of features, with the chosen dimension or another."""
        options, chosen = self.options, dim or self.projection_dim
        assert chosen is not None
        return FeatureRecipe(
            Projection(chosen, seed=options.seed),
            options.parameters,
            options.dtype,
            options.batch_tokens,
            self.max_length,
            self.mask,
        )

    def feature_identity(self, checkpoint: Checkpoint, model: PreTrainedModel) -> dict[str, Any]:
        """Return what features at a checkpoint depend on, apart from the examples."""
        return self.recipe().identity(**self.digests(checkpoint, model))

    def store_path(self, checkpoint: Checkpoint, split: str) -> Path:
        """Return the folder of the features of a split at a checkpoint."""
        return self.options.out / "features" / f"checkpoint-{checkpoint.epoch}" / split

    def collect(
        self, checkpoint: Checkpoint, advance: Callable[[int], Any]
    ) -> dict[str, FeatureStore]:
        """Collect the features of both files at a checkpoint; rows that are there stay."""
        model = self.load(checkpoint)
        identity = self.feature_identity(checkpoint, model)
        collector = self.recipe().collector(model, self.preconditioner(checkpoint, model))
        stores = {}
        with frozen(model):
            for split in SPLITS:
                table = self.tables[split]
                with FeatureStore.grow(
                    self.store_path(checkpoint, split),
                    ids=table.column("id").to_pylist(),
                    data=partial(rows_digest, table),
                    dim=collector.projection.dim,
                    identity=identity,
                    dtype=self.options.store_dtype,
                ) as store:
                    collect_to_store(collector, self.examples[split], store, advance)
                stores[split] = store
        return stores

    def open_train_store(self, checkpoint: Checkpoint, model: PreTrainedModel) -> FeatureStore:
        """Open the training features that were collected at a checkpoint.

        Raises:
            ValueError: They were made with another model, tokenizer, mask, data or projection than
                there are now.
        """
        table, path = self.tables["train"], self.store_path(checkpoint, "train")
        identity = self.feature_identity(checkpoint, model)
        store = FeatureStore.open(path, identity, partial(rows_digest, table))
        if len(store) != len(table):
            raise ValueError(
                f"{self.options.train} has {len(table)} examples, {path} features of {len(store)}: "
                "run the attribution again"
            )
        return store

    def bar(self, per_checkpoint: int) -> Any:
        """Open a progress bar over the examples of all checkpoints."""
        total = per_checkpoint * len(self.checkpoints)
        return progress.bar("attribute", total)


def num_cut(tokenizer: PreTrainedTokenizerBase, table: pa.Table, max_length: int) -> int:
    """Return how many examples of a table have more than `max_length` tokens."""
    texts = zip(table["text_a"].to_pylist(), table["text_b"].to_pylist(), strict=True)
    # verbose=False: no warning about a text that is too long for the model, since none is given it.
    return sum(
        len(tokenizer(text_a, text_b, truncation=False, verbose=False)["input_ids"]) > max_length
        for text_a, text_b in texts
    )


def _numbered_checkpoints(options: AttributionOptions) -> list[Checkpoint]:
    """Return the checkpoints in the order given, numbered from 1.

    `epoch` is the position, because the Trainer saves at fractions of epochs too.
    """
    if not options.checkpoints:
        return [Checkpoint(Path(options.model), epoch=1, step=0, learning_rate=1.0)]
    loaded = load_checkpoints(options.checkpoints)
    return [replace(checkpoint, epoch=number) for number, checkpoint in enumerate(loaded, 1)]


def _weights(checkpoints: Sequence[Checkpoint]) -> list[float]:
    """Return the learning rates of the checkpoints, or 1 each where no checkpoint has one.

    Raises:
        ValueError: Only some have one, one is negative, or all are 0.
    """
    rates = [checkpoint.learning_rate for checkpoint in checkpoints]
    if all(rate is None for rate in rates):
        return [1.0] * len(rates)
    for checkpoint in checkpoints:
        if checkpoint.learning_rate is None:
            raise ValueError(
                f"{checkpoint.path}: expected a learning rate, as the other checkpoints have, in "
                f"tracmod.json or trainer_state.json, found none"
            )
        if checkpoint.learning_rate < 0:
            raise ValueError(
                f"{checkpoint.path}: expected a learning rate of 0 or more, got "
                f"{checkpoint.learning_rate}"
            )
    if not any(rates):
        raise ValueError(
            f"{checkpoints[0].path}: expected a learning rate above 0 at one checkpoint or more, "
            f"got 0 at all {len(rates)}: every score would be 0. A scheduler's last logged rate is "
            f"0; tracmod.TracInCallback records the mean rate of the steps instead"
        )
    return [float(rate) for rate in rates if rate is not None]
