"""The configuration of a run: its sections, and what they require of each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ByteSize,
    Field,
    field_validator,
    model_validator,
)

from tracmod.choices import (
    ADAM_EPSILON,
    DEFAULT_MEMORY,
    Batches,
    Combine,
    Denominator,
    Method,
    MetricKind,
    ModelName,
    Normalization,
    PassDtype,
    Pooling,
    ProjectionKind,
    ProjectionLayers,
    Sampling,
    SharedParameters,
    StoreDtype,
    check_selection,
)
from tracmod.config.section import Section, repeated
from tracmod.config.task import TaskConfig


class LoraConfig(Section):
    """A LoRA adapter on the layers of a pretrained model, and what is trained whole beside it."""

    rank: int = Field(8, ge=1, description="Rank of the matrices.")
    alpha: float = Field(
        16.0, gt=0, description="The adapter's output is multiplied by alpha / rank."
    )
    targets: list[str] | None = Field(
        None,
        min_length=1,
        description="Names of the linear layers that are adapted, or their last parts, such as "
        "[query, value, output.dense]. Default: the query and value projections of attention.",
    )
    rank_stabilized: bool = Field(
        False, description="rsLoRA: the adapter's output is multiplied by alpha / sqrt(rank)."
    )


class ModelConfig(Section):
    """The classifier: a pretrained model, or a new XLM-R trained from scratch."""

    name: str | None = Field(
        None,
        description="Hub name or folder of a pretrained model; or a folder with a config.json "
        "alone, for a new model of any supported family and shape. Default: a new XLM-R of the "
        "shape below.",
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
    pooling: Pooling | None = Field(
        None,
        description="mean: the classifier is one linear layer that reads the mean of all tokens, "
        "as sentence encoders such as E5 are pretrained to be read. Default: the classifier of the "
        "model's family, which mostly reads the first token.",
    )
    lora: LoraConfig | None = Field(
        None,
        description="Train a LoRA adapter, and all that comes after the encoder's layers, instead "
        "of the pretrained model. Checkpoints are adapter folders of PEFT.",
    )

    @model_validator(mode="after")
    def _check_lora(self) -> ModelConfig:
        if self.lora is not None and self.name is None:
            raise ValueError("lora: expected a pretrained model as name, got none")
        return self

    @model_validator(mode="after")
    def _check_heads(self) -> ModelConfig:
        if self.hidden % self.heads:
            raise ValueError(
                f"hidden: expected a multiple of heads ({self.heads}), got {self.hidden}"
            )
        return self


class FinetuneConfig(Section):
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
    adam_epsilon: float = Field(
        ADAM_EPSILON,
        gt=0,
        description="Epsilon of AdamW. A larger one, such as 1e-6, makes training smoother, and "
        "metagradients foretell more.",
    )
    dropout: bool = Field(True, description="Whether the training has the model's dropout.")
    train_embeddings: bool = Field(
        True,
        description="false: the embeddings stay those of the pretrained model. With a large "
        "vocabulary this saves memory and, on a CPU, time.",
    )
    train_layers: int | None = Field(
        None,
        ge=1,
        description="Number of the highest layers that are trained, with what comes after them; "
        "the layers below and the embeddings stay those of the pretrained model. Default: all.",
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


class PruneConfig(Section):
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


class CollectConfig(Section):
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
    parameters: str | list[str] = Field(
        "encoder",
        description="Parameters whose gradients are used. encoder: all but the embeddings; all; "
        "attention: those of the attention heads; classifier; adapter: LoRA's matrices or "
        "language adapters; or a list of patterns of the names "
        "of parameters or modules.",
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


class ViewsConfig(Section):
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


class CertifyConfig(Section):
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


class InfluenceConfig(Section):
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


class AnalyzeConfig(Section):
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


class RetrainConfig(Section):
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
    other_fractions: dict[Annotated[float, Field(gt=0, lt=1)], Annotated[int, Field(ge=2)]] = Field(
        default_factory=dict,
        description="Further shares -> number of random subsets of this share, compared with the "
        "scores like those of `fraction`.",
    )
    batches: Batches = Field(
        "new",
        description="new: the remaining examples are put into batches of their own, in fewer "
        "steps; same: examples that are left out have weight 0 in the batches of the training on "
        "all examples, so that nothing else differs.",
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
        "under another name, and metagradient only with the section `metagradient`.",
    )

    @field_validator("methods")
    @classmethod
    def _check_distinct(cls, methods: list[Method] | None) -> list[Method] | None:
        repeated_names = repeated(methods or [])
        if repeated_names:
            raise ValueError(f"expected each method once, got {repeated_names} more than once")
        return methods


class MetagradientConfig(Section):
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
        [0.01, 0.05, 0.2],
        description="Shares left out at random to check, a training each; of the smallest, one "
        "more with a small change of weights.",
    )
    path_points: int = Field(
        0, ge=0, description="Weights between 1 and 0 of each language's examples; 0: no paths."
    )


class RunConfig(Section):
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

    @property
    def has_metagradient(self) -> bool:
        """Whether the run differentiates through the fine-tuning of the full model."""
        return self.metagradient is not None and "full" in self.metagradient.models

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
    def _check_tokens(self) -> RunConfig:
        for name in ("retrain", "metagradient"):
            if self.task.unit != "text" and getattr(self, name) is not None:
                raise ValueError(
                    f"{name}: expected none for the task {self.task.name}, which is not one of "
                    f"classes of texts, got a section"
                )
        if self.task.unit != "text" and self.model.pooling is not None:
            raise ValueError(
                f"model.pooling: expected none for the task {self.task.name}, whose model reads "
                f"every token by itself, got {self.model.pooling}"
            )
        return self

    @model_validator(mode="after")
    def _check_retrain(self) -> RunConfig:
        retrain, languages = self.retrain, self.task.trained_languages
        if retrain is None:
            return self
        total = sum(map(self.task.train_count, languages))
        shares = [("fraction", retrain.fraction), ("removed", retrain.removed)]
        shares += [("other_fractions", share) for share in retrain.other_fractions]
        for name, share in shares:
            if share and not 0 < round(share * total) < total:
                raise ValueError(
                    f"retrain.{name}: expected a share that amounts to at least one, and not all, "
                    f"of the {total} training examples, got {share}"
                )
        if "metagradient" in (retrain.methods or []) and not self.has_metagradient:
            raise ValueError(
                "retrain.methods: expected metagradient only with a section metagradient whose "
                "models include full"
            )
        if retrain.leave_one_out and len(languages) < 2:
            raise ValueError(
                "retrain.leave_one_out: expected false with fewer than two languages with training "
                f"data, got true with {', '.join(languages)}"
            )
        return self

    @model_validator(mode="after")
    def _check_trained(self) -> RunConfig:
        check_selection("collect.parameters", self.collect.parameters)
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
