"""The configuration: one validated model per stage, read from YAML, overridden by key=value."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

Parameters = Literal["encoder", "all", "attention", "classifier"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TaskConfig(_Section):
    """Which examples: the task, its languages and how many of each split per language."""

    name: Literal["grammar", "xnli", "pawsx", "marc", "files"] = "grammar"
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
    seed: int = 0

    @field_validator("languages")
    @classmethod
    def _distinct(cls, languages: list[str]) -> list[str]:
        repeated = sorted({language for language in languages if languages.count(language) > 1})
        if repeated:
            raise ValueError(f"each language once, got {', '.join(repeated)} more than once")
        return languages

    @model_validator(mode="after")
    def _files_need_a_file(self) -> TaskConfig:
        if self.name == "files" and self.train_file is None:
            raise ValueError("task `files` needs train_file")
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


class PruneConfig(_Section):
    """Iterative pruning of attention heads (Michel et al. 2019, Prasanna et al. 2020)."""

    threshold: float = Field(0.95, gt=0, le=1, description="share of the full score to keep")
    step: float = Field(0.10, gt=0, le=1, description="share of all heads pruned at a time")


class CollectConfig(_Section):
    """What the features are: parameters, projection, precision, batches."""

    every: int = Field(
        1, ge=1, description="every how many epochs a checkpoint counts; the last always does"
    )
    parameters: Parameters = "encoder"
    projection_dim: int = Field(4096, ge=1)
    projection_kind: Literal["rademacher", "sjlt"] = "rademacher"
    projection_layers: Literal["accumulate", "concatenate"] = "accumulate"
    projection_seed: int = Field(0, ge=0)
    batch_tokens: int = Field(8192, ge=1)
    dtype: Literal["float32", "bfloat16"] = "float32"
    shard_rows: int = Field(1024, ge=1, description="examples per file of a feature store")


class ViewsConfig(_Section):
    """Under which head masks influence is computed, beside the full model."""

    subnetwork: bool = True
    random: int = Field(1, ge=0, description="draws of random masks of each subnetwork's size")
    other: list[str] = Field(
        default_factory=list, description="every language's influence under these languages' masks"
    )


class InfluenceConfig(_Section):
    """How gradients become scores and language shares."""

    k: int = Field(100, ge=1, description="proponents and opponents kept per test example")
    normalize: Literal["cosine", "none"] = "cosine"
    weights: Literal["learning_rate", "uniform"] = Field(
        "learning_rate", description="what each checkpoint counts"
    )
    blocks: bool = Field(
        False,
        description="also mean influence by head and layer, of the views full and subnetwork; "
        "costs about 1.5 times what collecting these views does",
    )


class AnalyzeConfig(_Section):
    """Intervals and tests."""

    bootstrap: int = Field(1000, ge=10, description="resamples of the test examples")
    permutations: int = Field(1000, ge=10, description="draws of the Mantel test")
    confidence: float = Field(0.95, gt=0, lt=1)


class RunConfig(_Section):
    """Everything `tracmod run` needs to know; one section per stage."""

    name: str = "run"
    seed: int = 0
    device: str = Field("auto", description="cpu, cuda, cuda:1, ...; auto: a GPU if there is one")
    task: TaskConfig
    model: ModelConfig = ModelConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    sparse_finetune: FinetuneConfig | None = Field(None, description="absent: the same as finetune")
    prune: PruneConfig = PruneConfig()
    views: ViewsConfig = ViewsConfig()
    collect: CollectConfig = CollectConfig()
    influence: InfluenceConfig = InfluenceConfig()
    analyze: AnalyzeConfig = AnalyzeConfig()

    @model_validator(mode="after")
    def _other_languages_exist(self) -> RunConfig:
        unknown = sorted(set(self.views.other) - set(self.task.languages))
        if unknown:
            raise ValueError(f"views.other names {', '.join(unknown)}, not in task.languages")
        return self


def load_config(path: str | Path, overrides: tuple[str, ...] = ()) -> RunConfig:
    """Read a YAML file into a `RunConfig`, with `section.key=value` overrides applied.

    Args:
        path: a YAML file, or the name of an embedded one (`demo`).
        overrides: `section.key=value`; the value is read as YAML, so `[en, de]` is a list.

    Raises:
        ValueError: one line per fault: where, what was expected, what was found.
    """
    try:
        tree = yaml.safe_load(_config_text(path))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(tree, dict):
        raise ValueError(
            f"{path}: expected sections (task:, model:, ...), got {type(tree).__name__}"
        )
    for override in overrides:
        _apply_override(tree, override)
    return parse_config(tree, str(path))


def override_config(config: RunConfig, overrides: tuple[str, ...]) -> RunConfig:
    """The config with `section.key=value` overrides applied; errors as in `load_config`."""
    tree = config.model_dump(mode="json")
    for override in overrides:
        _apply_override(tree, override)
    return parse_config(tree, "--set")


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


def _config_text(path: str | Path) -> str:
    if Path(path).is_file():
        return Path(path).read_text(encoding="utf-8")
    embedded = resources.files("tracmod.configs").joinpath(f"{path}.yaml")
    if embedded.is_file():
        return embedded.read_text(encoding="utf-8")
    raise ValueError(f"{path}: no such file, and no embedded configuration of that name")


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise ValueError(f"--set {override}: expected key=value, for example finetune.epochs=5")
    *sections, last = key.split(".")
    node = tree
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise ValueError(f"--set {override}: {section} is a value, not a section")
    try:
        node[last] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise ValueError(f"--set {override}: {value} is not valid YAML") from None
