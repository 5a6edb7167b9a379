"""Labels and items of the strongest training examples, against counting by hand and drawing."""

import numpy as np
import pyarrow as pa
import pytest

from tracmod.analysis.strongest import strongest_summary


def _examples(prefix: str, labels: list[int], groups: list[str | None]) -> pa.Table:
    ids = [f"{prefix}{row}" for row in range(len(labels))]
    return pa.table({"id": ids, "label": labels, "group": pa.array(groups, pa.string())})


def test_counted_by_hand() -> None:
    train = _examples("t", [0, 0, 1, 1], ["a", "a", "b", None])
    test = _examples("q", [0, 1], [None, None])
    listed = {
        ("q0", 1): ("t0", "t1"),
        ("q1", 1): ("t0", "t3"),
        ("q0", -1): ("t2", "t3"),
        ("q1", -1): ("t1", "t2"),
    }
    rows = [
        (*key, rank, train_id)
        for key, train_ids in listed.items()
        for rank, train_id in enumerate(train_ids, start=1)
    ]
    names = ("test_id", "sign", "rank", "train_id")
    top = pa.table(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)))
    proponents, opponents = strongest_summary(top, train, test)
    assert (proponents["side"], opponents["side"], proponents["k"]) == (
        "proponents",
        "opponents",
        2,
    )
    assert proponents["same_label"] == 3 / 4
    assert opponents["same_label"] == 1 / 4
    assert proponents["distinct_items"] == (1 + 2) / 2
    assert opponents["distinct_items"] == 2
    assert proponents["same_label_null"] == 1 / 2
    # Pairs out of 4: one of 6 is the two of item a, which is one item; all others are two.
    assert proponents["distinct_items_null"] == pytest.approx((1 + 5 * 2) / 6)


def test_nulls_are_the_means_of_random_draws() -> None:
    draw = np.random.default_rng(0)
    groups = [f"g{row % 7}" for row in range(60)]
    train = _examples("t", draw.integers(3, size=60).tolist(), list(groups))
    test = _examples("q", draw.integers(3, size=300).tolist(), [None] * 300)
    rows = [
        (f"q{query}", sign, rank, f"t{row}")
        for query in range(300)
        for sign in (1, -1)
        for rank, row in enumerate(draw.permutation(60)[:10], start=1)
    ]
    names = ("test_id", "sign", "rank", "train_id")
    top = pa.table(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)))
    for found in strongest_summary(top, train, test):
        assert found["same_label"] == pytest.approx(found["same_label_null"], abs=0.03)
        assert found["distinct_items"] == pytest.approx(found["distinct_items_null"], abs=0.2)
