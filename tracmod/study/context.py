"""A run as its stages see it: config, data, checkpoints, views and masks."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from tracmod.analysis.results import UNTRAINED
from tracmod.analysis.statistics import Resampling
from tracmod.choices import Unit
from tracmod.config import RunConfig
from tracmod.engine import Engine
from tracmod.engine.local import LocalEngine
from tracmod.files.durable import file_sha256
from tracmod.models.checkpoints import Checkpoint, freeze, load_checkpoints, recorded_frozen
from tracmod.models.digests import tokenizer_digest
from tracmod.models.inputs import encode
from tracmod.models.language_adapters import with_language_ids
from tracmod.models.loading import has_tokenizer, load_model, load_tokenizer
from tracmod.models.loss import CROSS_ENTROPY_OF, ExampleLoss
from tracmod.models.modes import resolve_device, to_device
from tracmod.study.run_folder import RunFolder
from tracmod.study.views import View, views_of
from tracmod.subnetworks.head_mask import HeadMask
from tracmod.training.folder import epoch_masks

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MODELS = ("full", "sparse")
SPLITS = ("train", "dev", "test")

T = TypeVar("T")


class RunContext:
    """A run folder with all that its stages share; made once per process.

    Attributes:
        run: The run folder.
        config: Its config.
        donors: Runs whose finished stages and features may be taken over.
        engine: Where tasks run.
    """

    def __init__(
        self, run: RunFolder, donors: Sequence[RunFolder] = (), engine: Engine | None = None
    ) -> None:
        self.run = run
        self.config: RunConfig = run.config
        self.donors = donors
        self.engine = engine or LocalEngine()
        self._tables: dict[str, pa.Table] = {}
        self._data_digests: dict[str, str] = {}
        self._latest: dict[str, tuple[Hashable, Any]] = {}

    @cached_property
    def device(self) -> str:
        """The device to compute on; a worker sets it to its own GPU."""
        return resolve_device(self.config.device)

    def latest(self, kind: str, key: Hashable, make: Callable[[], T]) -> T:
        """Return `make()`, remembered until another key of the same kind is asked for.

        For objects so large that a process holds one of a kind at a time, such as a checkpoint with
        its encoded examples: many tasks in a row need the same one.
        """
        if self._latest.get(kind, (None, None))[0] != key:
            self.forget(kind)  # before the next is made: two may not fit
            self._latest[kind] = (key, make())
        value: T = self._latest[kind][1]
        return value

    def forget(self, kind: str) -> None:
        """Free what `latest` remembers of a kind."""
        self._latest.pop(kind, None)

    # --- data -------------------------------------------------------------------------------

    @property
    def languages(self) -> list[str]:
        """The task's languages."""
        return self.config.task.languages

    def table(self, split: str) -> pa.Table:
        """Return data/<split>.parquet, read once."""
        if split not in self._tables:
            self._tables[split] = pq.read_table(self.run.data(split))
        return self._tables[split]

    def table_of(self, split: str, language: str) -> pa.Table:
        """Return the examples of one language of a split."""
        table = self.table(split)
        return table.filter(pa.compute.equal(table.column("language"), language))

    def example_languages(self, split: str) -> list[str]:
        """Return the language of every example of a split."""
        return self.table(split).column("language").to_pylist()

    def data_digest(self, split: str) -> str:
        """Return the SHA-256 of data/<split>.parquet, computed once."""
        if split not in self._data_digests:
            self._data_digests[split] = file_sha256(self.run.data(split))
        return self._data_digests[split]

    def rows(self, split: str, language: str | None) -> list[int]:
        """Return the row numbers of the examples that one mask of a view applies to.

        These are all training examples, and the test examples of the mask's language (all of them
        if the mask is for no language in particular).
        """
        languages = self.example_languages(split)
        if split == "train" or language is None:
            return list(range(len(languages)))
        return [row for row, other in enumerate(languages) if other == language]

    @property
    def tag_names(self) -> list[str] | None:
        """The names of the tags of words, for a task of tokens; None for other tasks."""
        names: list[str] | None = self.run.record.get("tag_names")
        return names

    @property
    def unit(self) -> Unit:
        """The kind of thing that the model classifies: texts, words, or the answers in texts."""
        return self.config.task.unit

    @property
    def class_names(self) -> list[str]:
        """The names of the model's outputs: classes of texts or words, or ends of an answer."""
        if self.unit == "span":
            return ["start", "end"]
        names: list[str] = self.tag_names or self.run.record["label_names"]
        return names

    @property
    def loss(self) -> ExampleLoss:
        """The loss that the study trains with."""
        return ExampleLoss(CROSS_ENTROPY_OF[self.unit])

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, table: pa.Table, model: PreTrainedModel
    ) -> list[dict[str, Any]]:
        """Encode examples as the model takes them."""
        num_labels = int(model.config.num_labels or 0)
        examples = encode(tokenizer, table, self.config.model.max_length, num_labels=num_labels)
        return with_language_ids(model.config, examples, table.column("language").to_pylist())

    # --- checkpoints ------------------------------------------------------------------------

    @property
    def models(self) -> tuple[str, ...]:
        """The models whose influence is computed: full, sparse, and the control if there is one."""
        return (*MODELS, UNTRAINED) if self.config.collect.untrained else MODELS

    def counted_epochs(self, model_name: str) -> list[int]:
        """Return the epochs whose checkpoints are used for influence: every n-th, and the last."""
        if model_name == UNTRAINED:
            return [0]
        last, every = self._epochs(model_name), self.config.collect.every
        return sorted({*range(every, last + 1, every), last})

    def checkpoints(self, model_name: str) -> list[Checkpoint]:
        """Return the checkpoints that are used for influence.

        Each represents the steps since the previous one, so its learning rate is the mean over the
        epochs between them. The control `untrained` has one checkpoint, of epoch 0, with weight 1.

        Raises:
            ValueError: One of them has no learning rate, and the weights are learning rates.
        """
        folder = self.run.model(model_name)
        if model_name == UNTRAINED:
            path = folder / "checkpoint-0"
            return [Checkpoint(path, 0, 0, learning_rate=1.0, frozen=recorded_frozen(path))]
        epochs = range(1, self._epochs(model_name) + 1)
        all_checkpoints = load_checkpoints(folder / f"checkpoint-{epoch}" for epoch in epochs)
        counted = self.counted_epochs(model_name)
        checkpoints = []
        for previous, epoch in zip([0, *counted[:-1]], counted, strict=True):
            rate = None
            if self.config.influence.weights != "uniform":
                rates = learning_rates(all_checkpoints[previous:epoch])
                rate = sum(rates) / len(rates)
            checkpoints.append(replace(all_checkpoints[epoch - 1], learning_rate=rate))
        if all(checkpoint.learning_rate == 0 for checkpoint in checkpoints):
            raise ValueError(
                f"{folder}: expected a learning rate above 0 at one checkpoint or more, got 0 at "
                f"all {len(checkpoints)}: every score would be 0; use uniform weights"
            )
        return checkpoints

    def checkpoint(self, model_name: str, epoch: int) -> Checkpoint:
        """Return the checkpoint of an epoch that is used for influence."""
        return next(c for c in self.checkpoints(model_name) if c.epoch == epoch)

    def _epochs(self, model_name: str) -> int:
        return (self.config.sparse if model_name == "sparse" else self.config.finetune).epochs

    def load(self, checkpoint: Checkpoint) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Load a checkpoint's model, on the device, and its tokenizer."""
        model, tokenizer = load_model(checkpoint.path, tokenizer=self._tokenizer(checkpoint.path))
        freeze(model, checkpoint.frozen, checkpoint.path)
        return to_device(model, self.device), tokenizer

    def tokenizer_digest(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """Return the digest of a checkpoint's tokenizer, computed once for each."""
        return self.latest("tokenizer digest", tokenizer, lambda: tokenizer_digest(tokenizer))

    def _tokenizer(self, folder: Path) -> PreTrainedTokenizerBase | None:
        """Return a checkpoint's tokenizer, or None if its folder has none.

        Loading one of 250,000 pieces takes seconds, and all checkpoints of a run have the same
        files of it. Which of the files transformers reads is its affair, so all are compared.
        """
        if not has_tokenizer(folder):
            return None
        content = tuple(
            (file.name, file_sha256(file))
            for file in sorted(folder.iterdir())
            if file.is_file() and file.suffix != ".safetensors" and file.name != "tracmod.json"
        )
        return self.latest("tokenizer", content, lambda: load_tokenizer(str(folder)))

    def weights(self, checkpoints: Sequence[Checkpoint]) -> list[float] | None:
        """Return the weight of each checkpoint in the scores; None stands for 1 each."""
        if self.config.influence.weights == "uniform":
            return None
        return learning_rates(checkpoints)

    @property
    def normalize(self) -> str | None:
        """The normalization mode of scores, "cosine" or None."""
        normalize = self.config.influence.normalize
        return None if normalize == "none" else normalize

    # --- views and masks --------------------------------------------------------------------

    @cached_property
    def subnetworks(self) -> dict[str, HeadMask]:
        """The pruned mask of every language."""
        return {
            language: HeadMask.load(self.run.subnetwork(language)) for language in self.languages
        }

    @cached_property
    def views(self) -> list[View]:
        """The views of the config, in the order in which they are computed."""
        return views_of(self.config.views, self.subnetworks, self.config.seed)

    def view(self, name: str) -> View:
        """Return the view of a name."""
        return _named(self.views, name)

    def views_at(self, model_name: str, epoch: int) -> list[View]:
        """Return the views with the masks of a checkpoint.

        They differ from `views` where sparse fine-tuning re-estimates the masks.
        """
        if model_name != "sparse" or self.config.sparse.masks == "static":
            return self.views
        masks = epoch_masks(self.run.model(model_name), epoch, self.subnetworks)
        return views_of(self.config.views, masks, self.config.seed)

    def mask(
        self, model_name: str, view_name: str, language: str | None, epoch: int
    ) -> HeadMask | None:
        """Return the mask of one pass of a view at the checkpoint of an epoch."""
        return dict(_named(self.views_at(model_name, epoch), view_name).masks)[language]

    def passes(self, views: Sequence[View]) -> Iterator[tuple[View, str | None, HeadMask | None]]:
        """Yield (view, language, mask) for every collection pass at one checkpoint."""
        for view in views:
            if view.collected:
                for language, mask in view.masks:
                    yield view, language, mask

    def examples_per_checkpoint(self) -> int:
        """Count the examples processed at one checkpoint, over all masks."""
        return sum(
            len(self.rows(split, language))
            for _, language, _ in self.passes(self.views)
            for split in ("train", "test")
        )

    # --- statistics -------------------------------------------------------------------------

    @property
    def resampling(self) -> Resampling:
        """The settings of intervals and tests."""
        analyze = self.config.analyze
        return Resampling(
            analyze.bootstrap, analyze.permutations, analyze.confidence, self.config.seed
        )


def learning_rates(checkpoints: Sequence[Checkpoint]) -> list[float]:
    """Return TracIn's eta_c, the learning rates of the checkpoints.

    Raises:
        ValueError: A checkpoint has none.
    """
    weights = []
    for checkpoint in checkpoints:
        if checkpoint.learning_rate is None:
            raise ValueError(
                f"{checkpoint.path}: expected a learning rate in tracmod.json or "
                f"trainer_state.json, found none; use uniform weights"
            )
        weights.append(checkpoint.learning_rate)
    return weights


def _named(views: Sequence[View], name: str) -> View:
    return next(view for view in views if view.name == name)
