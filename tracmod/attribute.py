"""Influence on any model's predictions, from the user's own files: `tracmod attribute`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tracmod.capture import frozen
from tracmod.durable import file_sha256, write_checksums, write_json
from tracmod.features import Collector, Projection, collect_to_store, feature_identity, masked
from tracmod.heads import HeadMask
from tracmod.influence import TopInfluences, exact_influence, top_influences, top_of_scores
from tracmod.model import (
    Checkpoint,
    class_names,
    encode,
    load_checkpoints,
    load_classifier,
    load_model,
    model_digest,
    predict,
    to_device,
    tokenizer_digest,
)
from tracmod.run_folder import versions
from tracmod.store import FeatureStore
from tracmod.tables import InfluenceTables
from tracmod.tasks.files import read_model_examples

SPLITS = ("train", "query")


@dataclass(frozen=True)
class Attribution:
    """What `attribute` is asked to do.

    Attributes:
        model: transformers folder with its tokenizer, or a Hub name.
        train, query: example files (`id, language, text_a, text_b, label, group`).
        out: folder for the results.
        checkpoints: folders saved during training; none: the model itself, with weight 1.
        k: proponents and opponents kept per query; lowered to the number of training examples.
        exact: whole gradients instead of projected features.
        projection_dim: numbers per feature row.
        normalize: None or "cosine".
        head_mask: JSON file of a mask, applied to both gradients.
        parameters: as in `collect_features`.
        seed: of the projection and of the bootstrap.
        max_length: tokens; None for what the model takes, at most 512.
        batch_tokens: bound on the tokens of a batch.
        device: cpu, cuda, ...; None: a GPU if there is one.
    """

    model: str
    train: Path
    query: Path
    out: Path
    checkpoints: Sequence[Path] = ()
    k: int = 100
    exact: bool = False
    projection_dim: int = 4096
    normalize: str | None = "cosine"
    head_mask: Path | None = None
    parameters: str = "encoder"
    seed: int = 0
    max_length: int | None = None
    batch_tokens: int = 8192
    device: str | None = None


def attribute(asked: Attribution) -> None:
    """Write top.parquet, languages.parquet, run.json and (unless exact) features/ into `out`.

    Started again with the same arguments it goes on where it was: whole shards are not made twice.

    Raises:
        ValueError: bad files, labels outside the model's range, a mask of another shape,
            checkpoints some of which have a learning rate and some not, or features in `out` that
            were made with other arguments.
    """
    started = time.perf_counter()
    work = _Work(asked)
    top = work.exact() if asked.exact else work.projected()
    tables = InfluenceTables(work.tables["train"], work.tables["query"], work.predictions())
    tables.add(list(range(len(work.tables["query"]))), top)
    tables.write(asked.out, bootstrap=1000, confidence=0.95, seed=asked.seed)
    write_json(asked.out / "run.json", work.record(time.perf_counter() - started))
    write_checksums(asked.out)


class _Work:
    """What `attribute` works with: everything is read and checked before the long part begins."""

    def __init__(self, asked: Attribution) -> None:
        self.asked = asked
        if asked.k < 1:
            raise ValueError(f"k: expected at least 1, got {asked.k}")
        self.device = asked.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.projection = Projection(asked.projection_dim, seed=asked.seed)
        self.mask = None if asked.head_mask is None else HeadMask.load(asked.head_mask)
        self.checkpoints = _checkpoints(asked)
        self.weights = _weights(self.checkpoints)
        model, tokenizer = load_model(asked.model)
        with masked(model, self.mask):  # a mask of another shape is refused here
            pass
        self.tokenizer_digest = tokenizer_digest(tokenizer)
        self.label_names = class_names(model)
        self.max_length = asked.max_length or min(512, tokenizer.model_max_length)
        self.tables = {
            "train": read_model_examples(asked.train, self.label_names),
            "query": read_model_examples(asked.query, self.label_names),
        }
        self.examples = {split: self._encode(tokenizer, split) for split in SPLITS}

    @property
    def normalize(self) -> str | None:
        return self.asked.normalize

    @property
    def languages(self) -> list[str]:
        """The training examples' languages."""
        return self.tables["train"].column("language").to_pylist()

    def exact(self) -> TopInfluences:
        """Influence from whole gradients."""
        scores_QN = torch.zeros(len(self.examples["query"]), len(self.examples["train"]))
        with self._bar(len(self.examples["train"])) as bar:
            for checkpoint, weight in zip(self.checkpoints, self.weights, strict=True):
                scores_QN += weight * exact_influence(
                    self._load(checkpoint),
                    self.examples["train"],
                    self.examples["query"],
                    self.asked.parameters,
                    self.mask,
                    self.normalize,
                    self.asked.batch_tokens,
                    advance=bar.update,
                ).cpu()  # fmt: skip
        return top_of_scores(scores_QN, self.asked.k, self.languages)

    def projected(self) -> TopInfluences:
        """Influence from features, which stay in `out`/features."""
        per_checkpoint = sum(len(self.examples[split]) for split in SPLITS)
        with self._bar(per_checkpoint) as bar:
            stores = [self._collect(one, bar.update) for one in self.checkpoints]
        return top_influences(
            [store["query"].read() for store in stores],
            [store["train"].read() for store in stores],
            self.asked.k,
            self.languages,
            self.weights,
            self.normalize,
        )

    def predictions(self) -> list[int]:
        """The last checkpoint's predicted label of every query, under the mask."""
        model = self._load(self.checkpoints[-1])
        with masked(model, self.mask):
            return predict(model, self.examples["query"]).argmax(dim=1).tolist()

    def record(self, seconds: float) -> dict[str, Any]:
        """run.json."""
        arguments = asdict(self.asked) | {"checkpoints": [str(c.path) for c in self.checkpoints]}
        return {
            "arguments": {
                name: str(value) if isinstance(value, Path) else value
                for name, value in arguments.items()
            },
            "weights": self.weights,
            "label_names": self.label_names,
            "versions": versions(),
            "device": self.device,
            "seconds": round(seconds, 3),
        }

    def _collect(
        self, checkpoint: Checkpoint, advance: Callable[[int], Any]
    ) -> dict[str, FeatureStore]:
        model = self._load(checkpoint)
        identity = self._identity(model_digest(model))
        stores = {}
        with frozen(model), masked(model, self.mask):
            collector = Collector(
                model, self.projection, self.asked.parameters, self.asked.batch_tokens
            )
            for split in SPLITS:
                folder = self.asked.out / "features" / f"checkpoint-{checkpoint.epoch}" / split
                data = file_sha256(getattr(self.asked, split))
                with FeatureStore.create(
                    folder,
                    ids=self.tables[split].column("id").to_pylist(),
                    dim=self.projection.dim,
                    identity=identity | {"data": data},
                ) as store:
                    collect_to_store(collector, self.examples[split], store, advance)
                stores[split] = store
        return stores

    def _identity(self, digest: str) -> dict[str, Any]:
        return feature_identity(
            self.projection,
            self.asked.parameters,
            self.mask,
            "float32",
            model=digest,
            tokenizer=self.tokenizer_digest,
            max_length=str(self.max_length),
            batch_tokens=str(self.asked.batch_tokens),
        )

    def _load(self, checkpoint: Checkpoint) -> PreTrainedModel:
        model = load_classifier(checkpoint.path)
        if class_names(model) != self.label_names:
            raise ValueError(
                f"{checkpoint.path}: expected the classes of {self.asked.model}, "
                f"{', '.join(self.label_names)}, got {', '.join(class_names(model))}"
            )
        return to_device(model, self.device)

    def _encode(self, tokenizer: PreTrainedTokenizerBase, split: str) -> list[dict[str, Any]]:
        num_labels = len(self.label_names)
        return encode(tokenizer, self.tables[split], self.max_length, num_labels=num_labels)

    def _bar(self, per_checkpoint: int) -> Any:
        total = per_checkpoint * len(self.checkpoints)
        return tqdm(total=total, desc="attribute", unit="example", disable=None)


def _checkpoints(asked: Attribution) -> list[Checkpoint]:
    if not asked.checkpoints:
        return [Checkpoint(Path(asked.model), epoch=1, step=0, learning_rate=1.0)]
    checkpoints = load_checkpoints(asked.checkpoints)
    epochs = [checkpoint.epoch for checkpoint in checkpoints]
    if len(set(epochs)) < len(epochs):
        raise ValueError(f"--checkpoint: expected distinct epochs, got {epochs}")
    return checkpoints


def _weights(checkpoints: Sequence[Checkpoint]) -> list[float]:
    """Learning rates; 1 each where no checkpoint has one."""
    rates = [checkpoint.learning_rate for checkpoint in checkpoints]
    if all(rate is None for rate in rates):
        return [1.0] * len(rates)
    for checkpoint in checkpoints:
        if checkpoint.learning_rate is None:
            raise ValueError(
                f"{checkpoint.path}: expected a learning rate, as the other checkpoints have, in "
                f"tracmod.json or trainer_state.json, found none"
            )
    return [float(rate) for rate in rates if rate is not None]
