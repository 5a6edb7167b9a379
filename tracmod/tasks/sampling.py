"""Draw the splits of a task: a number of examples per language, balanced, no shared groups."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tracmod.config import TaskConfig
from tracmod.tasks.examples import SPLITS, Corpus, Pool, TaskData

# Split -> number of examples to draw per stratum. A stratum is a class or, where languages have
# different items, a class of one language: stratum = language index * number of classes + label.
Quotas = Mapping[str, np.ndarray]
Tables = dict[str, pa.Table]  # language -> its examples


def sample(corpus: Corpus, config: TaskConfig) -> TaskData:
    """Draw the splits of a corpus.

    Every language gets exactly the configured number of examples in each split. Classes are
    balanced as far as the data allow (their counts then differ by at most 1). A parallel task gets
    the same items in every language; items that a language lacks or labels differently are left
    out. The result depends on `config.seed` and the data only.

    Leaving a language out of `train_languages` changes neither the other splits nor the training
    examples of the other languages. (There is one exception: if a parallel task has a separate
    training file, items that only this language lacks may then be drawn.) In a parallel task, a
    language with a smaller number in `train_counts` gets a part of the items with the same
    proportion of classes.

    Args:
        corpus: all examples of the task.
        config: the languages, and the number of examples per language and split.

    Raises:
        ValueError: too few examples (the message names language, splits, needed and available), a
            parallel task whose `group` is not one item per language, or `test_from_train` in a task
            that is not parallel.
    """
    if config.test_from_train and not corpus.parallel:
        raise ValueError(
            f"test_from_train: expected false for task {config.name}, which is not parallel"
        )
    draw = _draw_parallel if corpus.parallel else _draw_separately
    groups_overlap = _groups_overlap(corpus.pools)
    drawn: dict[str, Tables] = {}
    for pool in corpus.pools:
        splits = [s for s in pool.splits if s != "test" or not config.test_from_train]
        if not splits:
            continue
        table = pool.table
        if groups_overlap:  # groups of different pools are different items: mark them
            marked = pc.binary_join_element_wise("-".join(pool.splits), table["group"], "-")
            table = table.set_column(table.schema.get_field_index("group"), "group", marked)
        needed = {language for split in splits for language in config.languages_of(split)}
        languages = [language for language in config.languages if language in needed]
        tables = {
            language: table.filter(pc.equal(table["language"], language)) for language in languages
        }
        drawn |= draw(tables, splits, len(corpus.label_names), config)
    if config.test_from_train:
        drawn["train"], drawn["test"] = _hold_out(drawn["train"], config.test_per_language)
    # The examples of a smaller `train_count` are part of those of a larger one, in the same order.
    drawn["train"] = {
        language: table.take(np.sort(_spread_classes(table)[: config.train_count(language)]))
        for language, table in drawn["train"].items()
        if language in config.trained_languages
    }
    return TaskData(
        name=config.name,
        label_names=corpus.label_names,
        languages=list(config.languages),
        parallel=corpus.parallel,
        **{
            split: pa.concat_tables(drawn[split].values())
            .drop_columns("split_group")
            .combine_chunks()
            for split in SPLITS
        },
        tag_names=corpus.tag_names,
    )


def _counts(config: TaskConfig, splits: Sequence[str], language: str) -> dict[str, int]:
    """Return the number of examples to draw in a language, per split.

    With `test_from_train`, the training split includes the test examples that are held out of it.
    """
    counts = {
        "train": config.train_count(language),
        "dev": config.dev_per_language,
        "test": config.test_per_language,
    }
    if config.test_from_train:
        counts["train"] += counts["test"]
    return {split: counts[split] for split in splits}


def _hold_out(train: Tables, size: int) -> tuple[Tables, Tables]:
    """Move `size` examples of each language from train to test, each language other items."""
    kept, held_out = {}, {}
    for position, (language, table) in enumerate(train.items()):
        is_test = np.zeros(len(table), dtype=bool)
        is_test[_spread_classes(table)[position * size : (position + 1) * size]] = True
        kept[language] = table.filter(pa.array(~is_test))
        held_out[language] = table.filter(pa.array(is_test))
    return kept, held_out


def _spread_classes(table: pa.Table) -> np.ndarray:
    """Return the row numbers in an order that spreads every class evenly.

    Any stretch of the order then has the classes in about the proportion of the whole table. Row i
    of the n rows of a class is placed at (i + 1/2) / n.
    """
    labels = table["label"].to_numpy()
    position = np.empty(len(labels))
    for label in np.unique(labels):
        in_class = np.flatnonzero(labels == label)
        position[in_class] = (np.arange(len(in_class)) + 0.5) / len(in_class)
    return np.argsort(position, kind="stable")


def _groups_overlap(pools: list[Pool]) -> bool:
    """Return whether two pools use the same name for a group, as files that number groups do."""
    seen: set[str] = set()
    for pool in pools:
        groups = set(pool.table["group"].drop_null().to_pylist())
        if groups & seen:
            return True
        seen |= groups
    return False


def _draw_parallel(
    tables: Tables, splits: Sequence[str], num_labels: int, config: TaskConfig
) -> dict[str, Tables]:
    """Draw splits of the same items in every language."""
    languages = list(tables)
    counts_by_language = [_counts(config, splits, language) for language in languages]
    counts = {split: max(own[split] for own in counts_by_language) for split in splits}
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
    """Return the row numbers (languages, items) of the items that all languages label alike."""
    for table, language in zip(tables, languages, strict=True):
        if table["group"].null_count:
            raise ValueError(
                f"group: expected a value in every row of a parallel task, got "
                f"{table['group'].null_count} rows without one in language {language!r}"
            )
        sizes = table["group"].value_counts()
        if len(sizes) < len(table):
            repeated = next(entry for entry in sizes.to_pylist() if entry["counts"] > 1)
            raise ValueError(
                f"group: expected one row per item and language of a parallel task, got "
                f"{repeated['counts']} rows of group {repeated['values']!r} in language "
                f"{language!r}; a column that holds several items together is a `split_group`"
            )
    first = tables[0]
    rows_of = [pc.index_in(first["group"], value_set=table["group"]) for table in tables]
    agree = pc.is_valid(rows_of[0])
    for table, rows in zip(tables, rows_of, strict=True):
        agree = pc.and_(agree, pc.equal(first["label"], table["label"].take(rows)))
    agree = pc.fill_null(agree, False)  # null where a language lacks the item
    return np.stack([rows.filter(agree).to_numpy() for rows in rows_of])


def _draw_separately(
    tables: Tables, splits: Sequence[str], num_labels: int, config: TaskConfig
) -> dict[str, Tables]:
    """Draw splits of different items in every language."""
    if len(splits) > 1:
        return _draw_languages(tables, splits, num_labels, config, _generator(config, splits))
    # A single split has no groups to keep apart, so each language is drawn by itself. Its examples
    # then do not depend on which other languages there are.
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
    """Draw splits of all languages together, so that no group is in two splits."""
    quotas = {split: np.zeros(0, dtype=np.int64) for split in splits}
    for language, table in tables.items():
        counts = _counts(config, splits, language)
        _require(len(table), counts, f"examples of language {language!r}")
        own = _quotas(np.bincount(table["label"].to_numpy(), minlength=num_labels), counts)
        quotas = {split: np.concatenate([quotas[split], own[split]]) for split in splits}
    rows = pa.concat_tables(tables.values())
    blocks = np.repeat(np.arange(len(tables)), [len(table) for table in tables.values()])
    strata = blocks * num_labels + rows["label"].to_numpy()
    chosen = _draw(strata, blocks, _units(rows, len(splits)), quotas, generator)
    return {
        split: {name: rows.take(take[blocks[take] == i]) for i, name in enumerate(tables)}
        for split, take in chosen.items()
    }


def _require(available: int, counts: dict[str, int], what: str) -> None:
    """Check that there are as many examples or items as all splits need together."""
    if available < sum(counts.values()):
        needed = " + ".join(f"{split} {count}" for split, count in counts.items())
        raise ValueError(f"{what}: expected at least {needed} per language, got {available}")


def _generator(config: TaskConfig, names: Sequence[str]) -> np.random.Generator:
    """Return a generator that depends on the seed of the task and on names."""
    return np.random.default_rng([config.seed, zlib.crc32("-".join(names).encode())])


def _quotas(available: np.ndarray, counts: dict[str, int]) -> Quotas:
    """Return the number of examples of each class that each split gets.

    Within a split, classes are as even as possible. No split gets more of a class than its share of
    the examples, so that a rare class is divided among the splits in proportion to their sizes.

    Args:
        available: number of examples per class.
        counts: split -> number of its examples.
    """
    left, to_draw = available.copy(), sum(counts.values())
    quotas = {}
    for split, count in counts.items():
        share = np.array([math.ceil(n * count / to_draw) for n in left])
        quotas[split] = _fill_evenly(np.minimum(share, left), left, count)
        left, to_draw = left - quotas[split], to_draw - count
    return quotas


def _fill_evenly(limits: np.ndarray, left: np.ndarray, count: int) -> np.ndarray:
    """Return `count` distributed over the classes as evenly as `limits` allow.

    Of classes with equally many so far, the one with most examples left is filled first.
    """
    filled = np.zeros_like(limits)
    for _ in range(count):
        open_classes = np.flatnonzero(filled < limits)
        filled[min(open_classes, key=lambda c: (filled[c], filled[c] - left[c], c))] += 1
    return filled


def _units(rows: pa.Table, num_splits: int) -> np.ndarray:
    """Return a number per row that is the same for rows that must stay in one split."""
    if num_splits == 1:
        return np.arange(len(rows))
    # With the name of the column, so that an id never equals a group of the same name.
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
    """Return the rows of each split.

    Units are taken in random order, and each goes to the split that can use most of its rows. If
    whole units do not add up to the quotas, `_fill_short` completes the splits.

    Args:
        strata: the stratum of each row.
        blocks: the language of each row, as a number.
        units: the unit of each row; all rows of a unit stay in one split.
        quotas: the number of rows per split and stratum.
        generator: draws the order of the units.
    """
    needs = {split: quota.copy() for split, quota in quotas.items()}
    totals = {split: max(1, int(quota.sum())) for split, quota in quotas.items()}
    taken: dict[str, list[int]] = {split: [] for split in quotas}
    # Rows that are not taken, by the split of their unit; None: units that no split can use.
    spare: dict[str | None, list[np.ndarray]] = {split: [] for split in (*quotas, None)}
    for rows in _shuffled_units(units, generator):
        if not any(need.any() for need in needs.values()):
            break
        split = _neediest(strata[rows], needs, totals)
        unused = []
        for row in rows:
            if split is not None and needs[split][strata[row]]:
                needs[split][strata[row]] -= 1
                taken[split].append(row)
            else:
                unused.append(row)
        spare[split].append(np.array(unused, dtype=np.int64))
    _fill_short(taken, spare, needs, strata, blocks)
    return {split: np.array(rows, dtype=np.int64) for split, rows in taken.items()}


def _shuffled_units(units: np.ndarray, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield the rows of each unit, in random order of the units."""
    order = np.argsort(units, kind="stable")
    starts = np.searchsorted(units[order], np.arange(units.max() + 2))
    for unit in generator.permutation(len(starts) - 1):
        yield order[starts[unit] : starts[unit + 1]]


def _neediest(
    strata: np.ndarray, needs: dict[str, np.ndarray], totals: dict[str, int]
) -> str | None:
    """Return the split that can use most rows of a unit, then the one furthest from complete.

    Args:
        strata: the strata of the rows of the unit.
        needs: split -> number of rows still needed per stratum.
        totals: split -> number of rows needed in all.
    """
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
    """Complete splits with rows of other classes: first from their own units, then from free ones.

    The number of rows per language becomes exact; the balance of the classes gives way. `taken` and
    `spare` are changed in place.
    """
    for split, need in needs.items():
        short = need.reshape(blocks.max() + 1, -1).sum(axis=1)  # rows needed per language
        for owner in (split, None):
            for index, rows in enumerate(spare[owner]):
                if not short.any():
                    break
                used = []
                for row in rows:
                    if short[blocks[row]]:
                        short[blocks[row]] -= 1
                        used.append(row)
                taken[split].extend(used)
                if used and owner is None:  # the unit now belongs to this split
                    spare[None][index] = np.zeros(0, dtype=np.int64)
        if short.any():
            raise ValueError(
                f"split {split!r}: {int(short.sum())} examples short, because the groups are too "
                "large to be divided among the splits; expected fewer examples per language"
            )
