"""Comparison of a run's influence with the answers that are known for the task `planted`.

Shape suffixes: Q test examples, N training examples, G languages, P pairs of languages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from scipy.sparse import csr_array
from scipy.stats import rankdata

from tracmod.analysis.results import RunResults, ViewResults, counts_under
from tracmod.analysis.statistics import Resampling
from tracmod.tasks.planted import TEACHER

DUPLICATES_GOAL, AUC_GOAL, SPEARMAN_GOAL = 0.99, 0.9, 0.8
ANSWER_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("model", "view", "question")),
        *((name, pa.float64()) for name in ("value", "low", "high", "chance")),
        ("expected", pa.string()),
        ("right", pa.bool_()),
    ]
)


@dataclass(frozen=True)
class Answer:
    """The answer to a question.

    Attributes:
        question: "duplicates", "flipped_by_self_influence", "flipped_by_opponents",
            "relatedness", "loan", "isolated" or "cipher"; see `planted_answers`.
        value, low, high: the number and its bootstrap interval.
        chance: the number that random scores would give.
        expected: the condition that the number must meet, in words.
        right: whether it does.
    """

    question: str
    value: float
    low: float
    high: float
    chance: float
    expected: str
    right: bool


def planted_answers(run_dir: str | Path, resampling: Resampling) -> pa.Table:
    """Build `analysis/planted.parquet`: the answer to every applicable question, per view.

    duplicates: share of the test examples with a duplicate in the training examples for which the
        duplicate is the strongest proponent.
    flipped_by_self_influence, flipped_by_opponents: area under the ROC curve for telling
        mislabelled training examples from others, by self-influence (under the mask of the
        example's own language), or by how strongly an example opposes the test examples of its
        language: minus the sum of its scores where `top.parquet` lists it.
    relatedness: Spearman correlation over pairs of languages a and b of their relatedness with
        (share of b among the proponents of a's test examples + share of a among b's) / 2.
    loan: increase of the teacher's share among the proponents from a test example of the learner
        to the same example with a word that only the teacher teaches and that decides the label;
        it must be above 0 and larger than the increase of any other language.
    isolated: share of `isolated` among the proponents of its own test examples.
    cipher: share of `base` among the proponents of the test examples of `cipher`. The two are the
        same language letter by letter, but the model cannot know, so it must be below chance.

    Intervals are percentile bootstraps over test examples, stratified by language, and over
    training examples for self-influence, which involves no test example. Test examples with a loan
    word are left out of relatedness. Several draws of a view (`random`) are averaged.

    Args:
        run_dir: folder of a run of the task `planted`.
        resampling: options of the intervals.

    Returns:
        A table with `ANSWER_SCHEMA`.

    Raises:
        ValueError: not a run folder, or not of the task planted.
    """
    run = RunResults(run_dir)
    if not (run.path / "data" / "planted.parquet").is_file():
        raise ValueError(
            f"{run.path}: expected a run of the task planted, but data/planted.parquet is missing"
        )
    truth = _Truth(run)
    rows = [
        {"model": view.model, "view": view.name, **answer.__dict__}
        for view in run.views()
        for answer in _answers(truth, view, resampling)
    ]
    return pa.Table.from_pylist(rows, ANSWER_SCHEMA)


class _Truth:
    """The planted facts of a run, in terms of the rows of its examples.

    Attributes:
        run: the run.
        planted: content of data/planted.parquet.
        test_rows, train_rows: id -> row.
        languages_Q, languages_N: language of each test example and training example.
        languages: the G training languages.
    """

    def __init__(self, run: RunResults) -> None:
        self.run = run
        self.planted = pq.read_table(run.path / "data" / "planted.parquet")
        test, train = run.examples("test"), run.examples("train")
        self.test_rows = {name: row for row, name in enumerate(test["id"].to_pylist())}
        self.train_rows = {name: row for row, name in enumerate(train["id"].to_pylist())}
        self.languages_Q = np.array(test["language"].to_pylist())
        self.languages_N = np.array(train["language"].to_pylist())
        self.languages = list(run.num_train)

    def _ids(self, kind: str, *columns: str) -> list[list[str]]:
        """Return the ids in some columns of the planted items of one kind."""
        rows = self.planted.filter(pc.equal(self.planted["kind"], kind))
        return [rows[column].to_pylist() for column in columns]

    @cached_property
    def duplicates(self) -> dict[int, int]:
        """Row of a test example -> row of the training example that is its duplicate."""
        pairs = zip(*self._ids("duplicate", "test_id", "train_id"), strict=True)
        return {self.test_rows[test]: self.train_rows[train] for test, train in pairs}

    @cached_property
    def flipped_N(self) -> np.ndarray:
        """Whether the label of each training example was flipped, bool."""
        flipped = np.zeros(len(self.languages_N), dtype=bool)
        flipped[[self.train_rows[name] for name in self._ids("flipped", "train_id")[0]]] = True
        return flipped

    @cached_property
    def loans(self) -> dict[int, int]:
        """Row of a test example with a loan word -> row of the same with the native word."""
        pairs = zip(*self._ids("loan", "test_id", "native_id"), strict=True)
        return {self.test_rows[loan]: self.test_rows[native] for loan, native in pairs}

    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the (P, 2) columns of pairs of languages, and their (P,) relatedness."""
        rows = pq.read_table(self.run.path / "data" / "relatedness.parquet").to_pylist()
        pairs = [
            [self.languages.index(row[name]) for name in ("language_a", "language_b")]
            for row in rows
        ]
        return np.array(pairs).reshape(-1, 2), np.array([row["relatedness"] for row in rows])


def _answers(truth: _Truth, view: ViewResults, resampling: Resampling) -> Iterator[Answer]:
    """Yield the answers of one view to the questions that the run was planted for."""
    shares_QG = view.measures["share_positive"]
    known_Q = np.isfinite(shares_QG).all(axis=1)
    folders = [truth.run.path / "influence" / view.model / name for name in view.folders]
    # Some views, such as `other`, cover only a part of the test examples.
    if all(counts_under(name, language) for name in view.folders for language in truth.languages):
        listed = [_listed(truth, folder / "top.parquet") for folder in folders]
        if truth.duplicates:
            yield _duplicates(truth, [first_Q for first_Q, _ in listed], resampling)
        if truth.flipped_N.any():
            files = [folder / "self_influence.parquet" for folder in folders]
            if all(file.is_file() for file in files):
                own_N = np.mean([_self_influence(truth, file) for file in files], axis=0)
                yield _flipped_by_self_influence(truth, own_N, resampling)
            scores_QN = sum((scores for _, scores in listed[1:]), start=listed[0][1])
            yield _flipped_by_opponents(truth, scores_QN, resampling)
        if len(truth.languages) > 2:
            yield _relatedness(truth, shares_QG, resampling)
        if truth.loans:
            yield _loan(truth, shares_QG, resampling)
    yield from _known_languages(truth, shares_QG, known_Q, resampling)


def _duplicates(truth: _Truth, firsts: Sequence[np.ndarray], resampling: Resampling) -> Answer:
    rows = list(truth.duplicates)
    duplicates = np.array([truth.duplicates[row] for row in rows])
    hits = np.mean([first_Q[rows] == duplicates for first_Q in firsts], axis=0)
    interval = _interval(
        lambda drawn: float(hits[drawn].mean()), truth.languages_Q[rows], resampling
    )
    return _at_least(DUPLICATES_GOAL, "duplicates", interval, 1 / len(truth.languages_N))


def _at_least(
    goal: float, question: str, interval: tuple[float, float, float], chance: float
) -> Answer:
    """Return the answer to a question whose value must reach a goal."""
    return Answer(question, *interval, chance, f"at least {goal}", interval[0] >= goal)


def _flipped_by_self_influence(truth: _Truth, own_N: np.ndarray, resampling: Resampling) -> Answer:
    interval = _interval(
        lambda drawn: auc(own_N[drawn], truth.flipped_N[drawn]),
        [
            f"{language} {flipped}"
            for language, flipped in zip(truth.languages_N, truth.flipped_N, strict=True)
        ],
        resampling,
    )
    return _at_least(AUC_GOAL, "flipped_by_self_influence", interval, 0.5)


def _flipped_by_opponents(truth: _Truth, scores_QN: csr_array, resampling: Resampling) -> Answer:
    def statistic(drawn: np.ndarray) -> float:
        times_drawn_Q = np.bincount(drawn, minlength=scores_QN.shape[0])
        return auc(-(times_drawn_Q @ scores_QN), truth.flipped_N)

    interval = _interval(statistic, truth.languages_Q, resampling)
    return _at_least(AUC_GOAL, "flipped_by_opponents", interval, 0.5)


def _relatedness(truth: _Truth, shares_QG: np.ndarray, resampling: Resampling) -> Answer:
    pairs_P2, relatedness_P = truth.pairs()
    plain = [row for row in range(len(shares_QG)) if row not in truth.loans]
    shares_QG, languages_Q = shares_QG[plain], truth.languages_Q[plain]

    def statistic(drawn: np.ndarray) -> float:
        means_GG = np.stack(
            [
                shares_QG[drawn][languages_Q[drawn] == language].mean(axis=0)
                for language in truth.languages
            ]
        )
        mutual_GG = (means_GG + means_GG.T) / 2
        return spearman(mutual_GG[pairs_P2[:, 0], pairs_P2[:, 1]], relatedness_P)

    return _at_least(
        SPEARMAN_GOAL, "relatedness", _interval(statistic, languages_Q, resampling), 0.0
    )


def _loan(truth: _Truth, shares_QG: np.ndarray, resampling: Resampling) -> Answer:
    rises_G = shares_QG[list(truth.loans)] - shares_QG[list(truth.loans.values())]
    teacher = truth.languages.index(TEACHER)
    value, low, high = _mean(rises_G[:, teacher], resampling)
    largest = int(np.argmax(rises_G.mean(axis=0))) == teacher
    expected = "above 0, and the largest rise of all languages"
    return Answer("loan", value, low, high, 0.0, expected, low > 0 and largest)


def _known_languages(
    truth: _Truth, shares_QG: np.ndarray, known_Q: np.ndarray, resampling: Resampling
) -> Iterator[Answer]:
    """Yield the answers about `isolated` and `cipher`, as far as the run has these languages."""
    for question, language in (("isolated", "isolated"), ("cipher", "base")):
        rows_Q = known_Q & (truth.languages_Q == question)
        if not {question, language} <= set(truth.languages) or not rows_Q.any():
            continue
        shares = shares_QG[rows_Q, truth.languages.index(language)]
        value, low, high = _mean(shares, resampling)
        chance = truth.run.null_shares[language]
        if question == "isolated":
            yield Answer(question, value, low, high, chance, "above chance", low > chance)
        else:
            yield Answer(question, value, low, high, chance, "below chance", high < chance)


# --- statistics -----------------------------------------------------------------------------


def auc(scores_N: np.ndarray, marked_N: np.ndarray) -> float:
    """Compute the area under the ROC curve.

    It is the probability that the score of a marked example is above that of an unmarked one; ties
    count half.
    """
    ranks_N, marked = rankdata(scores_N), int(marked_N.sum())
    wins = ranks_N[marked_N].sum() - marked * (marked + 1) / 2
    return float(wins / (marked * (len(marked_N) - marked)))


def spearman(a_P: np.ndarray, b_P: np.ndarray) -> float:
    """Compute Spearman's correlation; 0 if one side does not vary."""
    if np.ptp(a_P) == 0 or np.ptp(b_P) == 0:
        return 0.0
    return float(np.corrcoef(rankdata(a_P), rankdata(b_P))[0, 1])


def _mean(values: np.ndarray, resampling: Resampling) -> tuple[float, float, float]:
    return _interval(lambda drawn: float(values[drawn].mean()), np.zeros(len(values)), resampling)


def _interval(
    statistic: Callable[[np.ndarray], float],
    strata: Sequence[str] | np.ndarray,
    resampling: Resampling,
) -> tuple[float, float, float]:
    """Compute a statistic of all rows, and its percentile bootstrap interval.

    Args:
        statistic: function of row numbers.
        strata: stratum of each row; as many rows of each stratum are drawn as it has.
        resampling: number of draws, coverage and seed.
    """
    strata = np.asarray(strata)
    parts = [np.flatnonzero(strata == stratum) for stratum in np.unique(strata)]
    rng = np.random.default_rng(resampling.seed)
    drawn = [
        statistic(np.concatenate([rng.choice(part, len(part)) for part in parts]))
        for _ in range(resampling.bootstrap)
    ]
    tail = (1 - resampling.confidence) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return statistic(np.arange(len(strata))), float(low), float(high)


# --- reading --------------------------------------------------------------------------------


def _listed(truth: _Truth, path: Path) -> tuple[np.ndarray, csr_array]:
    """Read the (Q,) first proponents and the (Q, N) listed scores within a language."""
    top = pq.read_table(path)
    tests = np.array([truth.test_rows[name] for name in top["test_id"].to_pylist()])
    trains = np.array([truth.train_rows[name] for name in top["train_id"].to_pylist()])
    strongest = (top["sign"].to_numpy() == 1) & (top["rank"].to_numpy() == 1)
    first_Q = np.full(len(truth.languages_Q), -1)
    first_Q[tests[strongest]] = trains[strongest]
    own = truth.languages_Q[tests] == truth.languages_N[trains]
    listed = (top["score"].to_numpy()[own].astype(np.float64), (tests[own], trains[own]))
    return first_Q, csr_array(listed, shape=(len(truth.languages_Q), len(truth.languages_N)))


def _self_influence(truth: _Truth, path: Path) -> np.ndarray:
    """Read the (N,) self-influence, under the mask of the example's own language if masked."""
    own_N = np.full(len(truth.languages_N), np.nan)
    for row in pq.read_table(path).to_pylist():
        if row["mask_language"] in (None, row["train_language"]):
            own_N[truth.train_rows[row["train_id"]]] = row["self_influence"]
    assert np.isfinite(own_N).all(), f"{path} lacks a training example"
    return own_N
