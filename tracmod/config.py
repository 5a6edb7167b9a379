"""The configuration of a run: one model per section, read from YAML, overridden by key=value."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from tracmod.choices import (
    DEFAULT_MEMORY,
    LARGEST_INT,
    Combine,
    Denominator,
    Method,
    MetricKind,
    ModelName,
    Normalization,
    ParameterSet,
    PassDtype,
    ProjectionKind,
    ProjectionLayers,
    Sampling,
    SharedParameters,
    StoreDtype,
)
from tracmod.files.yaml_tree import parse_overrides, read_tree, set_value


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse booleans and text for numbers, which pydantic would convert."""
        assert info.field_name is not None
        if _is_numeric(cls.model_fields[info.field_name].annotation):
            values = value.values() if isinstance(value, dict) else value
            for number in values if isinstance(values, Iterable) else [values]:
                if isinstance(value, str) or isinstance(number, bool | str):
                    raise ValueError(f"expected a number, got {value!r}")
                if isinstance(number, int) and abs(number) > LARGEST_INT:
                    raise ValueError(f"expected at most {LARGEST_INT}, got {number}")
        return value


def _is_numeric(annotation: Any) -> bool:
    """Return whether a field holds numbers, or lists or dicts of numbers, and nothing else."""
    if annotation in (int, float):
        return True
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _is_numeric(arguments[0])
    if origin in (list, dict):
        return _is_numeric(arguments[-1])
    if origin in (Union, UnionType):
        return all(part is NoneType or _is_numeric(part) for part in arguments)
    return False


class TaskConfig(_Section):
    """The examples: the task, its languages, and the number of examples per language and split."""

    name: Literal["grammar", "planted", "xnli", "pawsx", "marc", "files"] = Field(
        "grammar",
        description="Task: built-in (grammar, planted), public (xnli, pawsx, marc), or your own "
        "files (files).",
    )
    shape: Literal["nli", "paraphrase", "reviews"] = Field(
        "nli", description="grammar only: the kind of task that the sentences make up."
    )
    languages: list[str] = Field(min_length=1, description="Languages, each once.")
    path: Path | None = Field(
        None,
        description="xnli, pawsx, marc only: folder with the published files. Default: the Hub.",
    )
    hub_name: str | None = Field(
        None, description="xnli, pawsx, marc only: another Hub data set of the same format."
    )
    train_file: str | None = Field(
        None,
        description="files only: path of the training examples (.tsv, .csv, .jsonl, .parquet, each "
        "also .gz). It may contain {language}.",
    )
    dev_file: str | None = Field(
        None,
        description="files only: path of the dev examples. Default: drawn from train_file.",
    )
    test_file: str | None = Field(
        None,
        description="files only: path of the test examples. Default: drawn from train_file.",
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="files only: name of a column here -> its name in the files. The columns are "
        "id, language, text_a, text_b, label, group, and split_group, which names examples that "
        "must stay in one split (default: group).",
    )
    parallel: bool = Field(
        False,
        description="files only: `group` identifies an item that every language has exactly once.",
    )
    train_per_language: int = Field(ge=1, description="Number of training examples per language.")
    dev_per_language: int = Field(ge=1, description="Number of dev examples per language.")
    test_per_language: int = Field(ge=1, description="Number of test examples per language.")
    train_languages: list[str] | None = Field(
        None,
        min_length=1,
        description="Languages with training data. Default: all. The others are pruned and tested "
        "without training data of their own (zero-shot, leave-one-out).",
    )
    train_counts: dict[str, Annotated[int, Field(ge=1)]] = Field(
        default_factory=dict,
        description="Language -> number of training examples, in place of train_per_language.",
    )
    test_from_train: bool = Field(
        False,
        description="Parallel tasks only: every test item is a training item of all languages but "
        "its own. Each language has different test items.",
    )
    shared_words: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(
        default_factory=lambda: {"near": 0.75, "far": 0.4},
        description="planted only: share of the words of the language base that the languages near "
        "and far have in common with it.",
    )
    duplicates: int = Field(
        6, ge=0, description="planted only: test examples per language that are also trained on."
    )
    flipped: float = Field(
        0.1,
        ge=0,
        lt=0.5,
        description="planted only: share of training examples with a wrong label.",
    )
    seed: int = Field(0, ge=0, description="Seed of the examples that are drawn.")

    def languages_of(self, split: str) -> list[str]:
        """Return the languages that a split is drawn from, in the order of `languages`."""
        if split != "train" or self.test_from_train:
            return self.languages
        return self.trained_languages

    @property
    def trained_languages(self) -> list[str]:
        """The languages with training data, in the order of `languages`."""
        trained = self.languages if self.train_languages is None else self.train_languages
        return [language for language in self.languages if language in trained]

    def train_count(self, language: str) -> int:
        """Return the number of training examples of a language."""
        return self.train_counts.get(language, self.train_per_language)

    @field_validator("languages", "train_languages")
    @classmethod
    def _check_distinct(cls, languages: list[str] | None) -> list[str] | None:
        repeated = _repeated(languages or [])
        if repeated:
            raise ValueError(f"expected each language once, got {repeated} more than once")
        return languages

    @model_validator(mode="after")
    def _check_files(self) -> TaskConfig:
        if self.name == "files" and self.train_file is None:
            raise ValueError("train_file: expected a path for the task files, got none")
        return self

    @model_validator(mode="after")
    def _check_planted(self) -> TaskConfig:
        if self.name != "planted":
            return self
        if set(self.shared_words) != {"near", "far"}:
            raise ValueError(
                "shared_words: expected the keys near and far, got "
                f"{', '.join(self.shared_words) or 'none'}"
            )
        if self.train_languages is not None or self.test_from_train:
            raise ValueError(
                "train_languages, test_from_train: expected neither for the task planted, which "
                "has training data in every language and makes its own duplicates"
            )
        # Up to two thirds of the test examples of a language are planted loan pairs instead.
        most = self.test_per_language - 2 * (self.test_per_language // 3)
        fewest = min(map(self.train_count, self.languages))
        if self.duplicates > most or self.duplicates >= fewest:
            raise ValueError(
                f"duplicates: expected at most a third of test_per_language ({most}) and fewer "
                f"than the training examples of each language ({fewest}), got {self.duplicates}"
            )
        return self

    @model_validator(mode="after")
    def _check_training_languages(self) -> TaskConfig:
        unknown = sorted(set(self.train_languages or []) - set(self.languages))
        if unknown:
            raise ValueError(
                f"train_languages: expected some of {', '.join(self.languages)}, "
                f"got {', '.join(unknown)}"
            )
        untrained = sorted(set(self.train_counts) - set(self.trained_languages))
        if untrained:
            raise ValueError(
                f"train_counts: expected languages with training data "
                f"({', '.join(self.trained_languages)}), got {', '.join(untrained)}"
            )
        return self

    @model_validator(mode="after")
    def _check_test_from_train(self) -> TaskConfig:
        if not self.test_from_train:
            return self
        if self.train_counts:
            raise ValueError(
                "train_counts: expected none with test_from_train, which needs the same training "
                f"items in all languages, got {', '.join(self.train_counts)}"
            )
        if len(self.trained_languages) < 2:
            raise ValueError(
                "test_from_train: expected at least two languages with training data, so that each "
                f"item is trained on in another language, got {', '.join(self.trained_languages)}"
            )
        # The test items of different languages differ, and all come from these items.
        items = self.train_per_language + self.test_per_language
        needed = len(self.languages) * self.test_per_language
        if needed > items:
            raise ValueError(
                "test_from_train: expected train_per_language + test_per_language of at least "
                f"{len(self.languages)} languages x {self.test_per_language} test items, {needed}, "
                f"got {items}"
            )
        return self


class ModelConfig(_Section):
    """The classifier: a pretrained model, or a new XLM-R trained from scratch."""

    name: str | None = Field(
        None,
        description="Hub name or folder of a pretrained model. Default: a new model of the shape "
        "below.",
    )
    layers: int = Field(4, ge=1, description="Number of layers of a new model.")
    hidden: int = Field(
        128, ge=1, description="Hidden size of a new model, a multiple of its heads."
    )
    heads: int = Field(4, ge=1, description="Attention heads per layer of a new model.")
    intermediate: int | None = Field(
        None, ge=1, description="Feed-forward size of a new model. Default: 4 x hidden."
    )
    dropout: float = Field(0.1, ge=0, lt=1, description="Dropout of a new model.")
    sentencepiece: Path | None = Field(
        None,
        description="SentencePiece file (also .gz) for the tokenizer of a new model. Default: a "
        "tokenizer trained on the training texts of the task.",
    )
    vocabulary: int = Field(
        4000, ge=300, description="Vocabulary size of a tokenizer trained on the task."
    )
    max_length: int = Field(
        128, ge=8, description="Tokens per example. Longer examples are truncated."
    )

    @model_validator(mode="after")
    def _check_heads(self) -> ModelConfig:
        if self.hidden % self.heads:
            raise ValueError(
                f"hidden: expected a multiple of heads ({self.heads}), got {self.hidden}"
            )
        return self


class FinetuneConfig(_Section):
    """Fine-tuning with AdamW, linear warm-up and decay; one checkpoint per epoch."""

    epochs: int = Field(3, ge=1, description="Number of epochs.")
    batch_size: int = Field(32, ge=1, description="Examples per batch.")
    learning_rate: float = Field(2e-5, gt=0, description="Learning rate at the end of the warm-up.")
    weight_decay: float = Field(0.01, ge=0, description="Weight decay of AdamW.")
    warmup: float = Field(0.1, ge=0, le=1, description="Share of the steps that is warm-up.")
    max_grad_norm: float = Field(
        1.0, gt=0, description="Norm to which the gradient of a batch is clipped."
    )
    save_seconds: float = Field(
        300.0, gt=0, description="Seconds between saves of the state to resume from."
    )
    sampling: Sampling = Field(
        "proportional",
        description="proportional: every example once per epoch; uniform: the same number of "
        "examples per epoch, equally many of each language.",
    )
    dtype: PassDtype = Field(
        "float32",
        description="Precision of the forward and backward pass. Weights and optimizer state are "
        "float32 in either case.",
    )
    train_embeddings: bool = Field(
        True,
        description="false: the embeddings stay those of the pretrained model. With a large "
        "vocabulary this saves memory and, on a CPU, time.",
    )


class SparseFinetuneConfig(FinetuneConfig):
    """Fine-tuning through the head mask of each language.

    Keys that are absent have the values of the section `finetune`.
    """

    masks: Literal["static", "dynamic"] = Field(
        "static",
        description="static: the masks of the stage prune; dynamic: masks of the same size, "
        "estimated again during training.",
    )
    reestimate_every: int | None = Field(
        None,
        ge=1,
        description="dynamic only: epochs between estimates, beginning with the static masks. "
        "Default: 1.",
    )
    shared: SharedParameters = Field(
        "trained",
        description="Parameters that no head owns (embeddings, feed-forward, LayerNorm, "
        "classifier, ...). trained: all are trained; classifier: only the classifier is; frozen: "
        "none is.",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_reestimate_every(cls, tree: Any) -> Any:
        """Set the default of `reestimate_every`, which only dynamic masks have."""
        if not isinstance(tree, dict) or tree.get("masks") != "dynamic":
            return tree
        return {**tree, "reestimate_every": 1} if tree.get("reestimate_every") is None else tree

    @model_validator(mode="after")
    def _check_reestimate_every(self) -> SparseFinetuneConfig:
        every = self.reestimate_every
        if every is not None and self.masks == "static":
            raise ValueError(f"reestimate_every: expected none with masks: static, got {every}")
        if every is not None and every >= self.epochs:
            raise ValueError(
                f"reestimate_every: expected fewer than epochs ({self.epochs}), so that dynamic "
                f"masks are estimated again at least once, got {every}"
            )
        return self


class PruneConfig(_Section):
    """Iterative pruning of attention heads (Michel et al. 2019, Prasanna et al. 2020)."""

    threshold: float = Field(
        0.95, gt=0, le=1, description="Share of the full model's score that a subnetwork retains."
    )
    step: float = Field(0.10, gt=0, le=1, description="Share of all heads that a step prunes.")
    model: Literal["multilingual", "monolingual"] = Field(
        "multilingual",
        description="Pruned model. multilingual: the model fine-tuned on all languages; "
        "monolingual: one model per language, fine-tuned on its training examples only.",
    )
    seeds: int = Field(
        1,
        ge=1,
        description="Number of fine-tunings that are pruned per language, with the seeds seed, "
        "seed + 1, ... of the run.",
    )
    combine: Combine = Field(
        "first",
        description="Heads that are kept where seeds differ: those of the first seed, or their "
        "union, majority or intersection.",
    )
    other_thresholds: list[Annotated[float, Field(gt=0, le=1)]] = Field(
        default_factory=list,
        description="Further thresholds, whose masks are written to subnetworks/thresholds/ and "
        "shown in the report. Views use the masks of `threshold`.",
    )


class CollectConfig(_Section):
    """The features: checkpoints, parameters, projection, precision and storage."""

    every: int = Field(
        1,
        ge=1,
        description="Epochs between the checkpoints that are used. The last is always used.",
    )
    untrained: bool = Field(
        False,
        description="Also use the full model before its fine-tuning, as epoch 0. This control is "
        "shown in the course over the epochs; its weight in all scores is 0.",
    )
    parameters: ParameterSet = Field(
        "encoder",
        description="Parameters whose gradients are used: all but the embeddings, all, those of "
        "the attention heads, or those of the classifier.",
    )
    projection_dim: int = Field(4096, ge=1, description="Numbers per feature row.")
    projection_kind: ProjectionKind = Field(
        "rademacher",
        description="rademacher: dense random signs; sjlt: one non-zero entry per column.",
    )
    projection_layers: ProjectionLayers = Field(
        "accumulate",
        description="accumulate: the projections of all layers are added; concatenate: each layer "
        "has its own part of the row.",
    )
    projection_seed: int = Field(0, ge=0, description="Seed of the projection.")
    batch_tokens: int = Field(8192, ge=1, description="Tokens per batch.")
    dtype: PassDtype = Field("float32", description="Precision of the forward and backward pass.")
    shard_rows: int = Field(1024, ge=1, description="Examples per file of a feature store.")
    preconditioner: MetricKind = Field(
        "none",
        description="Metric of inner products and cosines. none: plain gradients; adam: that of "
        "Adam's steps, from its second moment at the checkpoint; ekfac: the curvature of the "
        "model, as in influence functions.",
    )
    damping: float = Field(
        0.1,
        gt=0,
        description="ekfac only: share of the mean eigenvalue of a layer that is added to all.",
    )
    store_dtype: StoreDtype = Field(
        "float32",
        description="Precision of the features on disk. int8 has a scale per example.",
    )
    features: str | None = Field(
        None,
        min_length=1,
        description="Where the features are stored: a folder, or the URL of object storage that "
        "fsspec knows (s3://bucket/folder), used by this run only. Default: in the run folder.",
    )

    @field_validator("features")
    @classmethod
    def _make_absolute(cls, features: str | None) -> str | None:
        """Make a path absolute, because workers and later commands may run in another folder."""
        if features is None or "://" in features:
            return features
        return str(Path(features).absolute())


class ViewsConfig(_Section):
    """The head masks under which influence is computed, beside the full model."""

    subnetwork: bool = Field(
        True,
        description="The mask of the test example's language, applied to its gradient and to all "
        "training gradients.",
    )
    subnetwork_own: bool = Field(
        False, description="Each gradient under the mask of its example's own language."
    )
    subnetwork_test: bool = Field(
        False,
        description="The mask of the test example's language, applied to its gradient only.",
    )
    random: int = Field(
        1, ge=0, description="Number of draws of random masks, of the size of each subnetwork."
    )
    other: list[str] = Field(
        default_factory=list,
        description="Languages whose mask is applied to the examples of all languages.",
    )
    union: list[tuple[str, str]] = Field(
        default_factory=list,
        description="Pairs of languages; the mask keeps the heads of either subnetwork.",
    )
    intersection: list[tuple[str, str]] = Field(
        default_factory=list,
        description="Pairs of languages; the mask keeps the heads of both subnetworks.",
    )

    @model_validator(mode="after")
    def _check_views(self) -> ViewsConfig:
        if not self.subnetwork and (self.subnetwork_own or self.subnetwork_test):
            raise ValueError(
                "subnetwork: expected true with subnetwork_own or subnetwork_test, which are "
                "computed from its features, got false"
            )
        for name in ("union", "intersection"):
            same = [a for a, b in getattr(self, name) if a == b]
            if same:
                raise ValueError(f"{name}: expected two different languages, got {same[0]} twice")
        return self

    @property
    def named_languages(self) -> set[str]:
        """The languages that `other`, `union` and `intersection` name."""
        pairs = [*self.union, *self.intersection]
        return {*self.other, *(language for pair in pairs for language in pair)}


class CertifyConfig(_Section):
    """The fidelity certificate: exact scores of a random sample of pairs of examples."""

    queries: int = Field(
        20, ge=1, description="Test examples in the sample, at most; fewer in a small run."
    )
    train: int = Field(
        200, ge=2, description="Training examples in the sample, at most; fewer in a small run."
    )
    least_spearman: float = Field(
        0.95,
        ge=-1,
        le=1,
        description="Mean rank correlation with exact scores below which the run and the report "
        "warn that rankings are unreliable.",
    )


class InfluenceConfig(_Section):
    """How gradients become scores and shares of languages."""

    k: int | list[int] = Field(
        100,
        description="Number of proponents and of opponents per test example. With a list, tables "
        "and figures use the first number, and shares are given for each.",
    )
    normalize: Normalization = Field(
        "cosine",
        description="cosine: cosine of the gradients at each checkpoint; none: inner product.",
    )
    weights: Literal["learning_rate", "uniform"] = Field(
        "learning_rate",
        description="Weight of a checkpoint: its mean learning rate, or the same for all.",
    )
    blocks: bool = Field(
        False,
        description="Also compute mean influence by head and layer, for the views full and "
        "subnetwork. Costs about 1.5 times as much as collecting these views.",
    )
    certify: CertifyConfig = Field(CertifyConfig(), description="The fidelity certificate.")
    memory: ByteSize = Field(
        ByteSize(DEFAULT_MEMORY),
        gt=0,
        description="Memory for features, rankings and buffers while scoring, such as 4GB. It does "
        "not change results.",
    )

    @field_validator("k")
    @classmethod
    def _check_k(cls, k: int | list[int]) -> int | list[int]:
        values = k if isinstance(k, list) else [k]
        if not values or min(values) < 1 or len(set(values)) < len(values):
            raise ValueError("expected a number from 1 on, or several different ones")
        return k

    @property
    def ks(self) -> list[int]:
        """Every k, the main one first."""
        return self.k if isinstance(self.k, list) else [self.k]


class AnalyzeConfig(_Section):
    """Intervals and tests."""

    bootstrap: int = Field(1000, ge=10, description="Bootstrap resamples of the test examples.")
    permutations: int = Field(1000, ge=10, description="Draws of each permutation test.")
    confidence: float = Field(0.95, gt=0, lt=1, description="Confidence level of the intervals.")
    distances: Path | None = Field(
        None,
        description="Table of distances between languages to compare with influence (.tsv, .csv, "
        ".parquet, each also .gz): columns language_a, language_b and at least one of numbers.",
    )
    distance_names: dict[str, str] = Field(
        default_factory=dict, description="Language of the run -> its name in that table."
    )


class RetrainConfig(_Section):
    """Retraining of the full model without some training examples, to test influence scores."""

    subsets: int = Field(
        32, ge=2, description="Number of random subsets of the training examples to train on."
    )
    fraction: float = Field(
        0.5, gt=0, lt=1, description="Share of the training examples in a subset."
    )
    seeds: int = Field(
        2,
        ge=1,
        description="Number of trainings on the same examples, whose losses are averaged. Their "
        "seeds (seed, seed + 1, ... of the run) determine order and dropout; all begin with the "
        "same initial weights.",
    )
    removed: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="Share of the training examples that is removed, as those that a method calls "
        "the strongest proponents, or opponents, of a test language. 0: no removals.",
    )
    random_removals: int = Field(
        3, ge=1, description="Number of removals of equally many random examples."
    )
    leave_one_out: bool = Field(
        True, description="Also train without each of the training languages."
    )
    methods: list[Method] | None = Field(
        None,
        min_length=1,
        description="Methods whose scores are tested. Default: all, except one that equals tracin "
        "under another name.",
    )

    @field_validator("methods")
    @classmethod
    def _check_distinct(cls, methods: list[Method] | None) -> list[Method] | None:
        repeated = _repeated(methods or [])
        if repeated:
            raise ValueError(f"expected each method once, got {repeated} more than once")
        return methods


class MetagradientConfig(_Section):
    """Influence on the loss after training, by differentiating through the fine-tuning."""

    models: list[ModelName] = Field(["full", "sparse"], min_length=1, description="Models.")
    denominator: Denominator = Field(
        "fixed", description="Batch mean without an example: fixed, or over the others (weighted)."
    )
    examples: list[str] = Field([], description="Test examples, by id, beside the languages.")
    at_once: int | None = Field(
        None, ge=1, description="Adjoints of a sweep. Default: as fit into half of memory."
    )
    memory: ByteSize = Field(ByteSize(DEFAULT_MEMORY), gt=0, description="Memory for states.")
    disk: ByteSize = Field(ByteSize(20 * 10**9), gt=0, description="Disk space for states.")
    checks: list[Annotated[float, Field(gt=0, lt=1)]] = Field(
        [0.01, 0.05, 0.2], description="Shares left out at random to check, a training each."
    )


class RunConfig(_Section):
    """Everything that `tracmod run` needs to know; one section per stage."""

    name: str = Field("run", description="Name of the run, shown in the report.")
    seed: int = Field(
        0, ge=0, description="Seed of initial weights, training, random masks and statistics."
    )
    device: str = Field("auto", description="cpu, cuda, cuda:1, ...; auto: a GPU if there is one.")
    task: TaskConfig
    model: ModelConfig = ModelConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    sparse_finetune: SparseFinetuneConfig | None = Field(
        None, description="Default: the same as finetune."
    )
    prune: PruneConfig = PruneConfig()
    views: ViewsConfig = ViewsConfig()
    collect: CollectConfig = CollectConfig()
    influence: InfluenceConfig = InfluenceConfig()
    analyze: AnalyzeConfig = AnalyzeConfig()
    retrain: RetrainConfig | None = Field(None, description="Default: no retraining.")
    metagradient: MetagradientConfig | None = Field(None, description="Default: no metagradient.")

    @property
    def sparse(self) -> SparseFinetuneConfig:
        """`sparse_finetune`, or the values of `finetune` if the section is absent."""
        return self.sparse_finetune or SparseFinetuneConfig(**self.finetune.model_dump())

    @model_validator(mode="before")
    @classmethod
    def _inherit_finetune(cls, tree: Any) -> Any:
        """Fill keys that are absent in `sparse_finetune` with the values of `finetune`."""
        if not isinstance(tree, dict) or tree.get("sparse_finetune") is None:
            return tree
        full, sparse = (
            section.model_dump(exclude_unset=True) if isinstance(section, BaseModel) else section
            for section in (tree.get("finetune", {}), tree["sparse_finetune"])
        )
        if not isinstance(full, dict) or not isinstance(sparse, dict):
            return tree  # the validation of that section reports it
        return {**tree, "sparse_finetune": {**full, **sparse}}

    @model_validator(mode="after")
    def _check_monolingual(self) -> RunConfig:
        untrained = sorted(set(self.task.languages) - set(self.task.trained_languages))
        if self.prune.model == "monolingual" and untrained:
            raise ValueError(
                "prune.model: expected multilingual where languages have no training data "
                f"({', '.join(untrained)}), got monolingual"
            )
        return self

    @model_validator(mode="after")
    def _check_blocks(self) -> RunConfig:
        if self.influence.blocks and self.collect.preconditioner != "none":
            raise ValueError(
                "collect.preconditioner: expected none with influence.blocks, which uses plain "
                f"gradients, got {self.collect.preconditioner}"
            )
        return self

    @model_validator(mode="after")
    def _check_untrained(self) -> RunConfig:
        if self.collect.untrained and self.collect.preconditioner == "adam":
            raise ValueError(
                "collect.untrained: expected false with collect.preconditioner adam, which needs "
                "a second moment that a model has only after steps of training, got true"
            )
        return self

    @model_validator(mode="after")
    def _check_retrain(self) -> RunConfig:
        retrain, languages = self.retrain, self.task.trained_languages
        if retrain is None:
            return self
        total = sum(map(self.task.train_count, languages))
        for name, share in (("fraction", retrain.fraction), ("removed", retrain.removed)):
            if share and not 0 < round(share * total) < total:
                raise ValueError(
                    f"retrain.{name}: expected a share that amounts to at least one, and not all, "
                    f"of the {total} training examples, got {share}"
                )
        if retrain.leave_one_out and len(languages) < 2:
            raise ValueError(
                "retrain.leave_one_out: expected false with fewer than two languages with training "
                f"data, got true with {', '.join(languages)}"
            )
        return self

    @model_validator(mode="after")
    def _check_trained(self) -> RunConfig:
        if self.collect.parameters == "classifier" and self.sparse.shared == "frozen":
            raise ValueError(
                "collect.parameters: expected some that sparse_finetune.shared frozen trains, got "
                "classifier"
            )
        return self

    @model_validator(mode="after")
    def _check_view_languages(self) -> RunConfig:
        unknown = sorted(self.views.named_languages - set(self.task.languages))
        if unknown:
            raise ValueError(
                f"views: expected languages among {', '.join(self.task.languages)}, "
                f"got {', '.join(unknown)}"
            )
        return self


def _repeated(names: Sequence[str]) -> str:
    """Return the names that occur more than once, joined by commas."""
    return ", ".join(sorted({name for name in names if names.count(name) > 1}))


def load_config(path: str | Path, overrides: tuple[str, ...] = ()) -> RunConfig:
    """Read a YAML file into a `RunConfig`, with `section.key=value` overrides applied.

    Args:
        path: a YAML file, or the name of a built-in configuration such as `demo`.
        overrides: `section.key=value`; the value is read as YAML, so `[en, de]` is a list.

    Raises:
        ValueError: the file is missing or invalid. The message names each key at fault, with the
            expected and the given value.
    """
    tree = read_tree(path)
    for key, value in parse_overrides(overrides).items():
        set_value(tree, key, value)
    return parse_config(tree, str(path))


def override_config(config: RunConfig, overrides: tuple[str, ...]) -> RunConfig:
    """Return the configuration with `section.key=value` overrides applied.

    A configuration read from run.json does not record which values were inherited. A value of
    `sparse_finetune` that equals that of `finetune` counts as inherited, so it follows an override
    of `finetune`.

    Raises:
        ValueError: as in `load_config`.
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


def parse_config(tree: dict[str, Any], source: str) -> RunConfig:
    """Validate a tree of plain values.

    Args:
        tree: section -> key -> value.
        source: where the tree comes from, for messages.

    Raises:
        ValueError: one message that names each key at fault.
    """
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ValueError("; ".join(_describe(fault, source) for fault in error.errors())) from None


def _describe(fault: Any, source: str) -> str:
    """Return one of pydantic's errors as `source: key: message, got value`."""
    key = ".".join(str(part) for part in fault["loc"]) or "config"
    got = f", got {fault['input']!r}" if not isinstance(fault["input"], dict) else ""
    message = fault["msg"].removeprefix("Value error, ")
    return f"{source}: {key}: {message}{got}"


def parse_bytes(text: str) -> int:
    """Return a size such as 4GB (10^9 bytes each), 512MiB (2^20 bytes each) or 1000 in bytes.

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
