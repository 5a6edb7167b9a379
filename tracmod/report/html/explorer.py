"""Test examples with their strongest proponents and opponents, as data for the page.

Shape legend: Q test examples shown, G training languages, R ranks shown; 2: proponents, opponents.
"""

from __future__ import annotations

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

# Training examples shown per sign, and the largest part of the page (characters) that the examples
# may take: with Plotly and the figures, 5 languages x 500 test examples stay well under 10 MB.
MOST_SHOWN = 20
LEAST_SHOWN = 5
LARGEST = 5_000_000
LONGEST_TEXT = 600
NONE = 65_535  # of a place in the list: no example


def explorer(run: RunResults, largest: int = LARGEST) -> Markup:
    """The packed data of `explorer_data`, of as many examples as fit into `largest` characters.

    Fewer training examples are listed first; then, fewer test examples of each language.
    """
    shown, per_language = MOST_SHOWN, max(run.num_test.values(), default=0)
    while True:
        data = packed_json(explorer_data(run, shown, per_language))
        if len(data) <= largest or per_language <= 1:
            return data
        if shown > LEAST_SHOWN:
            shown = max(LEAST_SHOWN, shown // 2)
        else:
            per_language //= 2


def explorer_data(run: RunResults, shown: int, per_language: int) -> dict[str, Any]:
    """The examples that the page lets one look through.

    Args:
        run: a run folder.
        shown: training examples listed per test example, view and sign.
        per_language: most test examples of a language; the first ones are taken.

    Returns:
        labels: names. k: how many were counted for the shares; None: no influence.
        languages: training languages, the order of `shares`.
        num_test: test examples of the run, shown or not.
        shown: R.
        test, train: columns language, label, text_a, text_b, group; every test example shown, and
        every training example listed for one.
        views: title; prediction (Q) int16, -1: the view is not of this example; shares (Q, 2, G)
        uint16, in hundredths of a percent; places (Q, 2, R) in `train`, strongest first, uint16 or
        uint32, the dtype's largest value: none; scores (Q, 2, R) float16, to be multiplied by
        `unit`. Arrays C-contiguous.
    """
    folders = [
        (model, view)
        for model in ("full", "sparse")
        for view in _shown_views(run.view_folders(model))
        if (run.path / "influence" / model / view / "top.parquet").is_file()
    ]
    test, train = run.examples("test"), run.examples("train")
    test = test.take(_first_of_each(test["language"].to_pylist(), per_language if folders else 0))
    views = [_view(run, model, view, test, train, shown) for model, view in folders]
    none = np.zeros(0, np.int64)
    listed = np.unique(np.concatenate([none, *(np.unique(view["places"]) for view in views)]))
    listed = listed[listed >= 0]
    for view in views:
        view["places"] = _renumbered(view["places"], listed)
    return {
        "labels": run.label_names,
        "k": run.ks[0] if run.ks else None,
        "languages": list(run.num_train),
        "num_test": sum(run.num_test.values()),
        "shown": shown,
        "test": _columns(test),
        "train": _columns(train.take(listed)),
        "views": views,
    }


def _shown_views(folders: list[str]) -> list[str]:
    """All heads, the own subnetwork, and the first of the random draws."""
    random = [view for view in folders if view.startswith("random-")][:1]
    return [view for view in ("full", "subnetwork") if view in folders] + random


def _first_of_each(languages: Sequence[str], number: int) -> np.ndarray:
    """Places of the first `number` of every language, in order of the data."""
    seen: dict[str, int] = {}
    places = []
    for place, language in enumerate(languages):
        seen[language] = seen.get(language, 0) + 1
        if seen[language] <= number:
            places.append(place)
    return np.array(places, np.int64)


def _view(
    run: RunResults, model: str, view: str, test: pa.Table, train: pa.Table, shown: int
) -> dict[str, Any]:
    """One view; `places` are still rows of `train`, -1: none."""
    folder = run.path / "influence" / model / view
    languages = list(run.num_train)
    columns = ["train_language", "test_prediction", "share_positive", "share_negative"]
    shares = _of_tests(folder / "examples.parquet", columns, test)
    prediction_Q = np.full(len(test), -1, np.int16)
    shares_Q2G = np.zeros((len(test), 2, len(languages)), np.uint16)
    q, g = shares["q"], _place_in(shares["train_language"], pa.array(languages))
    prediction_Q[q] = shares["test_prediction"].fill_null(-1).to_numpy()
    for side, name in enumerate(("share_positive", "share_negative")):
        shares_Q2G[q, side, g] = np.rint(10_000 * shares[name].to_numpy())
    places_Q2R = np.full((len(test), 2, shown), -1, np.int64)
    scores_Q2R = np.zeros(places_Q2R.shape)
    columns = ["sign", "rank", "train_id", "score"]
    top = _of_tests(folder / "top.parquet", columns, test, filters=[("rank", "<=", shown)])
    side = (top["sign"].to_numpy() < 0).astype(np.int64)
    where = top["q"], side, top["rank"].to_numpy() - 1
    places_Q2R[where] = _place_in(top["train_id"], train["id"])
    scores_Q2R[where] = top["score"].to_numpy()
    unit = float(np.abs(scores_Q2R).max(initial=0.0)) or 1.0
    return {
        "title": view_title(model, view),
        "prediction": prediction_Q,
        "shares": shares_Q2G,
        "places": places_Q2R,
        "scores": (scores_Q2R / unit).astype(np.float16),
        "unit": unit,
    }


def _of_tests(
    path: Path, columns: list[str], test: pa.Table, filters: list[Any] | None = None
) -> dict[str, Any]:
    """Columns of the rows of a table that are of these test examples, and `q`: which."""
    table = pq.read_table(path, columns=["test_id", *columns], filters=filters)
    place = pc.index_in(table["test_id"], test["id"].combine_chunks())
    table = table.filter(pc.is_valid(place))
    return {
        "q": place.drop_null().to_numpy(),
        **{name: table[name].combine_chunks() for name in columns},
    }


def _place_in(values: pa.Array, of: Any) -> np.ndarray:
    of = of.combine_chunks() if isinstance(of, pa.ChunkedArray) else of
    return pc.index_in(values, of).to_numpy()


def _renumbered(places: np.ndarray, listed: np.ndarray) -> np.ndarray:
    """Rows of the training data -> places among those listed, in the smallest type that holds."""
    dtype = np.uint16 if len(listed) < NONE else np.uint32
    none = np.iinfo(dtype).max
    return np.where(places < 0, none, np.searchsorted(listed, places)).astype(dtype)


def _columns(examples: pa.Table) -> dict[str, list[Any]]:
    columns = {
        name: examples[name].to_pylist() for name in ("language", "label", "text_a", "text_b")
    }
    for name in ("text_a", "text_b"):
        columns[name] = [_shortened(text) for text in columns[name]]
    group = "group" in examples.schema.names
    return {**columns, "group": examples["group"].to_pylist() if group else [None] * len(examples)}


def _shortened(text: str | None) -> str | None:
    return text if text is None or len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + " …"
