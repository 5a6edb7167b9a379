"""An attribution: checked options, checkpoints, examples and feature stores."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from glob import escape as glob_escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from tqdm import tqdm

from tracmod.attribution.options import AttributionOptions
from tracmod.attribution.weights import checkpoint_notes, choose_weights
from tracmod.choices import selection_record
from tracmod.features.projection import Projection
from tracmod.features.recipe import FeatureRecipe, checkpoint_digests
from tracmod.features.store import FeatureStore
from tracmod.files import progress
from tracmod.files.durable import file_sha256, read_json, write_json
from tracmod.gradients.capture import (
    chosen_names,
    describe_frozen,
    frozen_names,
    select_layers,
)
from tracmod.gradients.ekfac import checkpoint_preconditioner
from tracmod.gradients.preconditioner import Preconditioner
from tracmod.influence.exact import NotFiniteError
from tracmod.models.architecture import model_unit
from tracmod.models.checkpoints import (
    Checkpoint,
    check_checkpoint,
    freeze,
    load_checkpoints,
    load_second_moment,
    loss_of_checkpoints,
    recorded_frozen,
    recorded_loss,
)
from tracmod.models.digests import tokenizer_digest
from tracmod.models.inputs import encode, num_cut, other_inputs
from tracmod.models.language_adapters import (
    LANGUAGE_COLUMN,
    has_language_adapters,
    with_language_ids,
)
from tracmod.models.loading import class_names, load_classifier, load_model
from tracmod.models.loss import stated_loss
from tracmod.models.modes import resolve_device, to_device, trained_names
from tracmod.models.weight_files import tensor_digests, unmoved
from tracmod.subnetworks.head_mask import HeadMask, matching_layers
from tracmod.tasks.examples import rows_digest
from tracmod.tasks.token_files import read_labelled_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SPLITS = ("train", "query")
PROGRESS = "progress"


class AttributionContext:
    """The inputs of an attribution; the examples are read at their first use.

    Attributes:
        options: The options.
        device: The device to compute on.
        mask: The head mask that is applied to train and query gradients, or None.
        checkpoints: (C,) the checkpoints, `epoch` being their position from 1.
        weights: (C,) the weights of the checkpoints in the scores.
        weight_sources: (C,) phrases that say where the weights come from.
        left_out: (C,) the names of the selected parameters that are frozen and left out.
        notes: Sentences about what was guessed, left out or not stated in the files, for stderr and
            run.json.
        label_names: The names of the labels, in order.
        loss: The loss that the checkpoints were trained with. Queries are measured without its
            label smoothing and weights (`ExampleLoss.measured`).
        max_length: The number of tokens at which texts are cut.
        projection_dim: The numbers per feature row; None until it is chosen.
        stores: The feature stores that this process has made or continued, by checkpoint and split.

    A copy that is sent to a worker has the checked options, but none of the examples and models; it
    reads and loads what its tasks need, and refuses files that have changed.
    """

    def __init__(self, options: AttributionOptions) -> None:
        """Check the options and load the model.

        Raises:
            ValueError: See `attribute`.
        """
        self.options = options
        self.device = resolve_device(options.device)
        self.projection_dim = options.projection_dim
        self.mask = None if options.head_mask is None else HeadMask.load(options.head_mask)
        self.checkpoints = _numbered_checkpoints(options)
        self.weights, self.weight_sources, self.notes = choose_weights(
            self.checkpoints, options.weights
        )
        model, self.tokenizer = load_model(options.model)
        if callable(options.parameters):  # which cannot be recorded; the names that it chooses can
            names = [glob_escape(name) for name in chosen_names(model, options.parameters)]
            self.options = options = replace(options, parameters=names)
        if self.mask is not None:
            matching_layers(model, self.mask)  # refuses a mask of another shape
        for path in options.checkpoints:
            check_checkpoint(path, model.config)
        self._compare_checkpoints(model)
        if options.preconditioner == "adam":
            for checkpoint in self.checkpoints:
                load_second_moment(checkpoint.path)  # refuses a checkpoint without one
        self.label_names = class_names(model)
        stated = stated_loss(
            options.loss,
            options.label_smoothing,
            options.class_weights,
            self.label_names,
            unit=model_unit(model),
        )
        self.loss = loss_of_checkpoints(self.checkpoints, model, stated)
        # The adapter of an example is that of its language, whatever a file has beside it.
        of_adapters = {LANGUAGE_COLUMN} if has_language_adapters(model.config) else set()
        self._model_inputs = other_inputs(model) | of_adapters
        self._model_config = model.config
        longest = min(512, self.tokenizer.model_max_length)
        self.max_length = longest if options.max_length is None else options.max_length
        self._tokenizer_digest = tokenizer_digest(self.tokenizer)
        self._preconditioners: dict[int, Preconditioner] = {}
        self._models: dict[int, PreTrainedModel] = {}
        self._digests: dict[int, dict[str, str]] = {}
        self._file_digests: dict[str, str] = {}
        self.stores: dict[tuple[int, str], FeatureStore] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Return what a worker is sent; paths are absolute, since it may run elsewhere."""
        options = self.options
        checkpoints = [
            replace(
                checkpoint,
                path=checkpoint.path.absolute() if checkpoint.path.exists() else checkpoint.path,
            )
            for checkpoint in self.checkpoints
        ]
        changed = {
            "options": replace(
                options,
                train=Path(options.train).absolute(),
                query=Path(options.query).absolute(),
                out=Path(options.out).absolute(),
            ),
            "checkpoints": checkpoints,
            "stores": {}, "_models": {}, "_preconditioners": {},
        }  # fmt: skip
        of_this_process = ("tables", "examples")
        state = {name: value for name, value in vars(self).items() if name not in of_this_process}
        return state | changed

    @property
    def progress(self) -> Path:
        """The folder of intermediate results, which is removed at the end."""
        return self.options.out / PROGRESS

    # --- examples ---------------------------------------------------------------------------

    @cached_property
    def tables(self) -> dict[str, pa.Table]:
        """The examples of both files; each file shows whether labels are names or numbers."""
        options = self.options
        files = {"train": options.train, "query": options.query}
        # The readers say what is wrong with what is no file.
        digests = {
            split: self.data_digest(split) for split in SPLITS if Path(files[split]).is_file()
        }
        for split, digest in digests.items():
            if self._file_digests.setdefault(split, digest) != digest:
                raise ValueError(
                    f"{getattr(options, split)}: expected the examples that the attribution began "
                    f"with, the file has changed since; run the command again"
                )
        tables = read_labelled_files(
            [options.train, options.query],
            self.label_names,
            options.columns,
            options.language,
            loss_kind=self.loss.kind,
            model_inputs=self._model_inputs,
            notes=self.notes,
        )
        return dict(zip(SPLITS, tables, strict=True))

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
        examples = encode(self.tokenizer, table, self.max_length, num_labels=num_labels)
        return with_language_ids(self._model_config, examples, table.column("language").to_pylist())

    def num_cut(self, split: str) -> int:
        """Return how many examples of a file have more than `max_length` tokens, and were cut.

        For a token classifier, the number of words that were cut off.
        """
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

    def say_notes(self) -> None:
        """Print on stderr what was guessed or left out."""
        for note in self.notes:
            tqdm.write(f"tracmod: {note}", file=sys.stderr)

    # --- checkpoints ------------------------------------------------------------------------

    def _compare_checkpoints(self, model: PreTrainedModel) -> None:
        """Note what does not fit together, and which selected parameters training did not move.

        These are the ones that a checkpoint's tracmod.json names, and those that are the same at
        all checkpoints.

        Raises:
            ValueError: A file of weights is damaged, or no selected parameter was trained.
        """
        options, unmoved_names, trained = self.options, list[str](), trained_names(model)
        if len(self.checkpoints) > 1:
            digests = [tensor_digests(checkpoint.path) for checkpoint in self.checkpoints]
            for checkpoint, its_digests in zip(self.checkpoints, digests, strict=True):
                if its_digests.keys() != digests[0].keys():
                    load_classifier(checkpoint.path)  # refuses tensors that have no place in it
            self.notes += checkpoint_notes(self.checkpoints, digests)
            unmoved_names = [name for name in unmoved(digests) if name in trained]
        self.checkpoints = [
            replace(checkpoint, frozen=tuple(sorted({*checkpoint.frozen, *unmoved_names})))
            for checkpoint in self.checkpoints
        ]
        self.left_out: list[list[str]] = []
        for checkpoint in self.checkpoints:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in trained)
            self._freeze(model, checkpoint)
            try:
                select_layers(model, options.parameters, options.include_frozen)
            except ValueError as error:
                raise ValueError(f"{checkpoint.path}: {error}") from None
            self.left_out.append(
                [] if options.include_frozen else frozen_names(model, options.parameters)
            )
        if any(self.left_out):
            where = ""
            if any(names != self.left_out[0] for names in self.left_out):
                where = ", others at other checkpoints"
            first = next(names for names in self.left_out if names)
            self.notes.append(f"{describe_frozen(first)}{where}; --include-frozen includes them")

    def checkpoint(self, number: int) -> Checkpoint:
        """Return the checkpoint with a number, from 1."""
        return self.checkpoints[number - 1]

    def _freeze(self, model: PreTrainedModel, checkpoint: Checkpoint) -> None:
        if not self.options.include_frozen:
            freeze(model, checkpoint.frozen, checkpoint.path)

    def load(self, checkpoint: Checkpoint) -> PreTrainedModel:
        """Load a checkpoint's model, on the device, with the parameters frozen that it names."""
        model = load_classifier(checkpoint.path)
        self._freeze(model, checkpoint)
        return to_device(model, self.device)

    def loaded(self, checkpoint: Checkpoint) -> PreTrainedModel:
        """Return a checkpoint's model; it stays in memory until that of another is needed."""
        number = checkpoint.epoch
        if number not in self._models:
            self._models = {}  # before the next one is loaded
            self._models = {number: self.load(checkpoint)}
        return self._models[number]

    def forget_model(self) -> None:
        """Free the memory of the model that `loaded` has returned, and of its preconditioner."""
        self._models, self._preconditioners = {}, {}

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
                model, self._tokenizer_digest, None, options.include_frozen
            )
            if options.preconditioner == "ekfac":
                identity["data"] = self.fitted_on()
            preconditioner = checkpoint_preconditioner(
                options.preconditioner,
                model,
                checkpoint.path,
                lambda: self.examples["train"],
                parameters=options.parameters,
                batch_tokens=options.batch_tokens,
                keep_in=folder / f"checkpoint-{number}.safetensors",
                identity=identity,
                include_frozen=options.include_frozen,
                loss=self.loss,
            )
            self._preconditioners = {number: preconditioner}  # one: as large as several models
        return self._preconditioners[number]

    def fitted_on(self) -> str:
        """Return the digest of the training examples that preconditioners are fitted on.

        These are the examples of the first call; new ones must come after them.
        """
        folder = self.options.out / "preconditioners"
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

    def _reading(self) -> dict[str, Any]:
        """Return how the files are read, where it is not by their own columns alone."""
        reading = {"columns": dict(self.options.columns), "language": self.options.language}
        return {name: value for name, value in reading.items() if value}

    def _settings_digests(self) -> dict[str, str]:
        return {
            "max_length": str(self.max_length),
            "batch_tokens": str(self.options.batch_tokens),
        }

    def digests(
        self, checkpoint: Checkpoint, model: PreTrainedModel | None = None
    ) -> dict[str, str]:
        """Return the digests of all that scores depend on at a checkpoint, apart from examples.

        Args:
            checkpoint: The checkpoint.
            model: Its model; None to load it.
        """
        number = checkpoint.epoch
        if number not in self._digests:
            model = self.loaded(checkpoint) if model is None else model
            preconditioner = self.preconditioner(checkpoint, model)
            digests = checkpoint_digests(
                model, self._tokenizer_digest, preconditioner, self.options.include_frozen
            )
            self._digests[number] = digests | self._settings_digests()
        return self._digests[number]

    def exact_identity(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Return what exact scores at a checkpoint depend on."""
        options = self.options
        return {
            "parameters": selection_record(options.parameters),
            "head_mask": None if self.mask is None else self.mask.digest(),
            "normalize": options.normalize,
            "pass_dtype": options.dtype,
            **({} if self.loss.identity is None else {"loss": self.loss.identity}),
            **{split: self.data_digest(split) for split in SPLITS},
            **self._reading(),
            **self.digests(checkpoint),
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
            options.include_frozen,
            self.loss,
        )

    def feature_identity(
        self, checkpoint: Checkpoint, model: PreTrainedModel | None = None
    ) -> dict[str, Any]:
        """Return what features at a checkpoint depend on, apart from the examples."""
        return self.recipe().identity(**self.digests(checkpoint, model))

    def store_path(self, checkpoint: Checkpoint, split: str) -> Path:
        """Return the folder of the features of a split at a checkpoint."""
        return self.options.out / "features" / f"checkpoint-{checkpoint.epoch}" / split

    def begin_store(self, checkpoint: Checkpoint, split: str) -> FeatureStore:
        """Make the store of a split at a checkpoint, or open it to continue, as its only writer."""
        table = self.tables[split]
        store = FeatureStore.grow(
            self.store_path(checkpoint, split),
            ids=table.column("id").to_pylist(),
            data=partial(rows_digest, table),
            dim=self.recipe().projection.dim,
            identity=self.feature_identity(checkpoint),
            dtype=self.options.store_dtype,
        )
        self.stores[checkpoint.epoch, split] = store
        return store

    def stores_of(self, split: str) -> list[FeatureStore]:
        """Return the (C,) complete stores of a split."""
        for checkpoint in self.checkpoints:
            key = (checkpoint.epoch, split)
            if key not in self.stores:
                self.stores[key] = FeatureStore.open(self.store_path(checkpoint, split))
        return [self.stores[checkpoint.epoch, split] for checkpoint in self.checkpoints]

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


def _numbered_checkpoints(options: AttributionOptions) -> list[Checkpoint]:
    """Return the checkpoints in the order given, numbered from 1.

    `epoch` is the position, because the Trainer saves at fractions of epochs too.
    """
    if not options.checkpoints:
        path, source = Path(options.model), "the model alone has weight 1"
        frozen_names, loss = recorded_frozen(path), recorded_loss(path)
        return [Checkpoint(path, 1, 0, 1.0, source, frozen=frozen_names, loss=loss)]
    loaded = load_checkpoints(options.checkpoints)
    return [replace(checkpoint, epoch=number) for number, checkpoint in enumerate(loaded, 1)]
