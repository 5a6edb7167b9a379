"""Influence on a new example, from stored training features and, if built, their index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from tracmod.attribution.sources import AttributionSource, RunSource, Source
from tracmod.choices import switch, whole_number
from tracmod.features.rows import SomeRows, StoreRows
from tracmod.features.store import FeatureStore
from tracmod.files import progress
from tracmod.files.durable import read_json
from tracmod.influence.scores import TopInfluences, top_influences
from tracmod.models.inputs import encode, labelled_words, num_cut, tags_of_words
from tracmod.models.language_adapters import has_language_adapters, with_language_ids
from tracmod.models.modes import frozen
from tracmod.models.plain_pass import predict, predict_tokens
from tracmod.models.questions import best_answers
from tracmod.subnetworks.head_mask import masked
from tracmod.tasks.files import target_of, target_text
from tracmod.tasks.label_vectors import NO_LABEL, label_vector_text
from tracmod.tasks.readers import text_fault
from tracmod.tasks.tag_scores import UNTAGGED
from tracmod.tasks.token_files import NO_TAG

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tracmod.influence.index import InfluenceIndex

# A class, a target, a number per output, a tag per word, or the text of an answer.
Label = int | float | list[float] | str

NO_ANSWER = "(no answer)"
TINY = 1e-300  # below every norm of float32 numbers that is not 0
# An inexact index returns this many candidates per example wanted, and at least so many in all;
# exact scores decide among them.
CANDIDATES, LEAST_CANDIDATES = 4, 100


class Attributor:
    """The models and training features of one folder, kept open to explain many examples.

    The checkpoints stay in memory. The features stay on disk: they are read in blocks, or an index
    (`tracmod index`) selects the rows to read. Scores are made as the folder's own results are,
    with the same projection, mask, weights and normalization; an inexact index only selects
    candidates.

    Examples:
        >>> attributor = tm.Attributor("runs/demo")
        >>> answer = attributor.query("The king is waiting.", "The king is not waiting.", k=3)
        >>> answer["label"] == answer["prediction"]
        True
        >>> len(answer["proponents"])
        3
    """

    def __init__(
        self,
        folder: str | Path,
        model: str = "full",
        view: str = "full",
        mask: str | None = None,
        *,
        columns: Mapping[str, str] | None = None,
    ) -> None:
        """Open a run folder or a folder of `tracmod attribute`.

        Args:
            folder: A run folder with the stage `collect` done, or a finished attribution without
                --exact whose model, checkpoints and example files are still where they were.
            model: For a run, `full` or `sparse`.
            view: For a run, a view with features of its own, such as `full`, `subnetwork`,
                `random-<i>` or `other-<language>`.
            mask: The language whose mask is applied, for views with one mask per language.
            columns: For an attribution, names of columns that its example files have been given
                since; those of the attribution itself are in its run.json.

        Raises:
            ValueError: There is no such folder, view or mask, it has no features, or columns are
                given for a run folder.
        """
        folder = Path(folder)
        file = folder / "run.json"
        record = read_json(file) if file.is_file() else {}
        self.source: Source
        if isinstance(record, dict) and "arguments" in record:
            self.source = AttributionSource(folder, record["weights"], (model, view, mask), columns)
        elif columns:
            raise ValueError(f"columns: expected none for a run folder, {folder}, got {columns}")
        else:
            self.source = RunSource(folder, model, view, mask)

    def under(self, view: str, mask: str | None = None) -> Attributor:
        """Return an attributor for the same model under another view; checkpoints are shared.

        Args:
            view, mask: As for the class.

        Raises:
            ValueError: As for the class.
        """
        other = object.__new__(Attributor)
        other.source = self.source.under(view, mask)
        return other

    @property
    def views(self) -> list[tuple[str, str | None]]:
        """Every view that can be queried, and the language of its mask if it has several."""
        return self.source.views

    @property
    def index_path(self) -> Path:
        """The folder of the FAISS index of these features."""
        return self.source.index_path

    def build_index(
        self,
        kind: str,
        *,
        recall: float = 0.95,
        memory: int = 4_000_000_000,
        device: str = "cpu",
    ) -> InfluenceIndex:
        """Build and save a FAISS index over the training examples' features.

        Args:
            kind, recall, memory, device: As in `InfluenceIndex.build`.

        Raises:
            ValueError: As there, or the features were made with another model, mask, data or
                projection than there is now.
        """
        # Not at the top: FAISS is loaded by those who use an index.
        from tracmod.influence.index import InfluenceIndex, gpu_number

        gpu_number(device, kind)  # refused before the models are read
        index = InfluenceIndex.build(
            self.train_stores,
            kind=kind,
            languages=self._languages.tolist(),
            weights=self.source.weights,
            normalize=self.source.normalize,
            queries=self.source.query_stores(),
            recall=recall,
            memory=memory,
            device=device,
        )
        index.save(self.index_path)
        return index

    def query(
        self,
        text_a: str,
        text_b: str | None = None,
        label: str | None = None,
        k: int = 10,
        languages: Sequence[str] | None = None,
        *,
        opponents: bool = True,
        by_word: bool = False,
        language: str | None = None,
    ) -> dict[str, Any]:
        """Find the strongest proponents and opponents of one example.

        Args:
            text_a, text_b: The texts. For a token classifier, `text_a` has the words of a sentence
                with spaces between them.
            label: The name of its label. For a model with several labels per text, names separated
                by commas; for a regression, a number per output; for a token classifier, a tag for
                each word, separated by spaces or commas, "_" for none. None stands for the
                prediction of the last checkpoint, which the answer then explains. The loss of an
                output for itself as the target has no gradient: for a regression, None stands for
                the output rounded to whole numbers.
            k: The number of proponents, and of opponents.
            languages: The languages whose training examples are considered; None for all.
            opponents: False to find proponents only; `opponents` is then empty.
            by_word: True to split the scores of a token classifier by the words of the sentence.
            language: The language of the texts, for a model with an adapter for each language
                (X-MOD). Others do not need it.

        Returns:
            A dict with `label`, `prediction`, `output` (for a regression, the output or outputs of
            the model, which `prediction` rounds; else None), `probabilities` (by label; None for a
            regression), `languages`, `index` (the kind of the index that selected candidates, or
            None), and `proponents` and `opponents`: lists of dicts with rank, score, id, language,
            label, text_a, text_b and group (of a token classifier, also tokens; of question
            answering, also answer and answer_start). A positive score
            means that the training example lowered the loss of the label. With `by_word`, each of
            them also has `word_scores`, a number for every word of the sentence (None for words
            without a tag and those that were cut off): the part of the score that comes from the
            loss of the word. The score is their sum.

        Raises:
            ValueError: There is no such label or language, `by_word` is True and the model
                classifies texts, or the features or the index were made
                with another model, mask, data or projection than there is now.
        """
        k, opponents = whole_number("k", k), switch("opponents", opponents)
        if switch("by_word", by_word) and self.source.loss_kind != "token_cross_entropy":
            raise ValueError("by_word: expected a token classifier, got a classifier of texts")
        for name, text in (("text", text_a), ("text_b", text_b), ("label", label)):
            fault = None if text is None else text_fault(text)
            if fault is not None:
                raise ValueError(f"{name} {fault}")
        if not text_a.strip():
            raise ValueError("text: expected a text, got an empty one")
        text_b = text_b if text_b and not text_b.isspace() else None  # as in files
        label_number = None if label is None else self._label_number(label)
        rows = self._rows_of(languages)
        table = self._table_of(text_a, text_b, label_number, language)
        prediction, probabilities = self._predict(table)
        output = None
        if self.source.loss_kind == "squared_error":
            output, prediction = prediction, _rounded(prediction)
        if label_number is None:
            label_number = prediction
            table = self._table_of(text_a, text_b, label_number, language)
        top, kind = self._nearest(self._features(table), k, rows, languages, opponents)
        sides = {
            "proponents": self._examples(top.indices[0], top.scores[0]),
            "opponents": self._examples(top.opponent_indices[0], top.opponent_scores[0]),
        }
        if by_word and isinstance(label_number, list):
            indices = torch.cat([top.indices[0], top.opponent_indices[0]])
            word_scores = self._word_scores(text_a, label_number, indices, language)
            for row, scores in zip(
                [row for s in sides.values() for row in s], word_scores, strict=True
            ):
                row["word_scores"] = scores
        return {
            "label": self.label_text(label_number),
            "prediction": self.label_text(prediction),
            "output": output,
            "probabilities": probabilities,
            "languages": None if languages is None else list(languages),
            "index": kind,
            **sides,
        }

    @property
    def needs_language(self) -> bool:
        """Whether the model has an adapter for each language: a query then needs its language."""
        config: Any = self.source.models[-1][0].config
        return has_language_adapters(config) and config.default_language is None

    def is_cut(self, text_a: str, text_b: str | None = None) -> bool:
        """Return whether an example has more tokens than the model is given."""
        table = self._table_of(text_a, text_b, None)
        tokenizer = self.source.models[-1][1]
        return num_cut(tokenizer, table, self.source.max_length) > 0

    @cached_property
    def train_stores(self) -> list[FeatureStore]:
        """(C,) feature stores, one per checkpoint, checked against what is there now."""
        return self.source.train_stores()

    @cached_property
    def _languages(self) -> np.ndarray:
        return np.array(self.source.train.column("language").to_pylist())

    def _rows_of(self, languages: Sequence[str] | None) -> Tensor:
        """Return the rows of the training examples of some languages, ascending."""
        if languages is None:
            return torch.arange(len(self._languages))
        known = np.unique(self._languages).tolist()
        unknown = sorted(set(languages) - set(known))
        if unknown or not languages:
            raise ValueError(
                f"language: expected some of {', '.join(known)}, got {', '.join(unknown) or 'none'}"
            )
        return torch.from_numpy(np.flatnonzero(np.isin(self._languages, list(languages))))

    # --- the example ------------------------------------------------------------------------

    def _table_of(
        self,
        text_a: str,
        text_b: str | None,
        label: Label | None,
        language: str | None = None,
    ) -> pa.Table:
        """Return a table of one example; without a label, it has one that stands for any."""
        columns = {
            "id": pa.array(["query"]),
            "text_a": pa.array([text_a]),
            "text_b": pa.array([text_b], pa.string()),
            "language": pa.array([language], pa.string()),
        }
        if self.source.loss_kind == "span_cross_entropy":
            answer = label if isinstance(label, str) else ""
            if text_b is None:
                raise ValueError("text_b: expected a context that has the answer, got none")
            start = text_b.find(answer) if answer else -1
            if answer and start < 0:
                raise ValueError(f"label: expected an answer in the context, got {answer!r}")
            span = {"answer": pa.array([answer]), "answer_start": pa.array([start])}
            return pa.table(columns | {"label": pa.array([0])} | span)
        if self.source.loss_kind != "token_cross_entropy":
            return pa.table(columns | {"label": pa.array([0 if label is None else label])})
        words = text_a.split()
        if text_b is not None:
            raise ValueError(f"text_b: expected none for a token classifier, got {text_b!r}")
        if isinstance(label, list) and len(label) != len(words):
            raise ValueError(
                f"label: expected a tag for each of {len(words)} words, got {len(label)}"
            )
        tags = [int(tag) for tag in label] if isinstance(label, list) else [0] * len(words)
        words_and_tags = {"tokens": pa.array([words]), "tags": pa.array([tags])}
        return pa.table(columns | {"label": pa.array([0])} | words_and_tags)

    def _label_number(self, label: str) -> Label:
        names, kind = self.source.label_names, self.source.loss_kind
        if kind == "token_cross_entropy":
            return self._tag_numbers(label)
        if kind == "span_cross_entropy":
            return "" if label == NO_ANSWER else label.strip()
        if kind == "cross_entropy":
            if label not in names:
                raise ValueError(f"label: expected one of {', '.join(names)}, got {label}")
            return names.index(label)
        parts = [label] if label in names else [part.strip() for part in label.split(",")]
        if kind == "binary_cross_entropy":
            if label == NO_LABEL and NO_LABEL not in names:
                return [0.0] * len(names)
            if not set(parts) <= set(names):
                raise ValueError(
                    f"label: expected some of {', '.join(names)}, separated by commas, got {label}"
                )
            return [float(name in parts) for name in names]
        targets = [target for part in parts if (target := target_of(part)) is not None]
        if not len(targets) == len(parts) == len(names):
            expected = "a finite number" if len(names) == 1 else f"{len(names)} finite numbers"
            raise ValueError(f"label: expected {expected}, got {label}")
        return targets[0] if len(names) == 1 else targets

    def _tag_numbers(self, label: str) -> list[float]:
        names = self.source.label_names
        numbers = {name: number for number, name in enumerate(names)} | {NO_TAG: UNTAGGED}
        tags = label.replace(",", " ").split()
        unknown = [tag for tag in tags if tag not in numbers]
        if unknown or not any(numbers[tag] >= 0 for tag in tags):
            raise ValueError(
                f"label: expected a tag of {', '.join(names)} for each word, got "
                f"{unknown[0] if unknown else label!r}"
            )
        return [numbers[tag] for tag in tags]

    def label_of(self, row: Mapping[str, Any]) -> str:
        """Return the label, or the tags, of an example of the folder as `query` takes it."""
        name = next(name for name in ("tags", "answer", "label") if name in row)
        return self.label_text(row[name])

    def label_text(self, label: Label) -> str:
        """Return a label as `query` takes it: a name, names, numbers or an answer."""
        names = self.source.label_names
        if isinstance(label, str):
            return label or NO_ANSWER
        if self.source.loss_kind == "token_cross_entropy" and isinstance(label, list):
            return " ".join(NO_TAG if tag == UNTAGGED else names[int(tag)] for tag in label)
        if isinstance(label, list):
            return label_vector_text(label, self.source.loss_kind, names)
        return names[int(label)] if self.source.loss_kind == "cross_entropy" else target_text(label)

    def _predict(self, table: pa.Table) -> tuple[Label, dict[str, float] | None]:
        """Return the last checkpoint's label, and its probability of every label."""
        model, tokenizer = self.source.models[-1]
        if self.source.loss_kind == "token_cross_entropy":
            length = self.source.max_length
            with masked(model, self.source.masks[-1]):
                logits = predict_tokens(model, self._encode(model, tokenizer, table))
            return [*map(float, tags_of_words(tokenizer, table, length, logits)[0])], None
        if self.source.loss_kind == "span_cross_entropy":
            with masked(model, self.source.masks[-1]):
                logits = predict_tokens(model, self._encode(model, tokenizer, table))
            return best_answers(tokenizer, table, self.source.max_length, logits)[0], None
        with masked(model, self.source.masks[-1]):
            logits_C = predict(model, self._encode(model, tokenizer, table))[0]
        kind = self.source.loss_kind
        if kind == "squared_error":
            return float(logits_C) if len(logits_C) == 1 else logits_C.tolist(), None
        if kind == "binary_cross_entropy":
            probabilities = logits_C.double().sigmoid().tolist()
            named = dict(zip(self.source.label_names, probabilities, strict=True))
            return (logits_C > 0).double().tolist(), named
        probabilities = logits_C.double().softmax(0).tolist()
        named = dict(zip(self.source.label_names, probabilities, strict=True))
        return int(logits_C.argmax()), named

    def _encode(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, table: pa.Table
    ) -> list[dict[str, Any]]:
        examples = encode(tokenizer, table, self.source.max_length)
        (language,) = set(table["language"].to_pylist())
        languages = None if language is None else [language] * len(examples)
        return with_language_ids(model.config, examples, languages)

    def _features(self, table: pa.Table) -> list[Tensor]:
        """Return (C,) features (1, K) of the example."""
        features = []
        source = self.source
        for (model, tokenizer), collector in zip(source.models, source.collectors, strict=True):
            examples = self._encode(model, tokenizer, table)
            with frozen(model):
                features.append(collector.collect(examples))
        return features

    def _word_scores(
        self, sentence: str, tags: list[float], indices: Tensor, language: str | None
    ) -> list[list[float | None]]:
        """Split the scores of training examples by the words of a sentence.

        The sentence's loss is the mean of its words', and so is its gradient: with the features f_w
        of a sentence in which only the word w has its tag, f = mean of f_w over the words.

        Args:
            sentence: The words, with spaces between them.
            tags: A tag for each word.
            indices: (N,) the rows of the training examples.
            language: As for `query`.

        Returns:
            (N, W) parts of the scores; None for a word without a tag, and one that was cut off.
        """
        source = self.source
        whole = self._table_of(sentence, None, tags, language)
        words = labelled_words(source.models[-1][1], whole, source.max_length)[0]
        alone = [[tag if w == word else UNTAGGED for w, tag in enumerate(tags)] for word in words]
        tables = [self._table_of(sentence, None, tags_of_word, language) for tags_of_word in alone]
        features = self._features(pa.concat_tables(tables))
        parts_NW = torch.zeros(len(indices), len(words), dtype=torch.float64)
        weights = source.weights or [1.0] * len(features)
        for weight, words_WK, store in zip(weights, features, self.train_stores, strict=True):
            query_WK = words_WK.cpu().double() / len(words)
            train_NK = StoreRows(store).take(indices.tolist()).double()
            if source.normalize == "cosine":
                # Gradients of 0 have cosines of 0, as in `top_influences`.
                query_WK = query_WK / query_WK.sum(dim=0).norm().clamp_min(TINY)
                train_NK = torch.nn.functional.normalize(train_NK, dim=1, eps=TINY)
            parts_NW += weight * train_NK @ query_WK.T
        scores: list[list[float | None]] = [[None] * len(tags) for _ in indices]
        for row, parts in zip(scores, parts_NW.tolist(), strict=True):
            for word, part in zip(words, parts, strict=True):
                row[word] = part
        return scores

    # --- the training examples --------------------------------------------------------------

    def _nearest(
        self,
        features: list[Tensor],
        k: int,
        rows: Tensor,
        languages: Sequence[str] | None,
        opponents: bool,
    ) -> tuple[TopInfluences, str | None]:
        """Return the strongest of `rows`, and the kind of the index that was used, if any."""
        index = self._index
        if index is not None:
            chosen = self._candidates(index, features, min(k, len(rows)), languages, opponents)
            if chosen is not None:
                return self._rank(features, k, chosen, opponents), index.kind
        return self._rank(features, k, rows, opponents), None

    def _candidates(
        self,
        index: InfluenceIndex,
        features: list[Tensor],
        k: int,
        languages: Sequence[str] | None,
        opponents: bool,
    ) -> Tensor | None:
        """Return the rows that an index finds for each sign, or None if it finds fewer than k.

        It may find too few for a filter by language, where the lists or the part of the graph that
        it visits hold next to none of these languages.
        """
        wanted = k if index.kind == "flat" else max(CANDIDATES * k, LEAST_CANDIDATES)
        wanted = min(wanted, len(index.ids))
        on_cpu = [row.cpu() for row in features]
        candidates = []
        for sign_is_negative in (False, True) if opponents else (False,):
            result = index.search(on_cpu, wanted, opponents=sign_is_negative, languages=languages)
            rows = result.indices[0]
            candidates.append(rows[rows >= 0])
        if min(map(len, candidates)) < k:
            return None
        return torch.cat(candidates).unique()

    def _rank(self, features: list[Tensor], k: int, rows: Tensor, opponents: bool) -> TopInfluences:
        """Rank `rows` by their stored features; return the k strongest of each sign."""
        stores = [StoreRows(store) for store in self.train_stores]
        all_rows = len(rows) == stores[0].shape[0]
        with progress.bar("query", len(rows)) as bar:
            top = top_influences(
                features,
                stores if all_rows else [SomeRows(store, rows) for store in stores],
                k,
                weights=self.source.weights,
                normalize=self.source.normalize,
                device=self.source.device,
                advance=bar.update,
                opponents=opponents,
            )
        return replace(
            top,
            indices=rows[top.indices.cpu()],
            opponent_indices=rows[top.opponent_indices.cpu()],
        )

    @cached_property
    def _index(self) -> InfluenceIndex | None:
        if not (self.index_path / "index.json").is_file():
            return None
        from tracmod.influence.index import InfluenceIndex

        index = InfluenceIndex.load(self.index_path)
        index.check_built_from(self.train_stores, self.source.weights, self.source.normalize)
        return index

    def _examples(self, indices: Tensor, scores: Tensor) -> list[dict[str, Any]]:
        """Return training examples as the answer shows them."""
        rows = self.source.train.take(indices.numpy()).to_pylist()
        return [
            {"rank": rank, "score": score} | row | {"label": self.label_of(row)}
            for rank, (row, score) in enumerate(zip(rows, scores.tolist(), strict=True), 1)
        ]


def _rounded(outputs: Any) -> Label:
    """Return outputs of a regression as whole numbers."""
    return (
        [float(round(output)) for output in outputs]
        if isinstance(outputs, list)
        else float(round(outputs))
    )
