"""A local page that answers a typed sentence under every subnetwork: `tracmod explore`."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from tracmod.attribution.query import Attributor
from tracmod.report.wording.labels import MODEL_NAMES, VIEW_NAMES, influence_unit, power_of_ten

try:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
    import gradio as gr
    from starlette.middleware import Middleware
    from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import PlainTextResponse, Response
except ModuleNotFoundError as error:
    raise ValueError("tracmod explore needs Gradio: pip install 'tracmod[explore]'") from error

AS_PREDICTED = "as predicted"
LISTED = 10  # examples of each sign
PER_LANGUAGE = 2  # test examples to click on
LOOPBACK = ("127.0.0.1", "localhost", "::1")
EVERY_ADDRESS = ("0.0.0.0", "::")
# All that the page and Gradio's clients post; Gradio would also take files, which no one here asks
# for.
POSTED = tuple(f"/gradio_api/{name}" for name in ("queue/join", "call/", "run/", "cancel", "reset"))
Answer = dict[str, Any]


class Explorer:
    """What the page asks: a sentence under the full model and under each subnetwork.

    Attributes:
        models: `full` and `sparse`; one of an attribution.
        masks: the languages whose subnetworks there are; [] of an attribution.
        languages: of the examples to be asked about.
        train_languages: of the training examples.
        labels: names; [] for a model with one output, whose labels are whole numbers.
        has_pairs: whether examples have a second text.
        unit: of scores.
        k: over how many of the strongest training examples shares are counted.
        examples: some test examples: text_a, text_b, language, label.
    """

    def __init__(self, folder: str | Path) -> None:
        """Open a run or an attribution; raises ValueError as `Attributor` does."""
        self.folder = Path(folder)
        first = Attributor(folder)
        source = first.source
        self._first, self._views = first, cache(self._open_views)
        self.models = list(source.model_names)
        self.masks = [mask for view, mask in first.views if view == "subnetwork"]
        weights = "uniform" if set(source.weights or [1.0]) == {1.0} else "learning_rate"
        self.unit = influence_unit({"normalize": source.normalize, "weights": weights})
        self.train_languages = list(dict.fromkeys(source.train.column("language").to_pylist()))
        queries = source.queries
        self.languages = list(dict.fromkeys(queries.column("language").to_pylist()))
        self.labels = source.label_names if len(source.label_names) > 1 else []
        self.has_pairs = any(text for text in source.train.column("text_b").to_pylist())
        self.k = min(source.k, len(source.train))
        self.examples = self._some(queries.to_pylist())

    def _some(self, rows: Sequence[dict[str, Any]]) -> list[list[str]]:
        found: dict[str, list[list[str]]] = {name: [] for name in self.languages}
        for row in rows:
            of_language = found[row["language"]]
            label = self.labels[row["label"]] if self.labels else str(row["label"])
            if len(of_language) < PER_LANGUAGE and label not in [one[3] for one in of_language]:
                of_language.append([row["text_a"], row["text_b"] or "", row["language"], label])
        return [example for examples in found.values() for example in examples]

    def _open_views(self, model: str) -> list[tuple[str, str | None, Attributor]]:
        """Title, language of the mask and attributor of every view; opened once for each model."""
        first = self._first if model == "full" else Attributor(self.folder, model)
        views: list[tuple[str, str | None, Attributor]] = [(VIEW_NAMES["full"], None, first)]
        for mask in self.masks:
            views.append((f"subnetwork {mask}", mask, first.under("subnetwork", mask)))
        return views

    def ask(
        self,
        text_a: str,
        text_b: str | None,
        language: str,
        label: str | None = None,
        model: str = "full",
        listed: Sequence[str] = (),
    ) -> Iterator[Answer]:
        """Answers under the full model, the language's own subnetwork, and all others, in turn.

        Args:
            text_a, text_b: the texts.
            language: theirs; its subnetwork comes first.
            label: whose loss is explained; None: what the full model predicts, in every view.
            model: `full` or `sparse`.
            listed: languages of the training examples that are listed; none: all.

        Returns:
            One dict per view: `title`, `own` (whether it is the language's subnetwork), `label`,
            `prediction`, `probabilities`; `shares` and `opponent_shares` of each training language
            among the `k` strongest; `proponents` and `opponents` as `Attributor.query` gives them.

        Raises:
            ValueError: no text, or as `Attributor.query`.
        """
        if not text_a.strip():
            raise ValueError("text: expected a sentence, got none")
        views = sorted(self._views(model), key=lambda view: (view[1] is not None,
                                                             view[1] != language))  # fmt: skip
        for title, masked, attributor in views:
            answer = attributor.query(text_a, text_b or None, label, self.k)
            label = answer["label"]
            shown = answer
            if listed:
                shown = attributor.query(text_a, text_b or None, label, LISTED, list(listed))
            yield {
                "title": title,
                "own": masked == language,
                **{key: answer[key] for key in ("label", "prediction", "probabilities")},
                "shares": self._shares(answer["proponents"]),
                "opponent_shares": self._shares(answer["opponents"]),
                "proponents": shown["proponents"][:LISTED],
                "opponents": shown["opponents"][:LISTED],
            }

    def _shares(self, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
        found = [row["language"] for row in rows]
        return {language: found.count(language) / len(found) for language in self.train_languages}


# --- the page -------------------------------------------------------------------------------

_CSS = """
.gradio-container { max-width: 90rem !important; margin: 0 auto !important; }
.gradio-container, .gradio-container > *, .gradio-container main { width: 100%; min-width: 0; }
.gradio-container > * > .wrap, .gradio-container .column { min-width: 0 !important; max-width: 100%; }
#examples, #answer { min-width: 0; max-width: 100%; overflow-x: auto; }
textarea, #examples td { unicode-bidi: plaintext; text-align: start; }
.answer { font-size: .95rem; }
.answer h3 { margin: 1.2rem 0 .4rem; font-size: 1.05rem; font-weight: 650; }
.answer .note, .answer .meta, .answer h4 { opacity: .78; }
.answer .note { margin: .2rem 0 .8rem; max-width: none; }
.answer .scroll { overflow-x: auto; }
.answer table { border-collapse: collapse; font-variant-numeric: tabular-nums; border: 0; }
.answer table :is(th, td) { padding: .3rem .7rem; text-align: right; border: 0; border-bottom: 1px solid var(--border-color-primary); }
.answer table th:first-child { text-align: left !important; white-space: nowrap; }
.answer th.own, .answer .card.own h3 { font-weight: 700; color: var(--primary-700); }
.dark .answer th.own, .dark .answer .card.own h3 { color: var(--primary-300); }
.answer .cards { display: flex; gap: 1.2rem; overflow-x: auto; align-items: flex-start; padding-bottom: .6rem; }
.answer .card { flex: 1 0 min(21rem, 80vw); max-width: 30rem; padding: .3rem 1rem 1rem; border: 1px solid var(--border-color-primary); border-radius: .6rem; }
.answer .card.own { border-color: var(--primary-500); }
.answer .card h4 { margin: 1rem 0 .2rem; font-size: .9rem; font-weight: 650; }
.answer ol { margin: 0; padding: 0; list-style: none; }
.answer li { margin: 0; padding: .4rem 0; border-bottom: 1px solid var(--border-color-primary); overflow-wrap: anywhere; }
.answer li p { display: block; margin: 0; unicode-bidi: plaintext; text-align: start; }
.answer .tag { display: inline-block; min-width: 2.2em; padding: 0 .4em; border-radius: .3em; background: var(--background-fill-secondary); font-weight: 600; text-align: center; }
.answer .tag.same { background: var(--primary-100); color: var(--primary-900); }
.answer .meta { display: flex; gap: .6rem; align-items: baseline; font-size: .85rem; font-variant-numeric: tabular-nums; }
.answer .error { padding: .8rem 1rem; border: 2px solid #a34a00; border-radius: .5rem; font-weight: 600; }
"""  # noqa: E501
_PAGE = jinja2.Environment(
    autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
).from_string("""<div class="answer" data-done="{{ 'no' if waiting else 'yes' }}">
{% if error %}
<p class="error" role="alert">{{ error }}</p>
{% endif %}
{% if answers %}
<p>Whose influence is shown: on the loss of the label <strong>{{ answers[0].label }}</strong>.
{% if waiting %}<em>Views still being computed: {{ waiting }}.</em>{% endif %}</p>
{% macro shares(key, heading) %}
<h3>{{ heading }}</h3>
<div class="scroll"><table class="shares"><thead><tr><th scope="col">heads</th>
{% for name in languages %}<th scope="col">{{ name }}</th>{% endfor %}
{% for name in answers[0].probabilities or {} %}<th scope="col">p({{ name }})</th>{% endfor %}
<th scope="col">predicted</th></tr></thead><tbody>
{% for one in answers %}
<tr><th scope="row"{% if one.own %} class="own"{% endif %}>{{ one.title }}</th>
{% for name in languages %}
<td style="background: color-mix(in srgb, var(--primary-500) {{ (70 * one[key][name]) | round }}%,\
 transparent)">{{ "%.0f" | format(100 * one[key][name]) }}%</td>
{% endfor %}
{% for p in (one.probabilities or {}).values() %}<td>{{ "%.3f" | format(p) }}</td>{% endfor %}
<td>{{ one.prediction }}</td></tr>
{% endfor %}
</tbody></table></div>
{% endmacro %}
{{ shares("shares", "Languages of the %d strongest proponents" | format(k)) }}
{{ shares("opponent_shares", "Languages of the %d strongest opponents" | format(k)) }}
<h3>The strongest training examples</h3>
<p class="note">Proponents (score above 0) lowered the loss of this label for this sentence,
opponents (below 0) raised it. Unit of scores: 10<sup>{{ exponent }}</sup> {{ unit }}.</p>
<div class="cards">
{% for one in answers %}
<section class="card{% if one.own %} own{% endif %}" data-view="{{ one.title }}">
<h3>{{ one.title }}</h3>
<div class="meta">predicted {{ one.prediction }}</div>
{% for side in ("proponents", "opponents") %}
<h4>{{ side }}</h4>
<ol class="{{ side }}">
{% for row in one[side] %}
<li data-id="{{ row.id }}"><div class="meta"><span>{{ row.rank }}</span>
<span class="tag{% if row.language == language %} same{% endif %}">{{ row.language }}</span>
<span>{{ row.label }}</span>
<span>{{ "%+.2f" | format(row.score * 10.0 ** -exponent) | replace("-", "\u2212") }}</span></div>
{% for text in (row.text_a, row.text_b) if text %}
<p dir="auto" lang="{{ row.language | replace('_', '-') }}">{{ text }}</p>
{% endfor %}
</li>
{% endfor %}
</ol>
{% endfor %}
</section>
{% endfor %}
</div>
{% endif %}
</div>""")


def page(explorer: Explorer) -> gr.Blocks:
    """The page, not yet served."""

    def answer(*asked: Any) -> Iterator[str]:
        yield from rendered(explorer, *asked)

    name = explorer.folder.resolve().name
    with gr.Blocks(title=f"tracmod explore: {name}", analytics_enabled=False) as blocks:
        gr.Markdown(
            "# Which training examples speak for it, and in which languages?\n"
            "Type a sentence, or click on a test example below. It is looked at with all heads of "
            "the model and through the subnetwork of each language."
            if explorer.masks
            else "# Which training examples speak for it, and in which languages?\n"
            "Type a sentence, or click on one of the queries below."
        )
        with gr.Row():
            text_a = gr.Textbox(label="Text", lines=2, elem_id="text-a", scale=3)
            text_b = gr.Textbox(label="Second text", lines=2, elem_id="text-b", scale=3,
                                visible=explorer.has_pairs)  # fmt: skip
        with gr.Row():
            language = gr.Dropdown(explorer.languages, label="Language of the sentence",
                                   elem_id="language")  # fmt: skip
            label = gr.Dropdown([AS_PREDICTED, *explorer.labels], value=AS_PREDICTED,
                                label="Label", allow_custom_value=not explorer.labels,
                                elem_id="label")  # fmt: skip
            model = gr.Radio([(MODEL_NAMES[one], one) for one in explorer.models], value="full",
                             label="Model", visible=len(explorer.models) > 1)  # fmt: skip
            listed = gr.Dropdown(explorer.train_languages, multiselect=True, elem_id="listed",
                                 label="List training examples of (none chosen: all)")  # fmt: skip
        asked = gr.Button("Show its training examples", variant="primary", elem_id="ask")
        shown = gr.HTML(elem_id="answer")
        gr.Examples(
            explorer.examples,
            [text_a, text_b, language, label],
            elem_id="examples",
            label="Test examples" if explorer.masks else "Queries",
            examples_per_page=max(1, len(explorer.examples)),
            cache_examples=False,
        )
        inputs = [text_a, text_b, language, label, model, listed]
        gr.on([asked.click, text_a.submit, text_b.submit], answer, inputs, shown,
              api_name="ask", show_progress="minimal")  # fmt: skip
    return blocks


def rendered(
    explorer: Explorer,
    text_a: str,
    text_b: str | None,
    language: str,
    label: str | None,
    model: str,
    listed: Sequence[str] | None,
) -> Iterator[str]:
    """HTML of the answers that there are so far, after each view; an error as one sentence."""
    answers: list[Answer] = []
    shown = {"k": explorer.k, "languages": explorer.train_languages, "language": language,
             "unit": explorer.unit, "exponent": 0}  # fmt: skip
    try:
        given = None if label in (None, "", AS_PREDICTED) else label
        for answer in explorer.ask(text_a, text_b, language, given, model, listed or ()):
            answers.append(answer)
            strongest = max(abs(row["score"]) for one in answers for row in one["proponents"])
            shown["exponent"] = power_of_ten(strongest)
            waiting = 1 + len(explorer.masks) - len(answers)
            yield _PAGE.render(answers=answers, error="", waiting=waiting, **shown)
    except (ValueError, OSError, RuntimeError) as error:
        sentence = " ".join(str(error).split())
        yield _PAGE.render(answers=answers, error=sentence, waiting=0, **shown)


# --- served ---------------------------------------------------------------------------------


class _OnlyItself(BaseHTTPMiddleware):
    """Answers what its own page asks, and tells the browser to ask nobody else for anything.

    Browsers name the page that asks in `Origin`; programs, which may ask too, send none.
    """

    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        origin = request.headers.get("origin")
        if origin is not None and origin.partition("://")[2] != request.headers.get("host"):
            return PlainTextResponse("another page than this may not ask", status_code=403)
        if request.method == "POST" and not request.url.path.startswith(POSTED):
            return PlainTextResponse("the page has nothing like this", status_code=403)
        response = await call_next(request)
        response.headers["Content-Security-Policy"] = (
            "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
        )
        response.headers["Referrer-Policy"] = "no-referrer"
        return response


def _allowed_hosts(host: str) -> list[str]:
    """The names under which the page may be asked for, as they stand in `Host`.

    Else any web page whose name is made to point here (DNS rebinding) could read the examples
    through the browser of someone who is let in. Who listens on every address is asked for under
    names that this machine does not know: then all are allowed.
    """
    return ["*"] if host in EVERY_ADDRESS else [_in_url(name) for name in (host, *LOOPBACK)]


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def serve(
    folder: str | Path, host: str = "127.0.0.1", port: int = 7860, *, block: bool = True
) -> gr.Blocks:
    """Serve the page until it is interrupted.

    Args:
        folder: a run folder with features, or a folder of `tracmod attribute`.
        host: address to listen on; other than loopback, everyone who reaches it can ask. The page
            answers to this name and to those of loopback, on 0.0.0.0 and :: to every name.
        port: must be free.
        block: until interrupted; else return at once, for `close()` to be called.

    Raises:
        ValueError: as `Attributor`, or the port is taken.
    """
    host = host.strip("[]")
    if host not in LOOPBACK:
        print(f"tracmod: WARNING: {host} is not loopback: everyone who reaches this address can "
              "read the examples and use this machine", file=sys.stderr)  # fmt: skip
    _check_free(host, port)
    explorer = Explorer(folder)
    blocks = page(explorer)
    fonts = ["system-ui", "-apple-system", "Segoe UI", "Noto Sans", "sans-serif"]
    blocks.queue(default_concurrency_limit=1).launch(
        server_name=_in_url(host),
        server_port=port,
        share=False,
        prevent_thread_lock=True,
        quiet=True,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        theme=gr.themes.Base(font=fonts, font_mono=["ui-monospace", "monospace"]),
        css=_CSS,
        app_kwargs={
            "middleware": [
                Middleware(TrustedHostMiddleware, _allowed_hosts(host), www_redirect=False),
                Middleware(_OnlyItself),
            ]
        },
    )
    print(f"tracmod: {explorer.folder} at {blocks.local_url}", file=sys.stderr)
    if block:
        blocks.block_thread()
    return blocks


def _check_free(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with closing(socket.socket(family)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(
                f"{_in_url(host)}:{port}: expected an address and port to listen on, got: "
                f"{error.strerror or error}; take another with --port or --host"
            ) from None
