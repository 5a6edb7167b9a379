"""Sampling: exact counts, balanced classes, groups in one split, parallel items."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tracmod.config import TaskConfig
from tracmod.tasks.examples import SPLITS, Corpus, Pool, TaskData, pool_from_rows
from tracmod.tasks.sampling import sample


def _config(
    train: int, dev: int, test: int, *languages: str, seed: int = 0, **options: Any
) -> TaskConfig:
    return TaskConfig(
        languages=list(languages or ("en", "de")),
        train_per_language=train,
        dev_per_language=dev,
        test_per_language=test,
        seed=seed,
        **options,
    )


def _corpus(
    labels: dict[str, list[int]],
    num_labels: int,
    parallel: bool = False,
    per_group: int | None = None,
    splits: tuple[tuple[str, ...], ...] = (SPLITS,),
) -> Corpus:
    """Every pool holds the same rows; `per_group` rows in a row share a split group."""
    rows: list[dict[str, Any]] = [
        {
            "id": f"{language}-{number}",
            "language": language,
            "text_a": f"{language} {number}",
            "label": label,
            "group": str(number) if parallel else None,
            "split_group": None if per_group is None else f"g{number // per_group}",
        }
        for language, own_labels in labels.items()
        for number, label in enumerate(own_labels)
    ]
    pools = [Pool(pool_from_rows(rows), split) for split in splits]
    return Corpus([str(label) for label in range(num_labels)], parallel, pools)


def _tables(task: TaskData) -> dict[str, pa.Table]:
    return {split: getattr(task, split) for split in SPLITS}


def _counts(table: pa.Table, language: str, num_labels: int) -> list[int]:
    rows = [row["label"] for row in table.to_pylist() if row["language"] == language]
    return np.bincount(rows, minlength=num_labels).tolist()


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize(
    ("sizes", "num_labels"), [((31, 7, 10), 3), ((1, 1, 1), 5), ((9, 6, 3), 3)]
)
def test_counts_are_exact_and_classes_balanced_within_one(
    parallel: bool, sizes: tuple[int, int, int], num_labels: int
) -> None:
    available = -(-sum(sizes) // num_labels)
    labels = np.random.default_rng(0).permutation(np.repeat(range(num_labels), available)).tolist()
    corpus = _corpus({"en": labels, "de": labels}, num_labels, parallel)
    task = sample(corpus, _config(*sizes))
    for (_, table), size in zip(_tables(task).items(), sizes, strict=True):
        assert table.num_rows == 2 * size
        for language in ("en", "de"):
            counts = _counts(table, language, num_labels)
            assert max(counts) - min(counts) <= 1
    ids = [identifier for table in _tables(task).values() for identifier in table["id"].to_pylist()]
    assert len(set(ids)) == len(ids)


def test_a_rare_class_is_divided_in_proportion() -> None:
    labels = [0] * 200 + [1] * 20
    task = sample(_corpus({"en": labels}, 2), _config(100, 50, 50, "en"))
    counts = {split: _counts(table, "en", 2) for split, table in _tables(task).items()}
    assert counts == {"train": [90, 10], "dev": [45, 5], "test": [45, 5]}


def test_a_class_that_does_not_occur_leaves_the_others_balanced() -> None:
    task = sample(_corpus({"en": [0, 2] * 20}, 3), _config(20, 4, 6, "en"))
    assert _counts(task.train, "en", 3) == [10, 0, 10]


def test_languages_may_differ_in_their_examples() -> None:
    corpus = _corpus({"en": [0, 1, 2] * 20, "de": [0] * 50 + [1] * 4 + [2] * 6}, 3)
    task = sample(corpus, _config(30, 6, 6))
    assert _counts(task.train, "en", 3) == [10, 10, 10]
    assert _counts(task.train, "de", 3)[1:] == [3, 5]
    assert task.languages == ["en", "de"]


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_a_split_group_never_crosses_splits(parallel: bool, seed: int) -> None:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 3, size=240).tolist()
    corpus = _corpus({"en": labels, "de": labels}, 3, parallel, per_group=3)
    task = sample(corpus, _config(80, 20, 31, seed=seed))
    groups = [
        {int(identifier.split("-")[1]) // 3 for identifier in table["id"].to_pylist()}
        for table in _tables(task).values()
    ]
    # Also where languages are drawn separately: a group is the same in all of them.
    assert not groups[0] & groups[1] | groups[0] & groups[2] | groups[1] & groups[2]
    assert [table.num_rows for table in _tables(task).values()] == [160, 40, 62]
    counts = _counts(task.train, "en", 3)
    assert max(counts) - min(counts) <= 1


def test_groups_too_large_to_divide_are_an_error() -> None:
    corpus = _corpus({"en": [0, 1] * 10}, 2, per_group=10)
    with pytest.raises(ValueError, match=r"split .* short"):
        sample(corpus, _config(5, 5, 5, "en"))


def test_parallel_items_are_the_same_in_the_same_order() -> None:
    labels = [0, 1, 2] * 40
    task = sample(_corpus({"en": labels, "de": labels}, 3, parallel=True), _config(50, 10, 20))
    for table in _tables(task).values():
        half = table.num_rows // 2
        for name in ("group", "label"):
            assert table[name].to_pylist()[:half] == table[name].to_pylist()[half:]
        assert table["language"].to_pylist() == ["en"] * half + ["de"] * half


def test_parallel_items_missing_or_labelled_otherwise_are_left_out() -> None:
    corpus = _corpus({"en": [0, 1] * 10, "de": [0, 1] * 9 + [1, 0]}, 2, parallel=True)
    table = corpus.pools[0].table
    keep = [identifier not in ("de-0", "en-3") for identifier in table["id"].to_pylist()]
    corpus = Corpus(corpus.label_names, True, [Pool(table.filter(pa.array(keep)), SPLITS)])
    task = sample(corpus, _config(14, 1, 1))
    used = {group for table in _tables(task).values() for group in table["group"].to_pylist()}
    assert used == {str(number) for number in range(1, 18)} - {"3"}
    with pytest.raises(ValueError, match=r"in all of en, de: .*train 15 .*got 16"):
        sample(corpus, _config(15, 1, 1))


def test_a_parallel_task_needs_groups() -> None:
    corpus = _corpus({"en": [0, 1] * 9, "de": [0, 1] * 9}, 2)
    corpus = Corpus(corpus.label_names, True, corpus.pools)
    with pytest.raises(ValueError, match=r"group: .*got 18 rows"):
        sample(corpus, _config(3, 1, 1))


def test_too_few_examples_name_language_split_wanted_and_available() -> None:
    corpus = _corpus({"en": [0, 1] * 50, "de": [0, 1] * 20}, 2)
    with pytest.raises(
        ValueError,
        match=r"language 'de': .*train 40 \+ dev 2 \+ test 3 .*got 40",
    ):
        sample(corpus, _config(40, 2, 3))
    with pytest.raises(ValueError, match=r"language 'fr': .*got 0"):
        sample(corpus, _config(1, 1, 1, "en", "fr"))


def test_published_splits_keep_their_examples_and_mark_their_groups() -> None:
    labels = [0, 1, 2] * 10
    corpus = _corpus(
        {"en": labels, "de": labels}, 3, True, splits=(("train",), ("dev",), ("test",))
    )
    task = sample(corpus, _config(30, 12, 6))
    assert set(task.train["group"].to_pylist()) == {f"train-{number}" for number in range(30)}
    assert all(group.startswith("test-") for group in task.test["group"].to_pylist())


def test_the_seed_determines_the_examples() -> None:
    corpus = _corpus({"en": [0, 1] * 100, "de": [0, 1] * 100}, 2)
    first, again, other = (sample(corpus, _config(20, 5, 5, seed=seed)) for seed in (1, 1, 2))
    assert all(
        a.equals(b) for a, b in zip(_tables(first).values(), _tables(again).values(), strict=True)
    )
    assert not first.train.equals(other.train)


def test_against_brute_force_counts_over_many_shapes() -> None:
    generator = np.random.default_rng(7)
    for _ in range(30):
        num_labels = int(generator.integers(2, 6))
        labels = generator.integers(0, num_labels, size=int(generator.integers(30, 120))).tolist()
        train, dev, test = (int(n) for n in generator.integers(1, len(labels) // 3, size=3))
        task = sample(_corpus({"en": labels}, num_labels), _config(train, dev, test, "en"))
        total: Counter[int] = Counter()
        for table, size in zip(_tables(task).values(), (train, dev, test), strict=True):
            assert table.num_rows == size
            total.update(table["label"].to_pylist())
        # Nothing short is spared: a class below its even share has given all it has.
        share = (train + dev + test) / num_labels
        for label in range(num_labels):
            assert total[label] >= min(labels.count(label), int(share)) - num_labels


# --- which languages are trained on, and how much ---------------------------------------------


def _ids(table: pa.Table, language: str) -> list[str]:
    return [row["id"] for row in table.to_pylist() if row["language"] == language]


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("splits", [(SPLITS,), (("train",), ("dev",), ("test",))])
def test_leaving_a_language_out_changes_nothing_else(parallel: bool, splits: Any) -> None:
    labels = np.random.default_rng(1).integers(0, 3, size=90).tolist()
    names = ("en", "de", "es")
    corpus = _corpus(dict.fromkeys(names, labels), 3, parallel, splits=splits)
    whole = sample(corpus, _config(30, 12, 9, *names))
    without = sample(corpus, _config(30, 12, 9, *names, train_languages=["es", "en"]))
    assert whole.dev.equals(without.dev)
    assert whole.test.equals(without.test)
    assert _ids(without.train, "de") == []
    for language in ("en", "es"):
        assert _ids(without.train, language) == _ids(whole.train, language) != []
    assert without.languages == list(names)


@pytest.mark.parametrize("parallel", [False, True])
def test_a_language_without_training_data_needs_none(parallel: bool) -> None:
    pools = [
        _corpus(languages, 2, parallel).pools[0].table
        for languages in ({"en": [0, 1] * 20}, {"en": [0, 1] * 9, "sw": [0, 1] * 9})
    ]
    corpus = Corpus(["0", "1"], parallel, [Pool(pools[0], ("train",)), Pool(pools[1], SPLITS[1:])])
    with pytest.raises(ValueError, match=r"language 'sw': .*got 0"):
        sample(corpus, _config(20, 6, 6, "en", "sw"))
    task = sample(corpus, _config(20, 6, 6, "en", "sw", train_languages=["en"]))
    assert task.train["language"].to_pylist() == ["en"] * 20
    assert len(_ids(task.test, "sw")) == 6


@pytest.mark.parametrize("parallel", [False, True])
def test_languages_may_have_different_amounts_of_training_data(parallel: bool) -> None:
    labels = [0, 1, 2] * 40
    corpus = _corpus({"en": labels, "de": labels, "es": labels}, 3, parallel)
    options = {"train_counts": {"de": 9, "es": 60}}
    task = sample(corpus, _config(30, 6, 9, "en", "de", "es", **options))
    assert [_counts(task.train, name, 3) for name in ("en", "de", "es")] == [
        [10] * 3, [3] * 3, [20] * 3,
    ]  # fmt: skip
    assert len(task.test) == 3 * 9
    if parallel:  # fewer items are part of the same items
        items = {name: set(_groups_of(task.train, name)) for name in ("en", "de", "es")}
        assert items["de"] < items["en"] < items["es"]
    with pytest.raises(ValueError, match=r"train 106 \+ dev 6 \+ test 9 .*got 120"):
        sample(corpus, _config(30, 6, 9, "en", "de", "es", train_counts={"de": 106}))


def _groups_of(table: pa.Table, language: str) -> list[str]:
    return [row["group"] for row in table.to_pylist() if row["language"] == language]


@pytest.mark.parametrize("splits", [(SPLITS,), (("train",), ("dev",), ("test",))])
def test_test_items_from_train_are_trained_in_all_other_languages_only(splits: Any) -> None:
    labels = np.random.default_rng(2).permutation([0, 1, 2] * 40).tolist()
    names = ("en", "de", "es")
    corpus = _corpus(dict.fromkeys(names, labels), 3, True, splits=splits)
    task = sample(corpus, _config(48, 6, 12, *names, test_from_train=True))
    for language in names:
        tested, trained = _groups_of(task.test, language), _groups_of(task.train, language)
        assert len(set(tested)) == 12
        assert len(set(trained)) == 48
        assert not set(tested) & set(trained)
        for other in set(names) - {language}:
            assert set(tested) <= set(_groups_of(task.train, other))
        assert max(_counts(task.test, language, 3)) - min(_counts(task.test, language, 3)) <= 1
    assert not set(task.dev["group"].to_pylist()) & set(task.train["group"].to_pylist())
    without = {"test_from_train": True, "train_languages": ["en", "es"]}
    zero_shot = sample(corpus, _config(48, 6, 12, *names, **without))
    assert zero_shot.test.equals(task.test)
    assert set(zero_shot.train["language"].to_pylist()) == {"en", "es"}


def test_test_items_from_train_need_a_parallel_task() -> None:
    corpus = _corpus({"en": [0, 1] * 30, "de": [0, 1] * 30}, 2)
    with pytest.raises(ValueError, match=r"test_from_train: .*grammar"):
        sample(corpus, _config(20, 5, 5, test_from_train=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_languages": ["fr"]}, "train_languages: .*en, de, got fr"),
        ({"train_languages": ["en", "en"]}, r"train_languages\n.*got en more than once"),
        ({"train_languages": []}, "train_languages\n.*at least 1"),
        ({"train_counts": {"fr": 5}}, "train_counts: .*en, de.*, got fr"),
        ({"train_counts": {"en": 0}}, r"train_counts\.en\n.* equal to 1"),
        ({"train_languages": ["en"], "train_counts": {"de": 5}}, "got de"),
        ({"test_from_train": True, "train_counts": {"en": 5}}, "train_counts: .*got en"),
        ({"test_from_train": True, "train_languages": ["en"]}, "test_from_train: .*got en"),
    ],
)
def test_training_data_of_unknown_languages_is_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _config(20, 5, 5, **options)


def test_test_items_from_train_must_suffice_for_every_language() -> None:
    with pytest.raises(ValueError, match=r"test_from_train: .*3 languages x 20 .*60, got 50"):
        _config(30, 5, 20, "en", "de", "es", test_from_train=True)
