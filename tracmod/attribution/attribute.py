"""Influence on any model's predictions, from the user's own files: `tracmod attribute`."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from tracmod.analysis.influence_tables import InfluenceTables, self_influence_table
from tracmod.attribution.options import AttributionOptions
from tracmod.features.collector import (
    Collector,
    collect_features,
    collect_to_store,
    feature_identity,
)
from tracmod.features.projection import Projection
from tracmod.features.store import SHARD_ROWS, FeatureStore
from tracmod.files.durable import (
    file_sha256,
    identity_differences,
    read_json,
    write_checksums,
    write_json,
    write_parquet,
)
from tracmod.files.tensor_cache import read_tensors, write_tensors
from tracmod.files.versions import versions
from tracmod.gradients.ekfac import checkpoint_preconditioner
from tracmod.gradients.preconditioner import Preconditioner
from tracmod.influence.exact import NotFiniteError, exact_influence
from tracmod.influence.scores import (
    TopInfluences,
    influence_scores,
    self_influence,
    top_influences,
    top_of_scores,
)
from tracmod.influence.streaming import Sizes, check_memory
from tracmod.models.checkpoints import (
    Checkpoint,
    check_checkpoint,
    checkpoint_folders,
    load_checkpoints,
    load_second_moment,
)
from tracmod.models.digests import model_digest, tokenizer_digest
from tracmod.models.inputs import encode, predict
from tracmod.models.loading import class_names, has_tokenizer, load_classifier, load_model
from tracmod.models.modes import frozen, resolve_device, to_device
from tracmod.subnetworks.head_mask import HeadMask, masked
from tracmod.tasks.examples import rows_digest
from tracmod.tasks.files import read_model_files
from tracmod.validation.fidelity import (
    CHOICE_QUERIES,
    CHOICE_TRAINS,
    DIMS,
    Sample,
    Terms,
    certify,
    choose_dim,
    describe_choice,
    draw_sample,
    exact_sample_scores,
    failure,
    over_checkpoints,
    projected_sample_scores,
)

SPLITS = ("train", "query")
PROGRESS = "progress"


def given_checkpoints(
    model: str | None, checkpoints: Sequence[Path], folder: Path | None
) -> tuple[str, Sequence[Path]]:
    """The model and the checkpoints of an attribution, where one may stand for the other.

    Args:
        model: as in `AttributionOptions`; None: the last checkpoint.
        checkpoints: as in `AttributionOptions`.
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


def attribute(asked: AttributionOptions) -> None:
    """Write top, languages and examples.parquet, run.json and features/ or exact/ into `out`.

    Of features, self_influence.parquet and fidelity.json too.

    Started again with the same arguments it goes on where it was: neither whole shards of features
    nor a checkpoint's exact scores are made twice. Where examples were added at the end of a file
    since, only their features are collected; any other change of the examples is refused.

    `test_prediction` in examples.parquet is the last checkpoint's; of a model with one output, its
    output rounded to a whole number.

    Raises:
        ValueError: bad files, labels outside the model's range, a mask of another shape, a device
            that is not there, checkpoints of another model or some with a learning rate and some
            without, or an `out` that holds what was made with other arguments.
        OSError: `out` cannot be written.
    """
    started = time.perf_counter()
    _check_out(asked.out, asked.exact)
    work = Work(asked)
    work.examples  # noqa: B018 (read and checked before the long part begins)
    top = work.exact() if asked.exact else work.projected()
    tables = InfluenceTables(work.tables["train"], work.tables["query"], work.predictions())
    tables.add(list(range(len(work.tables["query"]))), top)
    tables.write(asked.out, bootstrap=1000, confidence=0.95, seed=asked.seed)
    write_json(asked.out / "run.json", work.record(time.perf_counter() - started))
    shutil.rmtree(asked.out / PROGRESS, ignore_errors=True)
    write_checksums(asked.out)


def read_attribution(out: Path) -> AttributionOptions:
    """What the attribution in a folder was asked to do; of its checkpoints, those it used.

    Raises:
        ValueError: no finished attribution there.
    """
    file = out / "run.json"
    record = read_json(file) if file.is_file() else None
    if not isinstance(record, dict) or "arguments" not in record:
        raise ValueError(f"{out}: expected a folder of `tracmod attribute`, finished")
    arguments = record["arguments"]
    paths = {name: Path(arguments[name]) for name in ("train", "query")}
    mask = arguments["head_mask"]
    return AttributionOptions(
        **arguments
        | paths
        | {
            "out": out,
            "head_mask": None if mask is None else Path(mask),
            "checkpoints": [Path(path) for path in arguments["checkpoints"]],
        }
    )


class Work:
    """What `attribute` works with, checked; the examples are read at their first use."""

    def __init__(self, asked: AttributionOptions) -> None:
        self.asked = asked
        for name, value in (("k", asked.k), ("batch_tokens", asked.batch_tokens)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        self.device = resolve_device(asked.device)
        self.projection = Projection(asked.projection_dim or max(DIMS), seed=asked.seed)
        self.choice: dict[str, Any] | None = None
        self.fidelity: dict[str, Any] | None = None
        self._metrics: dict[int, Preconditioner] = {}  # by checkpoint, the last one's
        self.mask = None if asked.head_mask is None else HeadMask.load(asked.head_mask)
        self.checkpoints = _checkpoints(asked)
        self.weights = _weights(self.checkpoints)
        model, tokenizer = load_model(asked.model)
        with masked(model, self.mask):  # a mask of another shape is refused here
            pass
        for path in asked.checkpoints:
            check_checkpoint(path, model.config)
        if asked.preconditioner == "adam":
            for one in self.checkpoints:
                load_second_moment(one.path)
        self.tokenizer = tokenizer
        self.tokenizer_digest = tokenizer_digest(tokenizer)
        self.label_names = class_names(model)
        longest = min(512, tokenizer.model_max_length)
        self.max_length = longest if asked.max_length is None else asked.max_length

    @cached_property
    def tables(self) -> dict[str, pa.Table]:
        """Both files' examples; one decides about the other whether labels are names or numbers."""
        files = [getattr(self.asked, split) for split in SPLITS]
        return dict(zip(SPLITS, read_model_files(files, self.label_names), strict=True))

    @cached_property
    def examples(self) -> dict[str, list[dict[str, Any]]]:
        """Both files' examples, encoded."""
        return {split: self.encode(table) for split, table in self.tables.items()}

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
        if self.asked.projection_dim is None:
            self._choose_projection_dim()
        self._check_memory()
        per_checkpoint = sum(len(self.examples[split]) for split in SPLITS)
        with self._bar(per_checkpoint) as bar:
            stores = [self._collect(one, bar.update) for one in self.checkpoints]
        trains = [store["train"] for store in stores]
        self._write_self_influence(trains)
        self._certify([store["query"] for store in stores], trains)
        scores = len(self.tables["query"]) * len(self.tables["train"])
        with tqdm(
            total=scores, desc="influence", unit="score", unit_scale=True, disable=None
        ) as bar:
            return top_influences(
                [store["query"] for store in stores],
                trains,
                self.asked.k,
                self.languages,
                self.weights,
                self.asked.normalize,
                memory=self.asked.memory,
                progress=self.asked.out / PROGRESS,
                device=self.device,
                advance=bar.update,
            )

    def _check_memory(self) -> None:
        asked, query, train = self.asked, *(len(self.tables[split]) for split in ("query", "train"))
        row_bytes = 4 * self.projection.dim * len(self.checkpoints)
        k, groups = min(asked.k, train), len(set(self.languages))
        check_memory(Sizes.of_stores(query, train, row_bytes, k, groups, SHARD_ROWS), asked.memory)

    def _write_self_influence(self, trains: Sequence[FeatureStore]) -> None:
        table = self_influence_table(self.tables["train"], self_influence(trains, self.weights))
        write_parquet(self.asked.out / "self_influence.parquet", table)

    def _choose_projection_dim(self) -> None:
        """Project to what a sample asks for; the choice stays in `out`, so that it is kept to."""
        file, share_error = self.asked.out / "projection.json", self.asked.share_error
        self.choice = read_json(file) if file.is_file() else None
        chosen_for = self._choice_identity()
        if self.choice is None:
            sample = self._sample(None, CHOICE_QUERIES, CHOICE_TRAINS)
            certificate = partial(self._certificate, sample, self._exact_of_sample(sample))
            self.choice = choose_dim(partial(self._scores_at, sample), certificate, share_error)
            self.choice |= {"chosen_for": chosen_for}
            write_json(file, self.choice)
        differing = identity_differences(chosen_for, self.choice.get("chosen_for", {}))
        if differing:
            raise ValueError(
                f"{file}: this projection was chosen for something else: {'; '.join(differing)}; "
                f"take another folder or remove this one"
            )
        self.projection = replace(self.projection, dim=self.choice["projection_dim"])
        tqdm.write(f"tracmod: {describe_choice(self.choice)}", file=sys.stderr)

    def _choice_identity(self) -> dict[str, Any]:
        """What a choice of the projection holds for; of the data that there may be more later."""
        return {
            "share_error": self.asked.share_error,
            "parameters": self.asked.parameters,
            "head_mask": None if self.mask is None else self.mask.digest(),
            "normalize": self.asked.normalize,
            "weights": self.weights,
            "checkpoints": [self._digests(one, self.load(one)) for one in self.checkpoints],
        }

    def _certify(self, queries: Sequence[FeatureStore], trains: Sequence[FeatureStore]) -> None:
        """`out`/fidelity.json: scores of stored features beside exact ones, on a sample."""
        sample = self._sample(sum(len(table) for table in self.tables.values()))
        projected_QN = projected_sample_scores(
            sample, queries, trains, self.weights, self.asked.normalize
        )
        self.fidelity = self._certificate(sample, self._exact_of_sample(sample), projected_QN)
        write_json(self.asked.out / "fidelity.json", self.fidelity)
        if text := failure(self.fidelity, "these features"):
            tqdm.write(f"tracmod: WARNING: {text}", file=sys.stderr)

    def _sample(self, passes: int | None, *most: int) -> Sample:
        query_languages = self.tables["query"].column("language").to_pylist()
        return draw_sample(
            query_languages, len(self.tables["train"]), passes, self.asked.seed, *most
        )

    def _certificate(
        self, sample: Sample, exact_QN: Tensor, projected_QN: Tensor
    ) -> dict[str, Any]:
        query, train = (
            self.tables[split].column("language").take(rows).to_pylist()
            for split, rows in (("query", sample.queries), ("train", sample.trains))
        )
        terms = Terms(self.asked.k, len(self.tables["train"]), seed=self.asked.seed)
        return certify(exact_QN, projected_QN, query, train, terms)

    def _sampled(self, sample: Sample) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The sample's queries and training examples, encoded."""
        return (
            [self.examples["query"][row] for row in sample.queries],
            [self.examples["train"][row] for row in sample.trains],
        )

    def _exact_of_sample(self, sample: Sample) -> Tensor:
        """(Q, N) exact scores over all checkpoints; each checkpoint's kept between two tries."""
        scores = []
        for checkpoint in self.checkpoints:
            model = self.load(checkpoint)
            with self._named({"query": sample.queries, "train": sample.trains}):
                exact_QN = exact_sample_scores(
                    model,
                    *self._sampled(sample),
                    parameters=self.asked.parameters,
                    head_mask=self.mask,
                    normalize=self.asked.normalize,
                    dtype=self.asked.dtype,
                    batch_tokens=self.asked.batch_tokens,
                    keep_in=self.asked.out / PROGRESS,
                    identity=self._exact_identity(checkpoint, model) | {"sample": asdict(sample)},
                    preconditioner=self._preconditioner(checkpoint, model),
                )
            scores.append(exact_QN)
        return over_checkpoints(scores, self.weights)

    def _scores_at(self, sample: Sample, dim: int) -> Tensor:
        """(Q, N) scores over all checkpoints from features of so many numbers."""
        scores = []
        for checkpoint in self.checkpoints:
            model = self.load(checkpoint)
            metric = self._preconditioner(checkpoint, model)
            queries, trains = (
                collect_features(
                    model,
                    examples,
                    replace(self.projection, dim=dim),
                    self.asked.parameters,
                    self.mask,
                    self.asked.batch_tokens,
                    dtype=getattr(torch, self.asked.dtype),
                    preconditioner=metric,
                )
                for examples in self._sampled(sample)
            )
            scores.append(influence_scores(queries, trains, None, self.asked.normalize).cpu())
        return over_checkpoints(scores, self.weights)

    def predictions(self) -> list[int]:
        """The last checkpoint's predicted label of every query, under the mask."""
        model = self.load(self.checkpoints[-1])
        with masked(model, self.mask):
            logits_QC = predict(model, self.examples["query"], batch_tokens=self.asked.batch_tokens)
        if logits_QC.shape[1] == 1:
            return logits_QC[:, 0].round().long().tolist()
        return logits_QC.argmax(dim=1).tolist()

    def record(self, seconds: float) -> dict[str, Any]:
        """run.json; paths are absolute, so that the folder answers queries from anywhere."""
        arguments = asdict(self.asked)
        for name in ("model", "train", "query", "out", "head_mask"):
            if arguments[name] is not None:
                arguments[name] = _absolute(arguments[name])
        arguments["checkpoints"] = [_absolute(one.path) for one in self.checkpoints]
        arguments["projection_dim"] = self.projection.dim
        return {
            "arguments": arguments,
            "projection_choice": self.choice,
            "fidelity": self.fidelity,
            "weights": self.weights,
            "label_names": self.label_names,
            "versions": versions(),
            "device": self.device,
            "seconds": round(seconds, 3),
        }

    def _exact_scores(self, checkpoint: Checkpoint, advance: Callable[[int], Any]) -> Tensor:
        """(Q, N) scores of one checkpoint, unweighted: read where they are there, else made."""
        file = self.asked.out / "exact" / f"checkpoint-{checkpoint.epoch}.safetensors"
        model = self.load(checkpoint)
        identity = self._exact_identity(checkpoint, model)
        kept = read_tensors(file, identity)
        if kept is not None:
            advance(kept["scores"].shape[1])
            return kept["scores"]
        with self._named({split: range(len(self.tables[split])) for split in SPLITS}):
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
                preconditioner=self._preconditioner(checkpoint, model),
            ).cpu()
        write_tensors(file, {"scores": scores_QN}, identity)
        return scores_QN

    @contextmanager
    def _named(self, rows: Mapping[str, Sequence[int]]) -> Iterator[None]:
        """Name the example whose gradient is not finite; `rows` of each table were worked on."""
        try:
            yield
        except NotFiniteError as error:
            name = self.tables[error.split].column("id")[rows[error.split][error.row]].as_py()
            raise ValueError(
                f"{error.split} example {name!r}: expected a finite gradient, got NaN or infinity"
            ) from None

    def _exact_identity(self, checkpoint: Checkpoint, model: PreTrainedModel) -> dict[str, Any]:
        """What exact scores depend on."""
        return {
            "parameters": self.asked.parameters,
            "head_mask": None if self.mask is None else self.mask.digest(),
            "normalize": self.asked.normalize,
            "pass_dtype": self.asked.dtype,
            **{split: self._data_digest(split) for split in SPLITS},
            **self._digests(checkpoint, model),
        }

    def _collect(
        self, checkpoint: Checkpoint, advance: Callable[[int], Any]
    ) -> dict[str, FeatureStore]:
        model = self.load(checkpoint)
        identity = self._identity(checkpoint, model)
        collector = self.collector(checkpoint, model)
        stores = {}
        with frozen(model):
            for split in SPLITS:
                table = self.tables[split]
                with FeatureStore.grow(
                    self.store_path(checkpoint, split),
                    ids=table.column("id").to_pylist(),
                    data=partial(rows_digest, table),
                    dim=self.projection.dim,
                    identity=identity,
                    dtype=self.asked.store_dtype,
                ) as store:
                    collect_to_store(collector, self.examples[split], store, advance)
                stores[split] = store
        return stores

    def open_train_store(self, checkpoint: Checkpoint, model: PreTrainedModel) -> FeatureStore:
        """The training examples' features at a checkpoint, made before.

        Raises:
            ValueError: made with another model, tokenizer, mask, data or projection than there are
                now.
        """
        table = self.tables["train"]
        path = self.store_path(checkpoint, "train")
        identity = self._identity(checkpoint, model)
        store = FeatureStore.open(path, identity, partial(rows_digest, table))
        if len(store) != len(table):
            raise ValueError(
                f"{self.asked.train} has {len(table)} examples, {path} features of {len(store)}: "
                "run the attribution again"
            )
        return store

    def collector(self, checkpoint: Checkpoint, model: PreTrainedModel) -> Collector:
        """What turns examples into features."""
        return Collector(
            model,
            self.projection,
            self.asked.parameters,
            self.asked.batch_tokens,
            getattr(torch, self.asked.dtype),
            self.mask,
            self._preconditioner(checkpoint, model),
        )

    def _preconditioner(
        self, checkpoint: Checkpoint, model: PreTrainedModel
    ) -> Preconditioner | None:
        """A checkpoint's; one that was fitted stays as it is when training data is added."""
        kind, place = self.asked.preconditioner, checkpoint.epoch
        if kind == "none":
            return None
        if place not in self._metrics:
            folder, identity = self.asked.out / "preconditioners", self._model_digests(model)
            if kind == "ekfac":
                identity["data"] = self._fitted_on(folder)
            metric = checkpoint_preconditioner(
                kind,
                model,
                checkpoint.path,
                lambda: self.examples["train"],
                parameters=self.asked.parameters,
                batch_tokens=self.asked.batch_tokens,
                keep_in=folder / f"checkpoint-{place}.safetensors",
                identity=identity,
            )
            self._metrics = {place: metric}  # each is as large as several models
        return self._metrics[place]

    def _fitted_on(self, folder: Path) -> str:
        """Digest of the training examples that were there first, of which these are the first."""
        file, table = folder / "fitted-on.json", self.tables["train"]
        if not file.is_file():
            write_json(file, {"rows": len(table), "digest": rows_digest(table, 0, len(table))})
        first = read_json(file)
        if rows_digest(table, 0, first["rows"]) != first["digest"]:
            raise ValueError(
                f"{folder}: fitted on other training examples than {self.asked.train} begins with; "
                f"take another --out or remove this one"
            )
        return str(first["digest"])

    def _identity(self, checkpoint: Checkpoint, model: PreTrainedModel) -> dict[str, Any]:
        """What features depend on beside the examples."""
        return feature_identity(
            self.projection,
            self.asked.parameters,
            self.mask,
            self.asked.dtype,
            **self._digests(checkpoint, model),
        )

    def store_path(self, checkpoint: Checkpoint, split: str) -> Path:
        """Where the features of a split at a checkpoint lie."""
        return self.asked.out / "features" / f"checkpoint-{checkpoint.epoch}" / split

    def _data_digest(self, split: str) -> str:
        return file_sha256(getattr(self.asked, split))

    def _digests(self, checkpoint: Checkpoint, model: PreTrainedModel) -> dict[str, str]:
        metric, digests = self._preconditioner(checkpoint, model), self._model_digests(model)
        return digests if metric is None else {**digests, "preconditioner": metric.digest}

    def _model_digests(self, model: PreTrainedModel) -> dict[str, str]:
        return {
            "model": model_digest(model),
            "tokenizer": self.tokenizer_digest,
            "max_length": str(self.max_length),
            "batch_tokens": str(self.asked.batch_tokens),
        }

    def load(self, checkpoint: Checkpoint) -> PreTrainedModel:
        """A checkpoint's model, on the device."""
        return to_device(load_classifier(checkpoint.path), self.device)

    def encode(self, table: pa.Table) -> list[dict[str, Any]]:
        """Examples as the model takes them."""
        num_labels = len(self.label_names)
        return encode(self.tokenizer, table, self.max_length, num_labels=num_labels)

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


def _absolute(path: str | Path) -> str:
    """The path from the root; a name on the Hub as it is."""
    return str(Path(path).absolute() if Path(path).exists() else path)


def _checkpoints(asked: AttributionOptions) -> list[Checkpoint]:
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
