"""`tracmod explore`: the page shows what `tm.Attributor` answers, and asks nobody but itself."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
from contextlib import closing
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from own_model import save_model, write_examples
from tiny_study import tiny_config

import tracmod as tm
from tracmod.cli import main
from tracmod.study.pipeline import run_stages
from tracmod.study.run_folder import RunFolder

pytest.importorskip("gradio")
from tracmod.attribution import explore

TEXT, TEXT_B = "Der Hund schläft.", "Ein Tier schläft."
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")


class Page(HTMLParser):
    """Tags with their attributes, and the text of each cell and paragraph."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.tags[-1][0], data.strip()))

    def ids(self) -> list[str | None]:
        return [attrs["data-id"] for tag, attrs in self.tags if tag == "li"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("explore") / "run"
    config = tiny_config(finetune={"epochs": 1}, views={"random": 0, "other": []})
    run_stages(
        RunFolder(folder, config), ["data", "finetune", "prune", "sparse-finetune", "collect"]
    )
    return folder


@pytest.fixture(scope="module")
def explorer(run: Path) -> explore.Explorer:
    return explore.Explorer(run)


@pytest.fixture(scope="module")
def attribution(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    save_model(folder / "model")
    arguments = ["attribute", "--model", folder / "model", "--train",
                 write_examples(folder / "train.tsv", 13), "--query",
                 write_examples(folder / "query.tsv", 5), "--out", folder / "out", "-k", 4,
                 "--projection-dim", 64]  # fmt: skip
    result = CliRunner().invoke(main, [str(one) for one in arguments])
    assert result.exit_code == 0, result.output
    return folder / "out"


def same_rows(found: list[dict], expected: list[dict]) -> bool:
    scores = [[row["score"] for row in rows] for rows in (found, expected)]
    plain = [[{k: v for k, v in row.items() if k != "score"} for row in rows]
             for rows in (found, expected)]  # fmt: skip
    return scores[0] == pytest.approx(scores[1], rel=1e-5) and plain[0] == plain[1]


@pytest.mark.parametrize("model", ["full", "sparse"])
def test_every_view_is_an_attributors_own_answer(run, explorer, model):
    answers = list(explorer.ask(TEXT, TEXT_B, "de", "neutral", model))
    assert [one["title"] for one in answers] == [
        "all heads", "subnetwork de", "subnetwork en", "subnetwork es",
    ]  # fmt: skip
    assert [one["own"] for one in answers] == [False, True, False, False]
    views = [("full", None), ("subnetwork", "de"), ("subnetwork", "en"), ("subnetwork", "es")]
    for one, (view, mask) in zip(answers, views, strict=True):
        expected = tm.Attributor(run, model, view, mask).query(TEXT, TEXT_B, "neutral", k=5)
        assert one["prediction"] == expected["prediction"]
        assert one["probabilities"] == pytest.approx(expected["probabilities"])
        for side, shares in (("proponents", "shares"), ("opponents", "opponent_shares")):
            assert same_rows(one[side], expected[side])
            counted = [row["language"] for row in expected[side]]
            assert one[shares] == {name: counted.count(name) / 5 for name in ("en", "de", "es")}


def test_views_differ_and_share_one_models_memory(explorer):
    answers = list(explorer.ask(TEXT, TEXT_B, "de"))
    scores = {tuple(row["score"] for row in one["proponents"]) for one in answers}
    assert len(scores) > 1
    opened = explorer._views("full")
    assert opened is explorer._views("full")
    assert len({id(attributor.source.models) for _, _, attributor in opened}) == 1
    assert len({id(attributor.train_stores) for _, _, attributor in opened}) == 4


def test_as_predicted_is_the_full_models_prediction_in_every_view(run, explorer):
    answers = list(explorer.ask(TEXT, TEXT_B, "es"))
    predicted = tm.Attributor(run).query(TEXT, TEXT_B)["prediction"]
    assert {one["label"] for one in answers} == {predicted}


def test_listed_languages_choose_the_list_and_not_the_shares(run, explorer):
    whole = next(explorer.ask(TEXT, TEXT_B, "de", "neutral"))
    chosen = next(explorer.ask(TEXT, TEXT_B, "de", "neutral", listed=["es"]))
    expected = tm.Attributor(run).query(TEXT, TEXT_B, "neutral", 10, ["es"])
    assert chosen["shares"] == whole["shares"]
    assert same_rows(chosen["proponents"], expected["proponents"])
    assert len(expected["proponents"]) == 10


def test_probabilities_are_the_models_own(run):
    attributor = tm.Attributor(run, "full", "subnetwork", "de")
    answer = attributor.query(TEXT, TEXT_B)
    model, tokenizer = attributor.source.models[-1]
    with torch.no_grad(), attributor.source.masks[-1].apply(model):
        logits = model(**tokenizer(TEXT, TEXT_B, return_tensors="pt")).logits[0]
    assert list(answer["probabilities"].values()) == pytest.approx(
        logits.softmax(0).tolist(), rel=1e-4
    )
    assert max(answer["probabilities"], key=answer["probabilities"].get) == answer["prediction"]


def test_examples_are_test_examples_of_every_language(run, explorer):
    import pyarrow.parquet as pq

    rows = pq.read_table(run / "data" / "test.parquet").to_pylist()
    there = {
        (r["text_a"], r["text_b"] or "", r["language"], explorer.labels[r["label"]]) for r in rows
    }
    assert {tuple(one) for one in explorer.examples} <= there
    assert {one[2] for one in explorer.examples} == {"en", "de", "es"}
    assert explorer.has_pairs
    assert explorer.unit == "cosine × learning rate"


def test_the_page_shows_the_answers_after_each_view(explorer):
    pages = list(explore.rendered(explorer, TEXT, TEXT_B, "de", explore.AS_PREDICTED, "full", []))
    assert len(pages) == 4
    assert ["Views still being computed: 3" in pages[0], "still" in pages[-1]] == [True, False]
    answers = list(explorer.ask(TEXT, TEXT_B, "de"))
    expected = [row["id"] for one in answers for side in ("proponents", "opponents")
                for row in one[side]]  # fmt: skip
    found = Page(pages[-1])
    assert found.ids() == expected
    for tag, attrs in found.tags:
        assert tag != "p" or "lang" not in attrs or attrs["dir"] == "auto"
    first = answers[0]
    cells = [text for tag, text in found.texts if tag == "td"]
    assert cells[:3] == [f"{100 * share:.0f}%" for share in first["shares"].values()]
    assert cells[3:6] == [f"{p:.3f}" for p in first["probabilities"].values()]


def test_hostile_texts_stay_texts(explorer, monkeypatch):
    hostile = "<img src=x onerror=alert(1)> ${value} {{value}}"
    answer = next(explorer.ask(TEXT, TEXT_B, "de"))
    for side in ("proponents", "opponents"):
        answer[side] = [row | {"text_a": hostile, "language": hostile} for row in answer[side]]
    monkeypatch.setattr(explorer, "ask", lambda *_: iter([answer]))
    (text,) = list(explore.rendered(explorer, TEXT, "", hostile, None, "full", []))
    found = Page(text)
    assert not any(tag in ("img", "script") for tag, _ in found.tags)
    assert ("p", hostile) in found.texts


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ((" ", "", "de", None, "full", []), "text: expected a sentence, got none"),
        ((TEXT, "", "de", "maybe", "full", []), "label: expected one of entailment"),
        ((TEXT, "", "de", None, "full", ["fr"]), "expected some of de, en, es, got fr"),
    ],
)
def test_errors_are_one_sentence_in_the_page(explorer, asked, message):
    *_, last = explore.rendered(explorer, *asked)
    error = next(text for tag, text in Page(last).texts if tag == "p")
    assert message in error
    assert "\n" not in error
    assert 'role="alert"' in last


def test_an_attribution_is_one_view(attribution):
    explorer = explore.Explorer(attribution)
    assert (explorer.models, explorer.masks, explorer.k) == (["full"], [], 4)
    assert explorer.unit == "cosine, summed over checkpoints"
    assert not explorer.has_pairs
    (answer,) = list(explorer.ask("the cat sleeps", None, "en"))
    expected = tm.Attributor(attribution).query("the cat sleeps", k=4)
    assert same_rows(answer["proponents"], expected["proponents"])
    with pytest.raises(ValueError, match="one model and one mask"):
        tm.Attributor(attribution).under("subnetwork", "de")


def test_what_cannot_be_served_is_one_sentence(attribution, tmp_path):
    def told(*arguments) -> str:
        result = CliRunner().invoke(main, ["explore", *map(str, arguments)])
        assert result.exit_code == 2, result.output
        return result.output

    assert "run.json" in told(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"127.0.0.1:{port}: expected an address and port" in told(
            attribution, "--port", port
        )


def test_without_gradio_the_command_says_what_to_install(attribution, monkeypatch):
    import sys

    for name in ("gradio", "starlette"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "tracmod.attribution.explore")
    result = CliRunner().invoke(main, ["explore", str(attribution)])
    assert result.exit_code == 2
    assert "pip install 'tracmod[explore]'" in result.output


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_another_address_than_loopback_is_warned_of(attribution, capsys):
    port = free_port()
    served = explore.serve(attribution, "0.0.0.0", port, block=False)
    try:
        assert "WARNING: 0.0.0.0 is not loopback" in capsys.readouterr().err
        assert served.share_url is None
        named = {"Host": "study.example", "Origin": "http://study.example"}
        assert asked_of("127.0.0.1", port, "GET", "/config", **named)[0] == 200
        named["Origin"] = "http://evil.example"
        assert asked_of("127.0.0.1", port, "GET", "/config", **named)[0] == 403
    finally:
        served.close()


def asked_of(address, port, method, path, body=None, **headers):
    """Status and text that one request gets; `Host` is the address's own unless it is given."""
    with closing(http.client.HTTPConnection(address, port, timeout=30)) as connection:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


@pytest.fixture(scope="module")
def port(attribution):
    """Where the page of an attribution is served."""
    port = free_port()
    served = explore.serve(attribution, port=port, block=False)
    yield port
    served.close()


QUESTION = json.dumps({"data": ["the cat sleeps", "", "en", None, "full", []]})
JSON = {"Content-Type": "application/json"}
UPLOAD = (
    '--x\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n'
    "Content-Type: text/plain\r\n\r\nsome text\r\n--x--\r\n"
)


@pytest.mark.parametrize("name", ["127.0.0.1:{}", "localhost:{}", "[::1]:{}", "localhost"])
def test_the_page_answers_to_the_names_of_loopback(port, name):
    own = {"Host": name.format(port), "Origin": f"http://{name.format(port)}"}
    status, text = asked_of("127.0.0.1", port, "GET", "/config", **own)
    assert status == 200
    assert "the cat" in text
    status, text = asked_of("127.0.0.1", port, "POST", "/gradio_api/call/ask", QUESTION,
                            **JSON, **own)  # fmt: skip
    assert status == 200
    event = json.loads(text)["event_id"]
    _, text = asked_of("127.0.0.1", port, "GET", f"/gradio_api/call/ask/{event}", **own)
    assert "event: complete" in text


@pytest.mark.parametrize("name", ["evil.example", "evil.example:{}", "localhost.evil.example", ""])
@pytest.mark.parametrize("path", ["/", "/config", "/gradio_api/call/ask"])
def test_a_name_that_was_made_to_point_here_is_refused(port, name, path):
    method = "POST" if "call" in path else "GET"
    foreign = {"Host": name.format(port), "Origin": f"http://{name.format(port)}"}
    status, text = asked_of("127.0.0.1", port, method, path, QUESTION, **JSON, **foreign)
    assert (status, text) == (400, "Invalid host header")


@pytest.mark.parametrize("origin", ["http://evil.example", "http://localhost:1", "null", "http://"])
@pytest.mark.parametrize("path", ["/config", "/gradio_api/call/ask", "/gradio_api/queue/join"])
def test_another_page_may_not_ask(port, origin, path):
    method = "GET" if path == "/config" else "POST"
    status, text = asked_of("127.0.0.1", port, method, path, QUESTION, Origin=origin, **JSON)
    assert (status, text) == (403, "another page than this may not ask")


@pytest.mark.parametrize("path", ["upload", "upload/", "upload?upload_id=1", "process_recording"])
def test_nobody_can_leave_a_file(port, path):
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    for headers in (form, form | {"Origin": f"http://127.0.0.1:{port}"}):
        status, _ = asked_of("127.0.0.1", port, "POST", f"/gradio_api/{path}", UPLOAD, **headers)
        assert status == 403


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="no IPv6")
@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_the_page_can_be_served_over_ipv6(attribution, host, capsys):
    port = free_port()
    served = explore.serve(attribution, host, port, block=False)
    try:
        assert f"at http://[::1]:{port}/" in capsys.readouterr().err
        assert asked_of("::1", port, "GET", "/config")[0] == 200
        assert asked_of("::1", port, "GET", "/config", Host="evil.example")[0] == 400
    finally:
        served.close()


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
def test_a_sentence_typed_in_a_browser_is_answered_by_this_machine_alone(run, capsys):
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright")
    port = free_port()
    served = explore.serve(run, port=port, block=False)
    assert "WARNING" not in capsys.readouterr().err
    asked, wrong = [], []
    try:
        with sync_api.sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
            page = browser.new_page()
            page.set_default_timeout(120_000)
            page.on("request", lambda request: asked.append(request.url))
            page.on("pageerror", lambda error: wrong.append(str(error)))
            page.on(
                "console", lambda message: message.type == "error" and wrong.append(message.text)
            )
            page.goto(f"http://127.0.0.1:{port}")
            page.locator("#examples td", has_text="Der").first.click()
            page.locator("#language input").wait_for()
            page.wait_for_function("document.querySelector('#text-a textarea').value !== ''")
            assert page.locator("#language input").input_value() == "de"
            page.fill("#text-a textarea", TEXT)
            page.fill("#text-b textarea", TEXT_B)
            page.click("#ask")
            page.wait_for_selector('.answer[data-done="yes"]')
            label = page.locator(".answer strong").first.inner_text()
            for view, title in ((("full", None), "all heads"),
                                (("subnetwork", "de"), "subnetwork de")):  # fmt: skip
                answer = tm.Attributor(run, "full", *view).query(TEXT, TEXT_B, label, k=5)
                for side in ("proponents", "opponents"):
                    rows = page.locator(f'[data-view="{title}"] .{side} li')
                    found = [rows.nth(i).get_attribute("data-id") for i in range(rows.count())]
                    assert found == [row["id"] for row in answer[side]]
                    text = rows.first.locator("p").first
                    assert text.inner_text() == answer[side][0]["text_a"]
                    assert text.get_attribute("dir") == "auto"
            page.fill("#text-a textarea", " ")
            page.click("#ask")
            page.wait_for_selector(".answer .error")
            sentence = page.locator(".answer .error").inner_text()
            assert sentence == "text: expected a sentence, got none"
            browser.close()
    finally:
        served.close()
    assert wrong == []
    assert asked
    own = (f"http://127.0.0.1:{port}/", "data:", "blob:")
    assert [url for url in asked if not url.startswith(own)] == []
