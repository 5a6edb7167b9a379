"""Data of the page's explorer: test examples with their strongest proponents and opponents.

Shape legend: Q test examples shown, G training languages, R ranks shown; 2: proponents, opponents.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from markupsafe import Markup

from tracmod.analysis import RunResults
from tracmod.report.html.packed import packed_json
from tracmod.report.wording.labels import view_title
from tracmod.tasks.tag_scores import UNTAGGED
from tracmod.tasks.token_files import NO_TAG, tagged_text

# Training examples listed per test example and sign.
MOST_LISTED = 20
LEAST_LISTED = 5
# Largest part of the page, in characters, that the examples may take. With Plotly and the figures,
# a page with 5 languages of 500 test examples stays well below 10 MB.
LARGEST = 5_000_000
LONGEST_TEXT = 600
# More training examples than this need four bytes per position; its own value means "none".
NO_EXAMPLE = 65_535


def explorer(run: RunResults, largest: int = LARGEST) -> Markup:
    """Return the packed data of as many examples as fit into `largest` characters.

    First fewer training examples are listed, then fewer test examples of each language.
    """
    listed, per_language = MOST_LISTED, max(run.num_test.values(), default=0)
    while True:
        data = packed_json(explorer_data(run, listed, per_language))
        if len(data) <= largest or per_language <= 1:
            return data
        if listed > LEAST_LISTED:
            listed = max(LEAST_LISTED, listed // 2)
        else:
            per_language //= 2


def explorer_data(run: RunResults, listed: int, per_language: int) -> dict[str, Any]:
    """Return the examples that readers of the page can explore.

    Args:
        run: a run folder.
        listed: training examples listed per test example, view and sign (R).
        per_language: largest number of test examples of a language; the first ones are taken.

    Returns:
        labels: names of the labels. k: number of strongest examples that the shares count; None if
        there is no influence. languages: training languages, in the order of `shares`. num_test:
        test examples of the run, whether shown or not. shown: R.
        test, train: columns language, label, text_a, text_b, group, of every test example shown and
        of every training example that is listed.
        views: title; prediction (Q) int16, -1 if the view does not have the example; shares
        (Q, 2, G) uint16, in hundredths of a percent; places (Q, 2, R), positions in `train`,
        strongest first, uint16 or uint32, the largest value of the type if there is none; scores
        (Q, 2, R) float16, to be multiplied by `unit`. Arrays are C-contiguous.
    """
    folders = [
        (model, view)
        for model in ("full", "sparse")
        for view in _shown_views(run.view_folders(model))
        if (run.path / "influence" / model / view / "top.parquet").is_file()
    ]
    test, train = run.examples("test"), run.examples("train")
    test = test.take(_first_of_each(test["language"].to_pylist(), per_language if folders else 0))
    views = [_view(run, model, view, test, train, listed) for model, view in folders]
    rows = [np.unique(view["places"]) for view in views]  # of the training data; -1: none
    shown = np.unique(np.concatenate([np.zeros(0, np.int64), *rows]))
    shown = shown[shown >= 0]
    dtype = np.uint16 if len(shown) < NO_EXAMPLE else np.uint32
    for view in views:
        positions = np.searchsorted(shown, view["places"])
        view["places"] = np.where(view["places"] < 0, np.iinfo(dtype).max, positions).astype(dtype)
    return {
        "labels": run.label_names,
        "k": run.ks[0] if run.ks else None,
        "languages": list(run.num_train),
        "num_test": sum(run.num_test.values()),
        "shown": listed,
        "test": _columns(test, run.tag_names),
        "train": _columns(train.take(shown), run.tag_names),
        "views": views,
    }


def _shown_views(folders: list[str]) -> list[str]:
    """Return all heads, the own subnetwork, and the first of the random draws."""
    random = [view for view in folders if view.startswith("random-")][:1]
    return [view for view in ("full", "subnetwork") if view in folders] + random


def _first_of_each(languages: Sequence[str], number: int) -> np.ndarray:
    """Return the positions of the first `number` examples of every language."""
    seen: Counter[str] = Counter()
    positions = []
    for position, language in enumerate(languages):
        seen[language] += 1
        if seen[language] <= number:
            positions.append(position)
    return np.array(positions, np.int64)


def _view(
    run: RunResults, model: str, view: str, test: pa.Table, train: pa.Table, listed: int
) -> dict[str, Any]:
    """Return the data of a view; its `places` are still rows of `train`, or -1."""
    folder = run.path / "influence" / model / view
    languages = list(run.num_train)
    columns = ["train_language", "test_prediction", "share_positive", "share_negative"]
    shares = _of_tests(folder / "examples.parquet", columns, test)
    prediction_Q = np.full(len(test), -1, np.int16)
    shares_Q2G = np.zeros((len(test), 2, len(languages)), np.uint16)
    q, g = shares["q"], pc.index_in(shares["train_language"], pa.array(languages)).to_numpy()
    prediction_Q[q] = shares["test_prediction"].fill_null(-1).to_numpy()
    for side, name in enumerate(("share_positive", "share_negative")):
        shares_Q2G[q, side, g] = np.rint(10_000 * shares[name].to_numpy())
    rows_Q2R = np.full((len(test), 2, listed), -1, np.int64)
    scores_Q2R = np.zeros(rows_Q2R.shape)
    columns = ["sign", "rank", "train_id", "score"]
    top = _of_tests(folder / "top.parquet", columns, test, filters=[("rank", "<=", listed)])
    side = (top["sign"].to_numpy() < 0).astype(np.int64)
    where = top["q"], side, top["rank"].to_numpy() - 1
    rows_Q2R[where] = pc.index_in(top["train_id"], train["id"].combine_chunks()).to_numpy()
    scores_Q2R[where] = top["score"].to_numpy()
    unit = float(np.abs(scores_Q2R).max(initial=0.0)) or 1.0
    return {
        "title": view_title(model, view),
        "prediction": prediction_Q,
        "shares": shares_Q2G,
        "places": rows_Q2R,
        "scores": (scores_Q2R / unit).astype(np.float16),
        "unit": unit,
    }


def _of_tests(
    path: Path, columns: list[str], test: pa.Table, filters: list[Any] | None = None
) -> dict[str, Any]:
    """Return columns of the rows of some test examples, and `q`, the test example of each row."""
    table = pq.read_table(path, columns=["test_id", *columns], filters=filters)
    q = pc.index_in(table["test_id"], test["id"].combine_chunks())
    table = table.filter(pc.is_valid(q))
    values = {name: table[name].combine_chunks() for name in columns}
    return {"q": q.drop_null().to_numpy(), **values}


def _columns(examples: pa.Table, tag_names: Sequence[str] | None) -> dict[str, list[Any]]:
    """Return what the page shows of examples, with long texts shortened."""
    columns = {name: examples[name].to_pylist() for name in ("language", "label")}
    for name in ("text_a", "text_b"):
        texts = examples[name].to_pylist()
        if name == "text_a" and tag_names is not None:
            texts = [
                tagged_text(tokens, [NO_TAG if tag == UNTAGGED else tag_names[tag] for tag in tags])
                for tokens, tags in zip(
                    examples["tokens"].to_pylist(), examples["tags"].to_pylist(), strict=True
                )
            ]
        elif name == "text_a" and "answer" in examples.column_names:
            answers = [answer or "(no answer)" for answer in examples["answer"].to_pylist()]
            texts = [f"{text} → {answer}" for text, answer in zip(texts, answers, strict=True)]
        columns[name] = [
            text if text is None or len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + " …"
            for text in texts
        ]
    has_group = "group" in examples.schema.names
    group = examples["group"].to_pylist() if has_group else [None] * len(examples)
    return {**columns, "group": group}
