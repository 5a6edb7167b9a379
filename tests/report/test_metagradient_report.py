"""The metagradient in report, figures and tables, and where it disagrees with TracIn."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from make_run import LANGUAGES, add_metagradient, add_retraining, make_run

from tracmod.analysis.summary import analyze
from tracmod.report.content.analysis_tables import AnalysisTables
from tracmod.report.content.metagradient import metagradient
from tracmod.report.html.page import write_report
from tracmod.report.paper.tables import write_tables
from tracmod.report.wording.metagradient import disagreement

NAMES = ["en", "de", "ru"]


def matrix(*rows):
    return pd.DataFrame(rows, NAMES, NAMES, dtype=float)


FORETOLD = matrix([9, 2, 1], [3, 9, 1], [2, 1, 9])  # en: de; de: en; ru: en
SHARES = matrix([5, 1, 2], [3, 5, 1], [1, 2, 5])  # en: ru; de: en; ru: de
ACTUAL = matrix([0, 0.2, 0.1], [0, 0, 0], [0.1, 0.3, 0])  # en: de is right; ru: de is right


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = make_run(tmp_path_factory.mktemp("report") / "run")
    add_retraining(folder)
    add_metagradient(folder)
    analyze(folder)
    return folder


def test_the_sentence_names_every_disagreement_and_what_retraining_says():
    text = disagreement("full", FORETOLD, SHARES, ACTUAL)
    assert "disagree for 2 of 3: en (de, not ru) and ru (en, not de)" in text
    assert "agrees with the metagradient in 1 of these 2" in text
    assert "retrain" in disagreement("full", FORETOLD, SHARES, None)
    assert "agree for all 3" in disagreement("full", FORETOLD, FORETOLD, ACTUAL)


def test_the_figure_shows_the_sums_the_shares_and_the_actual_changes(run):
    [figure] = metagradient(AnalysisTables(run))
    rows = pq.read_table(run / "metagradient" / "languages.parquet").to_pandas()
    foretold, path, shares, actual = figure.panels
    assert list(foretold.rows) == list(foretold.columns) == list(LANGUAGES)
    value = rows.set_index(["quantity", "train_language"]).influence
    factor = foretold.values_RC[0, 0] / value["en", "en"]
    assert foretold.values_RC[1, 2] == pytest.approx(factor * value["de", "ru"])
    ratio = path.values_RC / foretold.values_RC
    assert ratio == pytest.approx(np.full((5, 5), ratio[0, 0]))
    assert shares.values_RC.sum(axis=1) == pytest.approx([shares.values_RC[0].sum()] * 5)
    table = pq.read_table(run / "retraining" / "leave_one_out.parquet").to_pandas()
    own = table[(table.method == "tracin") & (table.test_language == "ru")]
    ratio = actual.values_RC[2] / own.actual.to_numpy()
    assert ratio == pytest.approx([ratio[0]] * 5)


def test_tables_and_page_have_the_matrix_and_the_verdict(run, tmp_path):
    files = {path.name: path for path in write_tables(run, tmp_path, "csv")}
    assert {
        "metagradient-full.csv",
        "metagradient-path-full.csv",
        "metagradient_checks.csv",
    } <= files.keys()
    written = pd.read_csv(files["metagradient-full.csv"])
    assert list(written.columns) == ["test_language", *LANGUAGES]
    write_report(run)
    page = (run / "report" / "index.html").read_text(encoding="utf-8")
    assert "Foretells changes of up to about 5%" in page
    assert "which other training language helps" in page
