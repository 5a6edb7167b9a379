"""Influence on any model's predictions, from the user's own files: `tracmod attribute`."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tracmod.capture import frozen
from tracmod.durable import file_sha256, write_checksums, write_json
from tracmod.exact_scores import read_scores, write_scores
from tracmod.features import Collector, Projection, collect_to_store, feature_identity, masked
from tracmod.heads import HeadMask
from tracmod.influence import (
    NotFiniteError,
    TopInfluences,
    exact_influence,
    top_influences,
    top_of_scores,
)
from tracmod.model import (
    Checkpoint,
    check_checkpoint,
    checkpoint_folders,
    class_names,
    encode,
    has_tokenizer,
    load_checkpoints,
    load_classifier,
    load_model,
    model_digest,
    predict,
    resolve_device,
    to_device,
    tokenizer_digest,
)
from tracmod.run_folder import versions
from tracmod.store import FeatureStore
from tracmod.tables import InfluenceTables
from tracmod.tasks.files import read_model_files

SPLITS = ("train", "query")


@dataclass(frozen=True)
class Attribution:
    """What `attribute` is asked to do.

    Attributes:
        model: transformers folder with its tokenizer, or a Hub name (see `given_checkpoints`).
        train, query: example files (`id, language, text_a, text_b, label, group`).
        out: folder for the results.
        checkpoints: folders saved during training, in their order; none: the model itself, with
            weight 1.
        k: proponents and opponents kept per query; lowered to the number of training examples.
        exact: whole gradients instead of projected features.
        projection_dim: numbers per feature row.
        normalize: None or "cosine".
        head_mask: JSON file of a mask, applied to both gradients.
        parameters: as in `collect_features`.
        seed: of the projection and of the bootstrap.
        max_length: tokens; None for what the model takes, at most 512.
        batch_tokens: bound on the tokens of a batch.
        device: cpu, cuda, ...; None or "auto": a GPU if there is one.
        dtype: of the pass, float32 or bfloat16 (faster; scores agree to about three digits).
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
    dtype: str = "float32"


def given_checkpoints(
    model: str | None, checkpoints: Sequence[Path], folder: Path | None
) -> tuple[str, Sequence[Path]]:
    """The model and the checkpoints of an attribution, where one may stand for the other.

    Args:
        model: as in `Attribution`; None: the last checkpoint.
        checkpoints: as in `Attribution`.
        folder: of a training, in place of `checkpoints`: every checkpoint-<number>/ in it, in order
            of the numbers.

    Raises:
        ValueError: nothing is given or too much, no checkpoint in the folder, or no model and no
            tokenizer in the last checkpoint.
    """
    if folder is not None:
        if checkpoints:
            raise ValueError("expected --checkpoint or --checkpoints, got both")
        checkpoints = checkpoint_folders(folder)
    if model is not None:
        return model, checkpoints
    if not checkpoints:
        raise ValueError("expected --model, --checkpoint or --checkpoints, got none of them")
    last = checkpoints[-1]
    if not has_tokenizer(last):
        raise ValueError(
            f"{last}: expected a tokenizer in the last checkpoint, found none; give --model, a "
            f"folder with the model and its tokenizer"
        )
    return str(last), checkpoints


def attribute(asked: Attribution) -> None:
    """Write top, languages and examples.parquet, run.json and features/ or exact/ into `out`.

    Started again with the same arguments it goes on where it was: neither whole shards of features
    nor a checkpoint's exact scores are made twice.

    `test_prediction` in examples.parquet is the last checkpoint's; of a model with one output, its
    output rounded to a whole number.

    Raises:
        ValueError: bad files, labels outside the model's range, a mask of another shape, a device
            that is not there, checkpoints of another model or some with a learning rate and some
            without, or an `out` that holds what was made with other arguments.
        OSError: `out` cannot be written.
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
        for name, value in (("k", asked.k), ("batch_tokens", asked.batch_tokens)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        self.device = resolve_device(asked.device)
        _check_out(asked.out, asked.exact)
        self.projection = Projection(asked.projection_dim, seed=asked.seed)
        self.mask = None if asked.head_mask is None else HeadMask.load(asked.head_mask)
        self.checkpoints = _checkpoints(asked)
        self.weights = _weights(self.checkpoints)
        model, tokenizer = load_model(asked.model)
        with masked(model, self.mask):  # a mask of another shape is refused here
            pass
        for path in asked.checkpoints:
            check_checkpoint(path, model.config)
        self.tokenizer_digest = tokenizer_digest(tokenizer)
        self.label_names = class_names(model)
        longest = min(512, tokenizer.model_max_length)
        self.max_length = longest if asked.max_length is None else asked.max_length
        files = [getattr(asked, split) for split in SPLITS]
        self.tables = dict(zip(SPLITS, read_model_files(files, self.label_names), strict=True))
        self.examples = {split: self._encode(tokenizer, split) for split in SPLITS}

    @property
    def languages(self) -> list[str]:
        """The training examples' languages."""
        return self.tables["train"].column("language").to_pylist()

    def exact(self) -> TopInfluences:
        """Influence from whole gradients; every checkpoint's scores stay in `out`/exact."""
        scores_QN = torch.zeros(len(self.examples["query"]), len(self.examples["train"]))
        with self._bar(len(self.examples["train"])) as bar:
            for checkpoint, weight in zip(self.checkpoints, self.weights, strict=True):
                scores_QN += weight * self._exact_scores(checkpoint, bar.update)
        return top_of_scores(scores_QN, self.asked.k, self.languages)

    def projected(self) -> TopInfluences:
        """Influence from features, which stay in `out`/features."""
        per_checkpoint = sum(len(self.examples[split]) for split in SPLITS)
        with self._bar(per_checkpoint) as bar:
            stores = [self._collect(one, bar.update) for one in self.checkpoints]
        return top_influences(
            [store["query"].read().to(self.device) for store in stores],
            [store["train"].read().to(self.device) for store in stores],
            self.asked.k,
            self.languages,
            self.weights,
            self.asked.normalize,
        )

    def predictions(self) -> list[int]:
        """The last checkpoint's predicted label of every query, under the mask."""
        model = self._load(self.checkpoints[-1])
        with masked(model, self.mask):
            logits_QC = predict(model, self.examples["query"], batch_tokens=self.asked.batch_tokens)
        if logits_QC.shape[1] == 1:
            return logits_QC[:, 0].round().long().tolist()
        return logits_QC.argmax(dim=1).tolist()

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

    def _exact_scores(self, checkpoint: Checkpoint, advance: Callable[[int], Any]) -> Tensor:
        """(Q, N) scores of one checkpoint, unweighted: read where they are there, else made."""
        file = self.asked.out / "exact" / f"checkpoint-{checkpoint.epoch}.safetensors"
        model = self._load(checkpoint)
        identity = {
            "parameters": self.asked.parameters,
            "head_mask": None if self.mask is None else self.mask.digest(),
            "normalize": self.asked.normalize,
            "pass_dtype": self.asked.dtype,
            **{split: self._data_digest(split) for split in SPLITS},
            **self._digests(model),
        }
        scores_QN = read_scores(file, identity)
        if scores_QN is not None:
            advance(scores_QN.shape[1])
            return scores_QN
        try:
            scores_QN = exact_influence(
                model,
                self.examples["train"],
                self.examples["query"],
                self.asked.parameters,
                self.mask,
                self.asked.normalize,
                self.asked.batch_tokens,
                advance=advance,
                dtype=getattr(torch, self.asked.dtype),
            ).cpu()
        except NotFiniteError as error:
            name = self.tables[error.split].column("id")[error.row].as_py()
            raise ValueError(
                f"{error.split} example {name!r}: expected a finite gradient, got NaN or infinity"
            ) from None
        write_scores(file, scores_QN, identity)
        return scores_QN

    def _collect(
        self, checkpoint: Checkpoint, advance: Callable[[int], Any]
    ) -> dict[str, FeatureStore]:
        model = self._load(checkpoint)
        identity = feature_identity(
            self.projection,
            self.asked.parameters,
            self.mask,
            self.asked.dtype,
            **self._digests(model),
        )
        stores = {}
        with frozen(model):
            collector = Collector(
                model,
                self.projection,
                self.asked.parameters,
                self.asked.batch_tokens,
                getattr(torch, self.asked.dtype),
                self.mask,
            )
            for split in SPLITS:
                folder = self.asked.out / "features" / f"checkpoint-{checkpoint.epoch}" / split
                with FeatureStore.create(
                    folder,
                    ids=self.tables[split].column("id").to_pylist(),
                    dim=self.projection.dim,
                    identity=identity | {"data": self._data_digest(split)},
                ) as store:
                    collect_to_store(collector, self.examples[split], store, advance)
                stores[split] = store
        return stores

    def _data_digest(self, split: str) -> str:
        return file_sha256(getattr(self.asked, split))

    def _digests(self, model: PreTrainedModel) -> dict[str, str]:
        return {
            "model": model_digest(model),
            "tokenizer": self.tokenizer_digest,
            "max_length": str(self.max_length),
            "batch_tokens": str(self.asked.batch_tokens),
        }

    def _load(self, checkpoint: Checkpoint) -> PreTrainedModel:
        return to_device(load_classifier(checkpoint.path), self.device)

    def _encode(self, tokenizer: PreTrainedTokenizerBase, split: str) -> list[dict[str, Any]]:
        num_labels = len(self.label_names)
        return encode(tokenizer, self.tables[split], self.max_length, num_labels=num_labels)

    def _bar(self, per_checkpoint: int) -> Any:
        total = per_checkpoint * len(self.checkpoints)
        return tqdm(total=total, desc="attribute", unit="example", disable=None)


def _check_out(out: Path, exact: bool) -> None:
    """Refuse a folder that cannot be written or holds results of the other kind; makes nothing."""
    there = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"out {out}: expected a folder, {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "cannot be written", str(there))
    other, way = ("features", "without") if exact else ("exact", "with")
    if (out / other).exists():
        raise ValueError(
            f"out {out}: holds {other}/ of an attribution {way} --exact; take another folder or "
            f"remove this one"
        )


def _checkpoints(asked: Attribution) -> list[Checkpoint]:
    """In the order given, `epoch` the place: a Trainer saves at fractions of epochs too."""
    if not asked.checkpoints:
        return [Checkpoint(Path(asked.model), epoch=1, step=0, learning_rate=1.0)]
    loaded = load_checkpoints(asked.checkpoints)
    return [replace(checkpoint, epoch=place) for place, checkpoint in enumerate(loaded, 1)]


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
