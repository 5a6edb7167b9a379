"""Tasks whose words have tags: WikiANN, Universal Dependencies, and files of a user's own."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from tracmod.config import TaskConfig
from tracmod.tasks.examples import SPLITS, Corpus, Pool
from tracmod.tasks.files import check_disjoint
from tracmod.tasks.published import read_hub
from tracmod.tasks.readers import Row, read_rows, stated_class_names
from tracmod.tasks.tag_scores import sentence_classes
from tracmod.tasks.token_files import TokenFile, distinct_tags, pool_of_sentences

# Published corpora have no ids, and a file or configuration for each language.
NO_COLUMNS = {"id": "", "language": ""}
ENDINGS = (".parquet", ".jsonl", ".conll", ".bio", ".conllu")


def load_wikiann(config: TaskConfig) -> Corpus:
    """Load the published splits of named entities, with languages as WikiANN names them.

    With `task.path`, a split of a language is a file `<language>/<split>` or `<language>-<split>`
    in a format with tags.

    Source: Pan et al. 2017, Cross-lingual Name Tagging and Linking for 282 Languages; Rahimi et al.
        2019, Massively Multilingual Transfer for NER, ACL (the splits).
    """
    return _published(config, "unimelb-nlp/wikiann", "ner_tags", ("{}/{}", "{}-{}"))


def load_treebanks(config: TaskConfig) -> Corpus:
    """Load treebanks of Universal Dependencies, words with their UPOS; languages are treebanks.

    With `task.path`, they are the published files `<treebank>-ud-<split>.conllu` in that folder.
    Tokens that stand for several words (1-2 in CoNLL-U) have no tag and are left out.

    Source: Nivre et al. 2020, Universal Dependencies v2, LREC.
    """
    repository = "universal-dependencies/universal_dependencies"
    return _published(config, repository, "upos", ("{}-ud-{}",))


def load_tagged_files(config: TaskConfig) -> Corpus:
    """Read the task `tagged-files`; splits without a file of their own are drawn from train's."""
    assert config.train_file is not None  # checked by the config
    splits_of: dict[str, list[str]] = {}
    for split in SPLITS:
        template = getattr(config, f"{split}_file") or config.train_file
        splits_of.setdefault(template, []).append(split)
    files = {
        tuple(splits): _read_languages(template, config, splits)
        for template, splits in splits_of.items()
    }
    corpus = _corpus(files)
    check_disjoint(corpus.pools)
    return corpus


def _read_languages(template: str, config: TaskConfig, splits: Sequence[str]) -> list[TokenFile]:
    """Read a file of all languages, or one file per language that a split needs."""
    if "{language}" not in template:
        return [_with_warnings(TokenFile.read(template, config.columns, None))]
    needed = {language for split in splits for language in config.languages_of(split)}
    files = []
    for language in [language for language in config.languages if language in needed]:
        path = template.replace("{language}", language)
        file = TokenFile.read(path, config.columns, language)
        files.append(_with_ids(_with_warnings(file), language))
    return files


def _published(config: TaskConfig, repository: str, tags: str, names: Sequence[str]) -> Corpus:
    """Read the splits of a published corpus, from the Hub or from a folder.

    Args:
        config: the task.
        repository: the data set on the Hub; its configurations are the languages.
        tags: the column of the tags there.
        names: patterns of the files' names by language and split, the first one in messages.
    """
    files: dict[tuple[str, ...], list[TokenFile]] = {}
    for split in SPLITS:
        for language in config.languages_of(split):
            if config.path is None:
                source = config.hub_name or repository
                file = _from_hub(source, language, split, tags, names[0])
            else:
                path = _find(config.path, [name.format(language, split) for name in names])
                file = _from_file(path, language, tags)
            files.setdefault((split,), []).append(_with_ids(file, f"{language}-{split}"))
    return _corpus(files)


def _from_hub(repository: str, language: str, split: str, tags: str, files: str) -> TokenFile:
    columns = {"tokens": "tokens", tags: tags}
    rows = read_hub(repository, language, split, columns, f"the files {files}")
    numbered = ((number, row) for number, (_, row) in enumerate(rows))
    path = f"{repository} ({language}, {split})"
    whole = _whole_sentences(path, numbered, tags)
    return TokenFile.of_rows(path, whole, NO_COLUMNS | {"tags": tags}, language)


def _from_file(path: Path, language: str, tags: str) -> TokenFile:
    tags = tags if path.suffix in (".parquet", ".jsonl") else "tags"
    whole = _whole_sentences(str(path), read_rows(path), tags)
    columns = NO_COLUMNS | {"tags": tags}
    return TokenFile.of_rows(path, whole, columns, language, stated=stated_class_names)


def _corpus(files: dict[tuple[str, ...], list[TokenFile]]) -> Corpus:
    """Return the sentences of files by the splits that are drawn from them."""
    tag_names = distinct_tags(itertools.chain(*files.values()))
    if len(tag_names) < 2:
        first = next(iter(files.values()))[0].path
        raise ValueError(f"{first}: expected two tags or more, got only {', '.join(tag_names)}")
    pools = [Pool(pool_of_sentences(own, tag_names), splits) for splits, own in files.items()]
    return Corpus(sentence_classes(tag_names), False, pools, tag_names)


def _find(folder: Path, names: Sequence[str]) -> Path:
    """Return the first file with one of these names and an ending of a format with tags."""
    for name in names:
        for ending in ENDINGS:
            if (folder / f"{name}{ending}").is_file():
                return folder / f"{name}{ending}"
    raise ValueError(
        f"{folder}: expected a file {names[0]} with one of the endings {', '.join(ENDINGS)}, "
        f"found none"
    )


def _whole_sentences(path: str, rows: Iterator[Row], tags: str) -> Iterator[Row]:
    """Yield the sentences of a published corpus, without what has no word or no tag.

    Words that are blank are left out of the published sentences, and sentences without words; a
    warning says how many.
    """
    words = sentences = 0
    for number, row in rows:
        tokens, own_tags = row.get("tokens"), row.get(tags)
        if not isinstance(tokens, list) or not isinstance(own_tags, list):
            yield number, row  # refused by the checks that follow
            continue
        if len(tokens) != len(own_tags):
            yield number, row
            continue
        pairs = [
            (token, tag)
            for token, tag in zip(tokens, own_tags, strict=True)
            if tag != "_" and isinstance(token, str) and token.strip()
        ]
        words += sum(tag != "_" for tag in own_tags) - len(pairs)
        if pairs:
            yield number, row | {"tokens": [a for a, _ in pairs], tags: [b for _, b in pairs]}
        sentences += not pairs
    if words or sentences:
        warnings.warn(
            f"{path}: {words} blank words and {sentences} sentences without words are left out",
            stacklevel=2,
        )


def _with_ids(file: TokenFile, prefix: str) -> TokenFile:
    """Make the ids of a file differ from those of other files, which may number alike."""
    file.values["id"] = [f"{prefix}-{number}" for number in file.values["id"]]
    return file


def _with_warnings(file: TokenFile) -> TokenFile:
    for note in file.notes:
        warnings.warn(note, stacklevel=3)
    return file
