"""The configuration: one validated model per stage, read from YAML, overridden by key=value."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from tracmod.choices import MetricKind, ParameterSet, PassDtype, StoreDtype

Combine = Literal["first", "union", "majority", "intersection"]
Method = Literal[
    "tracin",
    "tracin-dot",
    "tracin-cosine",
    "adam",
    "ekfac",
    "ekfac-last",
    "bm25",
    "embedding",
    "random",
]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TaskConfig(_Section):
    """Which examples: the task, its languages and how many of each split per language."""

    name: Literal["grammar", "planted", "xnli", "pawsx", "marc", "files"] = "grammar"
    shape: Literal["nli", "paraphrase", "reviews"] = Field(
        "nli", description="grammar only: which task the embedded sentences are put in the shape of"
    )
    languages: list[str] = Field(min_length=1)
    path: Path | None = Field(
        None, description="xnli, pawsx, marc: folder of the published files; absent: the Hub"
    )
    hub_name: str | None = Field(None, description="another Hub data set of the same format")
    train_file: str | None = Field(
        None, description="files only: path, may hold {language}; .tsv .csv .jsonl .parquet, .gz"
    )
    dev_file: str | None = Field(None, description="files only; absent: taken from the train file")
    test_file: str | None = Field(None, description="files only; absent: taken from the train file")
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="files only: our column name -> the file's; ours are id, language, text_a, "
        "text_b, label, group, and split_group: what must stay in one split (absent: group)",
    )
    parallel: bool = Field(
        False,
        description="files only: `group` names one item, the same in every language, once in each",
    )
    train_per_language: int = Field(ge=1)
    dev_per_language: int = Field(ge=1)
    test_per_language: int = Field(ge=1)
    train_languages: list[str] | None = Field(
        None,
        min_length=1,
        description="which languages are trained on; absent: all. The others are pruned and tested "
        "without training data of their own (zero-shot, leave-one-out)",
    )
    train_counts: dict[str, Annotated[int, Field(ge=1)]] = Field(
        default_factory=dict,
        description="training examples of single languages, in place of train_per_language",
    )
    test_from_train: bool = Field(
        False,
        description="parallel tasks only: every test item is among the training items of all other "
        "languages, and not of its own; each language has test items of its own",
    )
    shared_words: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(
        default_factory=lambda: {"near": 0.75, "far": 0.4},
        description="planted only: share of the words of language base that these two have too",
    )
    duplicates: int = Field(
        6, ge=0, description="planted only: test examples per language that are trained on as well"
    )
    flipped: float = Field(
        0.1, ge=0, lt=0.5, description="planted only: share of the training examples mislabelled"
    )
    seed: int = 0

    def languages_of(self, split: str) -> list[str]:
        """The languages that a split's examples are drawn from, in the order of `languages`."""
        if split != "train" or self.test_from_train:
            return self.languages
        return self.trained_languages

    @property
    def trained_languages(self) -> list[str]:
        """The languages that have training data, in the order of `languages`."""
        chosen = self.languages if self.train_languages is None else self.train_languages
        return [language for language in self.languages if language in chosen]

    def train_count(self, language: str) -> int:
        """How many training examples are drawn in a language."""
        return self.train_counts.get(language, self.train_per_language)

    @field_validator("languages", "train_languages")
    @classmethod
    def _distinct(cls, languages: list[str] | None) -> list[str] | None:
        if languages is None:
            return None
        repeated = sorted({language for language in languages if languages.count(language) > 1})
        if repeated:
            raise ValueError(f"each language once, got {', '.join(repeated)} more than once")
        return languages

    @model_validator(mode="after")
    def _files_need_a_file(self) -> TaskConfig:
        if self.name == "files" and self.train_file is None:
            raise ValueError("task `files` needs train_file")
        return self

    @model_validator(mode="after")
    def _planted_answers_are_known(self) -> TaskConfig:
        if self.name != "planted":
            return self
        if set(self.shared_words) != {"near", "far"}:
            raise ValueError(
                f"shared_words: expected near and far, got {', '.join(self.shared_words) or 'none'}"
            )
        if self.train_languages is not None or self.test_from_train:
            raise ValueError(
                "task `planted` has training data in every language and makes its own duplicates: "
                "leave out train_languages and test_from_train"
            )
        # Two thirds of a language's test examples may be planted otherwise.
        most = self.test_per_language - 2 * (self.test_per_language // 3)
        fewest = min(map(self.train_count, self.languages))
        if self.duplicates > most or self.duplicates >= fewest:
            raise ValueError(
                f"duplicates: expected at most a third of test_per_language, {most}, and fewer "
                f"than the training examples of a language, {fewest}, got {self.duplicates}"
            )
        return self

    @model_validator(mode="after")
    def _training_data_is_of_known_languages(self) -> TaskConfig:
        unknown = sorted(set(self.train_languages or []) - set(self.languages))
        if unknown:
            raise ValueError(
                f"train_languages: expected some of {', '.join(self.languages)}, "
                f"got {', '.join(unknown)}"
            )
        untrained = sorted(set(self.train_counts) - set(self.trained_languages))
        if untrained:
            raise ValueError(
                f"train_counts: expected languages with training data, "
                f"{', '.join(self.trained_languages)}, got {', '.join(untrained)}"
            )
        return self

    @model_validator(mode="after")
    def _items_suffice_to_test_from_train(self) -> TaskConfig:
        if not self.test_from_train:
            return self
        if self.train_counts:
            raise ValueError("test_from_train needs the same items in all: leave out train_counts")
        if len(self.trained_languages) < 2:
            raise ValueError(
                "test_from_train: expected two languages with training data or more, so that each "
                f"item is trained in another, got {', '.join(self.trained_languages)}"
            )
        items = self.train_per_language + self.test_per_language
        wanted = len(self.languages) * self.test_per_language
        if wanted > items:
            raise ValueError(
                "test_from_train: expected train_per_language + test_per_language of at least "
                f"{len(self.languages)} languages x {self.test_per_language} test items, {wanted}, "
                f"got {items}"
            )
        return self


class ModelConfig(_Section):
    """A pretrained model by name, or the shape of a new XLM-R built from nothing."""

    name: str | None = Field(None, description="Hub name or folder; absent: build from the shape")
    layers: int = Field(4, ge=1)
    hidden: int = Field(128, ge=1)
    heads: int = Field(4, ge=1)
    intermediate: int | None = Field(None, ge=1, description="absent: 4 x hidden")
    dropout: float = Field(0.1, ge=0, lt=1)
    sentencepiece: Path | None = Field(
        None, description="tokenizer of a new model from this SentencePiece file (.gz too)"
    )
    vocabulary: int = Field(
        4000, ge=300, description="size of the tokenizer trained on the task's training text"
    )
    max_length: int = Field(128, ge=8, description="tokens; longer examples are cut")

    @model_validator(mode="after")
    def _heads_divide(self) -> ModelConfig:
        if self.hidden % self.heads:
            raise ValueError(
                f"hidden must be a multiple of heads, got hidden {self.hidden}, heads {self.heads}"
            )
        return self


class FinetuneConfig(_Section):
    """AdamW with linear warm-up and decay; one checkpoint per epoch."""

    epochs: int = Field(3, ge=1)
    batch_size: int = Field(32, ge=1)
    learning_rate: float = Field(2e-5, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    warmup: float = Field(0.1, ge=0, le=1, description="share of all steps")
    max_grad_norm: float = Field(1.0, gt=0)
    save_seconds: float = Field(
        300.0, gt=0, description="how often the state to resume from is written within an epoch"
    )
    sampling: Literal["proportional", "uniform"] = Field(
        "proportional",
        description="proportional: every example once per epoch; uniform: as many examples per "
        "epoch, and of each language equally many",
    )


class SparseFinetuneConfig(FinetuneConfig):
    """Fine-tuning through each language's head mask; what is not given here is as in `finetune`."""

    masks: Literal["static", "dynamic"] = Field(
        "static",
        description="static: those of the prune stage; dynamic: of the same size, re-estimated "
        "during training",
    )
    reestimate_every: int | None = Field(
        None, ge=1, description="dynamic only: in epochs, the first has the static masks; absent: 1"
    )
    shared: Literal["trained", "classifier", "frozen"] = Field(
        "trained",
        description="what no head owns (embeddings, feed-forward, LayerNorm, classifier, ...): "
        "all trained, only the classifier, or nothing of it",
    )

    @model_validator(mode="before")
    @classmethod
    def _dynamic_every_epoch(cls, tree: Any) -> Any:
        if not isinstance(tree, dict) or tree.get("masks") != "dynamic":
            return tree
        return {**tree, "reestimate_every": 1} if tree.get("reestimate_every") is None else tree

    @model_validator(mode="after")
    def _reestimation_happens(self) -> SparseFinetuneConfig:
        every = self.reestimate_every
        if every is not None and self.masks == "static":
            raise ValueError(
                f"reestimate_every is for masks: dynamic, got {every} with masks: static"
            )
        if every is not None and every >= self.epochs:
            raise ValueError(
                f"masks: dynamic re-estimates at the start of epoch {every + 1} first, expected "
                f"more epochs than reestimate_every, got {self.epochs} and {every}"
            )
        return self


class PruneConfig(_Section):
    """Iterative pruning of attention heads (Michel et al. 2019, Prasanna et al. 2020)."""

    threshold: float = Field(0.95, gt=0, le=1, description="share of the full score to keep")
    step: float = Field(0.10, gt=0, le=1, description="share of all heads pruned at a time")
    model: Literal["multilingual", "monolingual"] = Field(
        "multilingual",
        description="what is pruned: the model fine-tuned on all languages, or one per language, "
        "fine-tuned on its training examples alone",
    )
    seeds: int = Field(
        1, ge=1, description="fine-tunings pruned per language: seed, seed + 1, ... of the run"
    )
    combine: Combine = Field(
        "first", description="which heads are kept, where seeds differ: the first seed's, ..."
    )
    other_thresholds: list[Annotated[float, Field(gt=0, le=1)]] = Field(
        default_factory=list,
        description="further thresholds, whose masks go to subnetworks/thresholds/ and into the "
        "report; views are under `threshold`'s",
    )


class CollectConfig(_Section):
    """What the features are: parameters, projection, precision, batches."""

    every: int = Field(
        1, ge=1, description="every how many epochs a checkpoint counts; the last always does"
    )
    parameters: ParameterSet = "encoder"
    projection_dim: int = Field(4096, ge=1)
    projection_kind: Literal["rademacher", "sjlt"] = "rademacher"
    projection_layers: Literal["accumulate", "concatenate"] = "accumulate"
    projection_seed: int = Field(0, ge=0)
    batch_tokens: int = Field(8192, ge=1)
    dtype: PassDtype = "float32"
    shard_rows: int = Field(1024, ge=1, description="examples per file of a feature store")
    preconditioner: MetricKind = Field(
        "none",
        description="the metric of inner products and cosines: plain; adam: of Adam's steps, by "
        "its second moment at the checkpoint; ekfac: of the model's curvature, as influence "
        "functions have it",
    )
    damping: float = Field(
        0.1, gt=0, description="ekfac only: share of a layer's mean eigenvalue added to all"
    )
    store_dtype: StoreDtype = Field(
        "float32", description="of the features on disk; int8 with a scale per example"
    )
    features: str | None = Field(
        None,
        min_length=1,
        description="where features lie if not in the run folder: a folder, or a URL of object "
        "storage that fsspec knows (s3://bucket/folder); of this run alone",
    )

    @field_validator("features")
    @classmethod
    def _from_anywhere(cls, features: str | None) -> str | None:
        """A folder as an absolute path: workers, and later commands, may run in another one."""
        if features is None or "://" in features:
            return features
        return str(Path(features).absolute())


class ViewsConfig(_Section):
    """Under which head masks influence is computed, beside the full model."""

    subnetwork: bool = Field(
        True, description="the test example's language's mask, on its gradient and on all training"
    )
    subnetwork_own: bool = Field(
        False, description="each example's gradient under its own language's mask"
    )
    subnetwork_test: bool = Field(
        False, description="the mask on the test gradient only, training gradients of all heads"
    )
    random: int = Field(1, ge=0, description="draws of random masks of each subnetwork's size")
    other: list[str] = Field(
        default_factory=list, description="every language's influence under these languages' masks"
    )
    union: list[tuple[str, str]] = Field(
        default_factory=list, description="pairs of languages: heads that either subnetwork keeps"
    )
    intersection: list[tuple[str, str]] = Field(
        default_factory=list, description="pairs of languages: heads that both subnetworks keep"
    )

    @model_validator(mode="after")
    def _of_subnetworks(self) -> ViewsConfig:
        if not self.subnetwork and (self.subnetwork_own or self.subnetwork_test):
            raise ValueError(
                "subnetwork_own and subnetwork_test are computed from the features of the view "
                "subnetwork: set subnetwork to true"
            )
        for name in ("union", "intersection"):
            same = [a for a, b in getattr(self, name) if a == b]
            if same:
                raise ValueError(f"{name} needs two different languages, got {same[0]} twice")
        return self

    @property
    def named_languages(self) -> set[str]:
        """The languages that views are asked for by name."""
        pairs = [*self.union, *self.intersection]
        return {*self.other, *(language for pair in pairs for language in pair)}


class CertifyConfig(_Section):
    """The fidelity certificate: a random sample of pairs of examples is scored exactly too."""

    queries: int = Field(20, ge=1, description="test examples at most; fewer in a small run")
    train: int = Field(200, ge=2, description="training examples at most; fewer in a small run")
    least_spearman: float = Field(
        0.95,
        ge=-1,
        le=1,
        description="mean rank correlation with exact scores below which the report and the run "
        "say loudly that rankings are not to be relied on",
    )


class InfluenceConfig(_Section):
    """How gradients become scores and language shares."""

    k: int | list[int] = Field(
        100,
        description="proponents and opponents kept per test example; of several, every table and "
        "figure is of the first, and shares are given for each",
    )
    normalize: Literal["cosine", "none"] = "cosine"
    weights: Literal["learning_rate", "uniform"] = Field(
        "learning_rate", description="what each checkpoint counts"
    )
    blocks: bool = Field(
        False,
        description="also mean influence by head and layer, of the views full and subnetwork; "
        "costs about 1.5 times what collecting these views does",
    )
    certify: CertifyConfig = CertifyConfig()
    memory: ByteSize = Field(
        ByteSize(4 * 10**9),
        gt=0,
        description="bytes that scoring may take for features, rankings and buffers, such as 4GB; "
        "changes no result",
    )

    @field_validator("k")
    @classmethod
    def _distinct_and_positive(cls, k: int | list[int]) -> int | list[int]:
        values = k if isinstance(k, list) else [k]
        if not values or min(values) < 1 or len(set(values)) < len(values):
            raise ValueError("expected a number from 1 on, or several of them, each once")
        return k

    @property
    def ks(self) -> list[int]:
        """Every k, the main one first."""
        return self.k if isinstance(self.k, list) else [self.k]


class AnalyzeConfig(_Section):
    """Intervals and tests."""

    bootstrap: int = Field(1000, ge=10, description="resamples of the test examples")
    permutations: int = Field(1000, ge=10, description="draws of the permutation tests")
    confidence: float = Field(0.95, gt=0, lt=1)
    distances: Path | None = Field(
        None,
        description="distances between languages to set beside influence: .tsv .csv .parquet, .gz; "
        "columns language_a, language_b and one or more of numbers",
    )
    distance_names: dict[str, str] = Field(
        default_factory=dict, description="our language -> the distance table's name for it"
    )


class RetrainConfig(_Section):
    """The full model trained again without some of its training examples, to check influence."""

    subsets: int = Field(
        32, ge=2, description="random subsets of the training examples, a model trained on each"
    )
    fraction: float = Field(0.5, gt=0, lt=1, description="of the training examples in a subset")
    seeds: int = Field(
        2,
        ge=1,
        description="trainings on the same examples, whose losses are averaged: seed, seed + 1, "
        "... of the run, for order and dropout; all begin with the run's own initial weights",
    )
    removed: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="share of the training examples left out as those that a method calls the "
        "strongest proponents, or opponents, of a test language; 0: no removals",
    )
    random_removals: int = Field(3, ge=1, description="draws of as many examples left out")
    leave_one_out: bool = Field(True, description="also train without each training language")
    methods: list[Method] | None = Field(
        None,
        min_length=1,
        description="whose scores are checked; absent: all, but for tracin by another name",
    )

    @field_validator("methods")
    @classmethod
    def _each_once(cls, methods: list[Method] | None) -> list[Method] | None:
        repeated = sorted({name for name in methods or [] if (methods or []).count(name) > 1})
        if repeated:
            raise ValueError(f"each method once, got {', '.join(repeated)} more than once")
        return methods


class RunConfig(_Section):
    """Everything `tracmod run` needs to know; one section per stage."""

    name: str = "run"
    seed: int = 0
    device: str = Field("auto", description="cpu, cuda, cuda:1, ...; auto: a GPU if there is one")
    task: TaskConfig
    model: ModelConfig = ModelConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    sparse_finetune: SparseFinetuneConfig | None = Field(
        None, description="absent: the same as finetune"
    )
    prune: PruneConfig = PruneConfig()
    views: ViewsConfig = ViewsConfig()
    collect: CollectConfig = CollectConfig()
    influence: InfluenceConfig = InfluenceConfig()
    analyze: AnalyzeConfig = AnalyzeConfig()
    retrain: RetrainConfig | None = Field(None, description="absent: nothing is trained again")

    @property
    def sparse(self) -> SparseFinetuneConfig:
        """`sparse_finetune`, or where it is absent the values of `finetune`."""
        return self.sparse_finetune or SparseFinetuneConfig(**self.finetune.model_dump())

    @model_validator(mode="before")
    @classmethod
    def _inherit_finetune(cls, tree: Any) -> Any:
        """Values that `sparse_finetune` does not give are those of `finetune`, not the defaults."""
        if not isinstance(tree, dict) or tree.get("sparse_finetune") is None:
            return tree
        full, sparse = (_given(tree.get(key, {})) for key in ("finetune", "sparse_finetune"))
        if not isinstance(full, dict) or not isinstance(sparse, dict):
            return tree  # and let each section's own validation say so
        return {**tree, "sparse_finetune": {**full, **sparse}}

    @model_validator(mode="after")
    def _monolingual_models_have_training_data(self) -> RunConfig:
        untrained = sorted(set(self.task.languages) - set(self.task.trained_languages))
        if self.prune.model == "monolingual" and untrained:
            raise ValueError(
                "prune.model: a monolingual model needs training data in every language, there is "
                f"none in {', '.join(untrained)}"
            )
        return self

    @model_validator(mode="after")
    def _blocks_are_of_plain_gradients(self) -> RunConfig:
        if self.influence.blocks and self.collect.preconditioner != "none":
            raise ValueError(
                "influence.blocks is of plain gradients: expected collect.preconditioner none, got "
                f"{self.collect.preconditioner}"
            )
        return self

    @model_validator(mode="after")
    def _something_is_left_out_and_left(self) -> RunConfig:
        asked, languages = self.retrain, self.task.trained_languages
        if asked is None:
            return self
        total = sum(map(self.task.train_count, languages))
        shares = {"fraction": asked.fraction, "removed": asked.removed}
        for name, share in shares.items():
            if share and not 0 < round(share * total) < total:
                raise ValueError(
                    f"retrain.{name}: expected a share of the {total} training examples that is "
                    f"one of them at least and not all, got {share}"
                )
        if asked.leave_one_out and len(languages) < 2:
            raise ValueError(
                "retrain.leave_one_out: expected two languages with training data or more, got "
                f"{', '.join(languages)}; set it to false"
            )
        return self

    @model_validator(mode="after")
    def _languages_of_views_exist(self) -> RunConfig:
        unknown = sorted(self.views.named_languages - set(self.task.languages))
        if unknown:
            raise ValueError(f"views: {', '.join(unknown)} not in task.languages")
        return self


def _given(section: Any) -> Any:
    """What a section's tree, or the model made of one, states."""
    return section.model_dump(exclude_unset=True) if isinstance(section, BaseModel) else section


def load_config(path: str | Path, overrides: tuple[str, ...] = ()) -> RunConfig:
    """Read a YAML file into a `RunConfig`, with `section.key=value` overrides applied.

    Args:
        path: a YAML file, or the name of an embedded one (`demo`).
        overrides: `section.key=value`; the value is read as YAML, so `[en, de]` is a list.

    Raises:
        ValueError: one line per fault: where, what was expected, what was found.
    """
    tree = read_tree(path)
    for key, value in parse_overrides(overrides).items():
        set_value(tree, key, value)
    return parse_config(tree, str(path))


def override_config(config: RunConfig, overrides: tuple[str, ...]) -> RunConfig:
    """The config with `section.key=value` overrides applied; errors as in `load_config`.

    A config read back from run.json does not tell what was inherited: a value of `sparse_finetune`
    that equals the one of `finetune` counts as inherited, and follows an override of it.
    """
    tree = config.model_dump(mode="json")
    if tree["sparse_finetune"] is not None:
        tree["sparse_finetune"] = {
            key: value
            for key, value in tree["sparse_finetune"].items()
            if value != tree["finetune"].get(key)
        }
    for key, value in parse_overrides(overrides).items():
        set_value(tree, key, value)
    return parse_config(tree, "--set")


def read_tree(path: str | Path, embedded: str = "") -> dict[str, Any]:
    """Read a YAML file, or the embedded one of that name, that has sections.

    Args:
        path: a file or a name.
        embedded: the folder of embedded configurations to look into: `sweeps`, or the uppermost.

    Raises:
        ValueError: no such file, not YAML, or no sections in it.
    """
    try:
        tree = yaml.safe_load(_config_text(path, embedded))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(tree, dict):
        raise ValueError(
            f"{path}: expected sections (task:, model:, ...), got {type(tree).__name__}"
        )
    return tree


def parse_config(tree: dict[str, Any], source: str) -> RunConfig:
    """Validate a tree of plain values; faults become one ValueError that names each place."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ValueError("; ".join(_fault(fault, source) for fault in error.errors())) from None


def _fault(fault: Any, source: str) -> str:
    where = ".".join(str(part) for part in fault["loc"]) or "config"
    got = f", got {fault['input']!r}" if not isinstance(fault["input"], dict) else ""
    message = fault["msg"].removeprefix("Value error, ")
    return f"{source}: {where}: {message}{got}"


def _config_text(path: str | Path, embedded: str) -> str:
    if Path(path).is_file():
        return Path(path).read_text(encoding="utf-8")
    resource = resources.files("tracmod.configs").joinpath(embedded, f"{path}.yaml")
    if resource.is_file():
        return resource.read_text(encoding="utf-8")
    raise ValueError(f"{path}: no such file, and no embedded configuration of that name")


def parse_overrides(overrides: tuple[str, ...]) -> dict[str, Any]:
    """`section.key=value`, each value read as YAML; the last of a key counts."""
    values = {}
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or not key:
            raise ValueError(f"--set {override}: expected key=value, for example finetune.epochs=5")
        try:
            values[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ValueError(f"--set {override}: {value} is not valid YAML") from None
    return values


def set_value(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set `section.key` in a tree of sections, in place."""
    *sections, last = key.split(".")
    node = tree
    for section in sections:
        if node.get(section) is None:  # not there, or stated to be absent
            node[section] = {}
        node = node[section]
        if not isinstance(node, dict):
            raise ValueError(f"{key}={value}: {section} is a value, not a section")
    node[last] = value


def parse_bytes(text: str) -> int:
    """A size such as 4GB (10^9 bytes each), 512MiB (2^20) or 1000, in bytes.

    Raises:
        ValueError: not a size, or less than one byte.
    """
    try:
        size = int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        size = 0
    if size < 1:
        raise ValueError(f"memory: expected a size such as 4GB or 512MiB, got {text!r}")
    return size
