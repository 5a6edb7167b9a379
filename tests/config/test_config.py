"""The configuration: its keys and choices, and how `sparse_finetune` inherits from `finetune`."""

from __future__ import annotations

import json
from typing import get_args

import pytest
from pydantic import BaseModel
from tiny_study import tiny_config

from tracmod.choices import FigureWidth, StoreDtype
from tracmod.config import FinetuneConfig, RunConfig, load_config, override_config, parse_config
from tracmod.features.store_format import DTYPES
from tracmod.files.yaml_tree import parse_overrides, read_tree
from tracmod.report.paper.matplotlib_plots import WIDTHS
from tracmod.study.run_folder import RunFolder


def stored(config: RunConfig) -> RunConfig:
    """Return the config as it is read back from run.json."""
    return parse_config(json.loads(config.model_dump_json()), "run.json")


def sections(config):
    """Yield the model of every section, and those within sections."""
    yield type(config)
    for value in dict(config).values():
        if isinstance(value, BaseModel):
            yield from sections(value)


def test_every_key_has_a_description_of_one_or_more_sentences():
    config = tiny_config(sparse_finetune={}, retrain={"subsets": 4})
    models = set(sections(config))
    assert len(models) == 12
    for model in models:
        assert model.__doc__
        for key, field in model.model_fields.items():
            if not (model is RunConfig and isinstance(getattr(config, key), BaseModel)):
                assert field.description, f"{model.__name__}.{key}"
                assert field.description.endswith("."), f"{model.__name__}.{key}"


def test_tables_with_an_entry_per_choice_have_every_choice():
    for choices, table in ((StoreDtype, DTYPES), (FigureWidth, WIDTHS)):
        assert set(get_args(choices)) == set(table)


def test_parameters_are_a_set_or_patterns():
    for parameters in ("attention", ["*.query", "classifier"]):
        config = tiny_config(collect={"parameters": parameters})
        assert stored(config).collect.parameters == parameters
    for override in ("most", "[]", "[1]", "3", "true", "['']"):
        with pytest.raises(ValueError, match=r"collect\.parameters"):
            override_config(tiny_config(), [f"collect.parameters={override}"])


def test_without_the_section_sparse_fine_tuning_has_the_values_of_finetune():
    config = tiny_config(finetune={"epochs": 7, "sampling": "uniform"})
    assert config.sparse_finetune is None
    assert config.sparse.model_dump() == config.finetune.model_dump() | {
        "masks": "static", "reestimate_every": None, "shared": "trained",
    }  # fmt: skip


def test_absent_keys_of_the_section_have_the_values_of_finetune():
    config = tiny_config(
        finetune={"epochs": 7, "batch_size": 4}, sparse_finetune={"learning_rate": 0.5}
    )
    sparse = config.sparse
    assert (sparse.epochs, sparse.batch_size, sparse.learning_rate) == (7, 4, 0.5)
    assert config.finetune.learning_rate == 1e-3
    assert sparse.warmup == FinetuneConfig().warmup
    assert stored(config) == config


def test_sections_can_be_given_as_models():
    config = tiny_config()
    sparse = type(config.sparse)(weight_decay=0.5)
    config = RunConfig(task=config.task, finetune=FinetuneConfig(epochs=9), sparse_finetune=sparse)
    assert (config.sparse.epochs, config.sparse.weight_decay) == (9, 0.5)


@pytest.mark.parametrize("read_back", [False, True])
def test_an_override_of_finetune_changes_inherited_values(read_back):
    config = tiny_config(sparse_finetune={"batch_size": 4, "masks": "dynamic"})
    config = stored(config) if read_back else config
    new = override_config(config, ("finetune.epochs=5", "finetune.batch_size=16"))
    assert (new.finetune.epochs, new.finetune.batch_size) == (5, 16)
    assert (new.sparse.epochs, new.sparse.batch_size) == (5, 4)
    assert (new.sparse.masks, new.sparse.reestimate_every) == ("dynamic", 1)
    both = override_config(new, ("sparse_finetune.epochs=6", "finetune.epochs=8"))
    assert (both.finetune.epochs, both.sparse.epochs) == (8, 6)


def test_an_override_creates_the_section(tmp_path):
    config = override_config(tiny_config(), ("sparse_finetune.shared=frozen",))
    assert (config.sparse.shared, config.sparse.epochs) == ("frozen", 2)
    file = tmp_path / "c.yaml"
    file.write_text(
        "task: {languages: [en], train_per_language: 3, dev_per_language: 3, "
        "test_per_language: 3}\nfinetune: {epochs: 4}\nsparse_finetune:\n"
    )
    assert load_config(file).sparse_finetune is None
    config = load_config(file, ("sparse_finetune.masks=dynamic", "finetune.epochs=6"))
    assert (config.sparse.epochs, config.sparse.reestimate_every) == (6, 1)


@pytest.mark.parametrize(
    ("sparse", "message"),
    [
        ({"reestimate_every": 2}, "reestimate_every: .*static, got 2"),
        ({"masks": "dynamic", "reestimate_every": 0}, "sparse_finetune.reestimate_every: .* got 0"),
        ({"masks": "dynamic", "reestimate_every": 2}, r"reestimate_every: .*epochs \(2\).*got 2"),
        ({"masks": "dynamic", "epochs": 1}, r"reestimate_every: .*epochs \(1\).*got 1"),
        ({"shared": "half"}, "sparse_finetune.shared: .* 'classifier' or 'frozen', got 'half'"),
        ({"sampling": "all"}, "sparse_finetune.sampling: .*got 'all'"),
        ({"epoch": 3}, "sparse_finetune.epoch: Extra inputs"),
        (3, "sparse_finetune: .* got 3"),
    ],
)
def test_an_invalid_value_is_one_sentence_that_names_the_key(sparse, message):
    with pytest.raises(ValueError, match=message) as error:
        tiny_config(sparse_finetune=sparse)
    assert "; " not in str(error.value)


def test_a_change_of_the_section_is_refused_once_the_stage_has_begun(tmp_path):
    run = RunFolder(tmp_path, tiny_config(sparse_finetune={"masks": "dynamic"}))
    with run.stage("sparse-finetune"):
        pass
    assert RunFolder(tmp_path).is_done("sparse-finetune")
    with pytest.raises(ValueError, match=r"sparse_finetune\.shared=trained.*\.shared=frozen"):
        RunFolder(tmp_path, tiny_config(sparse_finetune={"masks": "dynamic", "shared": "frozen"}))


@pytest.mark.parametrize(
    ("written", "value"),
    [("2e-5", 2e-5), ("2E-5", 2e-5), ("2.0e-5", 2e-5), ("1e3", 1000.0), ("+1e-3", 1e-3)],
)
def test_numbers_with_an_exponent_need_no_dot(tmp_path, written, value):
    (tmp_path / "a.yaml").write_text(f"finetune: {{learning_rate: {written}}}\n")
    assert read_tree(tmp_path / "a.yaml")["finetune"]["learning_rate"] == value
    assert parse_overrides((f"finetune.learning_rate={written}",)) == {
        "finetune.learning_rate": value
    }


@pytest.mark.parametrize("text", ["2e", "e5", "en", "1e3x", "e-5"])
def test_words_that_look_like_them_stay_words(text):
    assert parse_overrides((f"name={text}",)) == {"name": text}
