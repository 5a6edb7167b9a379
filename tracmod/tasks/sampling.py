"""Drawing a task's splits: so many examples per language, balanced, no group in two splits."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tracmod.config import TaskConfig
from tracmod.tasks.examples import SCHEMA, SPLITS, Corpus, Pool, TaskData

# Counts per stratum; a stratum is a class, or a class in one language where items differ by
# language: stratum = language index * number of classes + label.
Quotas = Mapping[str, np.ndarray]
Tables = dict[str, pa.Table]  # a table per language


def sample(corpus: Corpus, config: TaskConfig) -> TaskData:
    """Draw every split of `config` from the corpus.

    Each language gets exactly the examples asked for in each split, the classes balanced as far as
    the counts allow (within 1 where they do). A parallel task gets the same items in every
    language; items that a language lacks, or labels otherwise, are left out. Depends on
    `config.seed` and the data alone.

    To leave a language out of `train_languages` changes neither the other splits nor the other
    languages' training examples (but where a parallel task has a training file of its own, with
    items that only this language lacks: those may then be drawn). In a parallel task a language
    with fewer `train_counts` gets part of the items, the classes in the same proportion.

    Raises:
        ValueError: too few examples (language, split, wanted, available), a parallel task whose
            `group` does not name one item per language, or `test_from_train` in another task.
    """
    if config.test_from_train and not corpus.parallel:
        raise ValueError(
            f"test_from_train: expected a parallel task, got {config.name}, which is not"
        )
    drawn: dict[str, Tables] = {}
    for pool in corpus.pools:
        splits = [s for s in pool.splits if s != "test" or not config.test_from_train]
        if not splits:
            continue
        needed = {language for split in splits for language in config.languages_of(split)}
        languages = [language for language in config.languages if language in needed]
        tables = {language: _of_language(pool.table, language) for language in languages}
        if _share_groups(corpus.pools):
            tables = {language: _mark_group(table, pool) for language, table in tables.items()}
        draw = _draw_parallel if corpus.parallel else _draw_apart
        drawn |= draw(tables, splits, len(corpus.label_names), config)
    if config.test_from_train:
        drawn["train"], drawn["test"] = _hold_out(drawn["train"], config.test_per_language)
    drawn["train"] = {
        language: _thin(drawn["train"][language], config.train_count(language))
        for language in config.trained_languages
    }
    return TaskData(
        name=config.name,
        label_names=corpus.label_names,
        languages=list(config.languages),
        parallel=corpus.parallel,
        **{split: _concat(list(drawn[split].values())) for split in SPLITS},
    )


def _counts(config: TaskConfig, splits: Sequence[str], language: str) -> dict[str, int]:
    """How many examples to draw in a language; the train split holds what is tested from it."""
    wanted = {
        "train": config.train_count(language),
        "dev": config.dev_per_language,
        "test": config.test_per_language,
    }
    if config.test_from_train:
        wanted["train"] += wanted["test"]
    return {split: wanted[split] for split in splits}


def _hold_out(train: Tables, size: int) -> tuple[Tables, Tables]:
    """Move `size` items of each language from train to test, of no two languages the same items."""
    kept, held = {}, {}
    for place, (language, table) in enumerate(train.items()):
        tested = np.zeros(len(table), dtype=bool)
        tested[_spread_classes(table)[place * size : (place + 1) * size]] = True
        kept[language] = table.filter(pa.array(~tested))
        held[language] = table.filter(pa.array(tested))
    return kept, held


def _thin(table: pa.Table, count: int) -> pa.Table:
    """`count` of the rows, in their order; fewer are part of more."""
    return table.take(np.sort(_spread_classes(table)[:count]))


def _spread_classes(table: pa.Table) -> np.ndarray:
    """The rows in an order whose every stretch has the classes in the proportion of the whole."""
    labels = table["label"].to_numpy()
    place = np.empty(len(labels))
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        place[own] = (np.arange(len(own)) + 0.5) / len(own)
    return np.argsort(place, kind="stable")


def _of_language(table: pa.Table, language: str) -> pa.Table:
    return table.filter(pc.equal(table["language"], language))


def _share_groups(pools: list[Pool]) -> bool:
    seen: set[str] = set()
    for pool in pools:
        groups = set(pool.table["group"].drop_null().to_pylist())
        if groups & seen:
            return True
        seen |= groups
    return False


def _mark_group(table: pa.Table, pool: Pool) -> pa.Table:
    """Groups are numbered anew in each file: make them differ between pools."""
    marked = pc.binary_join_element_wise("-".join(pool.splits), table["group"], "-")
    return table.set_column(SCHEMA.get_field_index("group"), "group", marked)


def _draw_parallel(
    tables: Tables, splits: Sequence[str], num_labels: int, config: TaskConfig
) -> dict[str, Tables]:
    languages = list(tables)
    counted = [_counts(config, splits, language) for language in languages]
    counts = {split: max(of_language[split] for of_language in counted) for split in splits}
    for language, table in tables.items():
        _require(len(table), counts, f"examples of language {language!r}")
    rows_LN = _common_items(list(tables.values()), languages)
    _require(rows_LN.shape[1], counts, "items that are in all of " + ", ".join(languages))
    items = tables[languages[0]].take(rows_LN[0])
    labels = items["label"].to_numpy()
    quotas = _quotas(np.bincount(labels, minlength=num_labels), counts)
    units = _units(items, len(counts))
    chosen = _draw(labels, np.zeros_like(labels), units, quotas, _generator(config, splits))
    return {
        split: {name: tables[name].take(rows_LN[i, take]) for i, name in enumerate(languages)}
        for split, take in chosen.items()
    }


def _common_items(tables: list[pa.Table], languages: list[str]) -> np.ndarray:
    """Row numbers (languages, items) of the groups that every language has with one label."""
    for table, language in zip(tables, languages, strict=True):
        if table["group"].null_count:
            raise ValueError(
                f"a parallel task needs `group` in every row, got "
                f"{table['group'].null_count} rows without in language {language!r}"
            )
        counted = table["group"].value_counts()
        if len(counted) < len(table):
            twice = next(entry for entry in counted.to_pylist() if entry["counts"] > 1)
            raise ValueError(
                f"a parallel task needs `group` to name one item per language, got "
                f"{twice['counts']} rows of group {twice['values']!r} in language {language!r}; "
                "map what holds several items together to `split_group` instead"
            )
    first = tables[0]
    found = [pc.index_in(first["group"], value_set=table["group"]) for table in tables]
    agreed = pc.is_valid(found[0])
    for table, rows in zip(tables, found, strict=True):
        agreed = pc.and_(agreed, pc.equal(first["label"], table["label"].take(rows)))
    agreed = pc.fill_null(agreed, False)
    return np.stack([rows.filter(agreed).to_numpy() for rows in found])


def _draw_apart(
    tables: Tables, splits: Sequence[str], num_labels: int, config: TaskConfig
) -> dict[str, Tables]:
    if len(splits) > 1:
        return _draw_languages(tables, splits, num_labels, config, _generator(config, splits))
    # No group to keep in one split: each language by itself, whichever others there are.
    drawn: Tables = {}
    for language, table in tables.items():
        generator = _generator(config, [*splits, language])
        alone = _draw_languages({language: table}, splits, num_labels, config, generator)
        drawn |= alone[splits[0]]
    return {splits[0]: drawn}


def _draw_languages(
    tables: Tables,
    splits: Sequence[str],
    num_labels: int,
    config: TaskConfig,
    generator: np.random.Generator,
) -> dict[str, Tables]:
    quotas = {split: np.zeros(0, dtype=np.int64) for split in splits}
    for language, table in tables.items():
        counts = _counts(config, splits, language)
        _require(len(table), counts, f"examples of language {language!r}")
        here = _quotas(np.bincount(table["label"].to_numpy(), minlength=num_labels), counts)
        quotas = {split: np.concatenate([quotas[split], here[split]]) for split in splits}
    rows = pa.concat_tables(tables.values())
    blocks = np.repeat(np.arange(len(tables)), [len(table) for table in tables.values()])
    strata = blocks * num_labels + rows["label"].to_numpy()
    chosen = _draw(strata, blocks, _units(rows, len(splits)), quotas, generator)
    return {
        split: {name: rows.take(take[blocks[take] == i]) for i, name in enumerate(tables)}
        for split, take in chosen.items()
    }


def _require(available: int, counts: dict[str, int], what: str) -> None:
    if available < sum(counts.values()):
        asked = " + ".join(f"{split} {count}" for split, count in counts.items())
        raise ValueError(f"too few {what}: wanted {asked} per language, available {available}")


def _concat(tables: list[pa.Table]) -> pa.Table:
    return pa.concat_tables(tables).select(SCHEMA.names).combine_chunks()


def _generator(config: TaskConfig, what: Sequence[str]) -> np.random.Generator:
    return np.random.default_rng([config.seed, zlib.crc32("-".join(what).encode())])


def _quotas(available: np.ndarray, counts: dict[str, int]) -> Quotas:
    """How many of each class each split gets: even, and what is rare shared out in proportion."""
    left, rest = available.copy(), sum(counts.values())
    quotas = {}
    for split, count in counts.items():
        share = np.array([math.ceil(n * count / rest) for n in left])
        quotas[split] = _fill_evenly(np.minimum(share, left), left, count)
        left, rest = left - quotas[split], rest - count
    return quotas


def _fill_evenly(limits: np.ndarray, left: np.ndarray, count: int) -> np.ndarray:
    """`count` spread over the classes as evenly as `limits` allow, ties to what is plentiful."""
    filled = np.zeros_like(limits)
    for _ in range(count):
        open_classes = np.flatnonzero(filled < limits)
        filled[min(open_classes, key=lambda c: (filled[c], filled[c] - left[c], c))] += 1
    return filled


def _units(rows: pa.Table, num_splits: int) -> np.ndarray:
    """A number per row, the same for rows that have to stay in one split."""
    if num_splits == 1:
        return np.arange(len(rows))
    # Marked by column, so that an id never meets a group of the same name.
    keys = [
        pc.binary_join_element_wise(name, rows[name], ":")
        for name in ("split_group", "group", "id")
    ]
    codes = pc.coalesce(*keys).combine_chunks().dictionary_encode()
    return codes.indices.to_numpy()


def _draw(
    strata: np.ndarray,
    blocks: np.ndarray,
    units: np.ndarray,
    quotas: Quotas,
    generator: np.random.Generator,
) -> dict[str, np.ndarray]:
    """Give units, in random order, to the splits that need them most; then fill what is short."""
    needs = {split: quota.copy() for split, quota in quotas.items()}
    totals = {split: max(1, int(quota.sum())) for split, quota in quotas.items()}
    taken: dict[str, list[int]] = {split: [] for split in quotas}
    spare: dict[str | None, list[np.ndarray]] = {split: [] for split in (*quotas, None)}
    for rows in _shuffled_units(units, generator):
        if not any(need.any() for need in needs.values()):
            break
        split = _neediest(strata[rows], needs, totals)
        left_over = []
        for row in rows:
            if split is not None and needs[split][strata[row]]:
                needs[split][strata[row]] -= 1
                taken[split].append(row)
            else:
                left_over.append(row)
        spare[split].append(np.array(left_over, dtype=np.int64))
    _fill_short(taken, spare, needs, strata, blocks)
    return {split: np.array(rows, dtype=np.int64) for split, rows in taken.items()}


def _shuffled_units(units: np.ndarray, generator: np.random.Generator) -> Iterator[np.ndarray]:
    order = np.argsort(units, kind="stable")
    starts = np.searchsorted(units[order], np.arange(units.max() + 2))
    for unit in generator.permutation(len(starts) - 1):
        yield order[starts[unit] : starts[unit + 1]]


def _neediest(
    strata: np.ndarray, needs: dict[str, np.ndarray], totals: dict[str, int]
) -> str | None:
    present, counts = np.unique(strata, return_counts=True)
    best, best_key = None, (0, 0.0)
    for split, need in needs.items():
        gain = int(np.minimum(need[present], counts).sum())
        key = (gain, need.sum() / totals[split])
        if gain and key > best_key:
            best, best_key = split, key
    return best


def _fill_short(
    taken: dict[str, list[int]],
    spare: dict[str | None, list[np.ndarray]],
    needs: dict[str, np.ndarray],
    strata: np.ndarray,
    blocks: np.ndarray,
) -> None:
    """Where whole groups did not add up, take other classes from a split's own or free groups."""
    for split, need in needs.items():
        per_block = need.reshape(blocks.max() + 1, -1)
        short = per_block.sum(axis=1)
        for home in (split, None):
            for index, rows in enumerate(spare[home]):
                if not short.any():
                    break
                use = []
                for row in rows:
                    if short[blocks[row]]:
                        short[blocks[row]] -= 1
                        use.append(row)
                taken[split].extend(use)
                if use and home is None:
                    spare[None][index] = np.zeros(0, dtype=np.int64)
        if short.any():
            raise ValueError(
                f"split {split!r} is {int(short.sum())} examples short: the groups are too large "
                "to be divided among the splits; ask for fewer examples"
            )
