"use strict";
/* Draws the figures in the page's colours when they come into view, switches panels, lists examples. */
(function () {
  const figures = JSON.parse(document.getElementById("figure-data").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");

  function color(name) {
    return getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
  }

  function scale(kind) {
    const prefix = kind === "diverging" ? "div-" : "seq-";
    return [0, 1, 2, 3, 4].map((step) => [step / 4, color(prefix + step)]);
  }

  function channels(hex) {
    return [1, 3, 5].map((start) => parseInt(hex.slice(start, start + 2), 16));
  }

  /* Relative luminance (WCAG) of a place 0..1 on a colour scale. */
  function luminance(steps, place) {
    const step = Math.min(3, Math.floor(4 * place));
    const [low, high] = [channels(steps[step][1]), channels(steps[step + 1][1])];
    const linear = low.map((value, i) => {
      const part = (value + (high[i] - value) * (4 * place - step)) / 255;
      return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  }

  /* The numbers in a heatmap's cells, dark or light by what reads better on each cell. */
  function numbers(trace, steps) {
    const text = { type: "scatter", mode: "text", x: [], y: [], text: [], hoverinfo: "skip",
      showlegend: false, textfont: { size: 12, color: [] } };
    trace.z.forEach((row, i) => row.forEach((value, j) => {
      if (value === null) return;
      const place = Math.min(1, Math.max(0, (value - trace.zmin) / (trace.zmax - trace.zmin)));
      text.x.push(trace.x[j]);
      text.y.push(trace.y[i]);
      text.text.push(trace.text[i][j]);
      text.textfont.color.push(luminance(steps, place) > 0.18 ? "#10151b" : "#ffffff");
    }));
    return text;
  }

  function themed(figure) {
    const data = structuredClone(figure.data);
    const layout = structuredClone(figure.layout);
    const ink = color("ink"), muted = color("muted"), line = color("line");
    for (const trace of [...data]) {
      const meta = trace.meta || {};
      if (meta.scale) {
        trace.colorscale = scale(meta.scale);
        if (trace.text) data.push(numbers(trace, trace.colorscale));
      }
      if (meta.color) {
        trace.marker = Object.assign({}, trace.marker, { color: color(meta.color) });
        if (trace.line) trace.line.color = color(meta.color);
        if (trace.error_y) trace.error_y.color = trace.line ? color(meta.color) : ink;
        if (trace.textfont) trace.textfont.color = muted;
      }
    }
    for (const shape of layout.shapes || []) Object.assign(shape.line, { color: ink, width: 1.3 });
    for (const note of layout.annotations || []) note.font = { color: muted, size: 11 };
    for (const axis of ["xaxis", "yaxis"]) {
      const own = layout[axis] || {};
      const title = own.title && own.title.text ? own.title : { text: own.title || "" };
      layout[axis] = Object.assign({}, own, {
        title: Object.assign({}, title, { standoff: 10, font: { size: 12, color: muted } }),
        automargin: true, fixedrange: true, gridcolor: line, linecolor: line, zeroline: false,
        ticks: "", tickfont: { color: ink },
      });
    }
    return {
      data,
      layout: Object.assign(layout, {
        autosize: true,
        dragmode: false,
        margin: { l: 10, r: 14, t: 8, b: 10 },
        paper_bgcolor: "rgba(0,0,0,0)",
        plot_bgcolor: "rgba(0,0,0,0)",
        font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: ink },
        legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { color: ink } },
        hoverlabel: { bgcolor: color("panel"), bordercolor: line, font: { color: ink }, align: "left" },
      }),
    };
  }

  function draw(element) {
    const figure = themed(figures[Number(element.dataset.figure)]);
    element.dataset.drawn = "yes";
    Plotly.react(element, figure.data, figure.layout, { responsive: true, displayModeBar: false });
  }

  const plots = Array.from(document.querySelectorAll(".plot"));
  const waiting = [];

  /* One figure at a time, so that the page answers in between. */
  function drawNext() {
    const element = waiting.shift();
    if (waiting.length) setTimeout(drawNext);
    if (element && !element.dataset.drawn && !element.closest("[hidden]")) draw(element);
  }

  const seen = new IntersectionObserver((entries) => {
    const idle = waiting.length === 0;
    waiting.push(...entries.filter((entry) => entry.isIntersecting).map((entry) => entry.target));
    if (idle && waiting.length) setTimeout(drawNext);
  }, { rootMargin: "500px" });
  plots.forEach((element) => seen.observe(element));
  const redraw = () => plots.filter((element) => element.dataset.drawn).forEach(draw);
  dark.addEventListener("change", redraw);
  window.addEventListener("beforeprint", () => {
    plots.filter((element) => !element.dataset.drawn && !element.closest("[hidden]")).forEach(draw);
  });

  for (const input of document.querySelectorAll(".switch input")) {
    input.addEventListener("change", () => {
      const panels = input.closest(".switched").querySelectorAll(":scope > .panel");
      panels.forEach((panel, place) => { panel.hidden = place !== Number(input.value); });
    });
  }

  /* --- examples: every text is set as text, never as markup ------------------------------------ */
  const data = JSON.parse(document.getElementById("explorer-data").textContent);
  if (data === null) return; // a page without examples
  const chooser = {};
  for (const name of ["language", "outcome", "example", "view"]) {
    chooser[name] = document.getElementById("choose-" + name);
  }
  const target = document.getElementById("explorer");

  function make(tag, attributes, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) element.setAttribute(name, value);
    element.append(...children);
    return element;
  }

  function option(value, text) {
    return make("option", { value }, text);
  }

  function texts(language, text_a, text_b, name) {
    const shown = [text_a, text_b].filter((text) => text !== null && text !== "");
    return shown.map((text) =>
      make("p", { class: name, lang: language.replace("_", "-"), dir: "auto" }, text));
  }

  const label = (number) => (number === null ? "?" : data.labels[number] || String(number));
  const percent = (share) => Math.round(100 * share) + "%";

  function shareStrip(shares, own) {
    const strip = make("div", { class: "strip" });
    shares.forEach((share, place) => {
      if (share === 0) return;
      const language = data.languages[place];
      const text = share >= 0.09 ? language + " " + percent(share) : "";
      const part = make("span", { title: language + " " + percent(share), class: language === own ? "mine" : "" }, text);
      part.style.width = 100 * share + "%";
      strip.append(part);
    });
    return strip;
  }

  function scientific(score) {
    const [digits, exponent] = score.toExponential(2).split("e");
    const raised = [...exponent.replace("+", "")].map((sign) =>
      sign === "-" ? "\u207b" : "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079"[sign]);
    return digits.replace("-", "\u2212") + "\u00a0×\u00a010" + raised.join("");
  }

  function listing(title, shares, entries, own) {
    const body = make("tbody");
    for (const [place, score] of entries) {
      const [language, text_a, text_b, gold] = data.train[place];
      body.append(make("tr", {},
        make("td", { class: "tag" + (language === own ? " own" : "") }, language),
        make("td", {}, ...texts(language, text_a, text_b, "listed-text"),
          make("small", {}, label(gold))),
        make("td", { class: "n" }, scientific(score))));
    }
    const head = make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "Language"),
      make("th", { scope: "col" }, "Training example"), make("th", { scope: "col", class: "n" }, "Score")));
    return make("div", {}, make("h3", {}, title),
      make("p", { class: "under" }, "Languages of the strongest " + (data.k || "ones") + ":"), shareStrip(shares, own), make("table", {}, head, body));
  }

  function showExample() {
    const test = data.tests[Number(chooser.example.value)];
    const view = test && test.views[Number(chooser.view.value)];
    target.replaceChildren();
    if (!view) {
      target.append(make("p", { class: "note" }, "No such example."));
      return;
    }
    const outcome = view.prediction === null ? "" : ", predicted " + label(view.prediction) +
      (view.prediction === test.label ? " (right)" : " (wrong)");
    target.append(
      make("div", { class: "example" }, ...texts(test.language, test.text_a, test.text_b, "text"),
        make("p", { class: "under" }, test.language + ", label " + label(test.label) + outcome)),
      make("div", { class: "listed" },
        listing("Strongest proponents", view.shares, view.proponents, test.language),
        listing("Strongest opponents", view.opponent_shares, view.opponents, test.language)));
  }

  function isRight(test) {
    const view = test.views[Number(chooser.view.value)];
    return Boolean(view) && view.prediction === test.label;
  }

  function listExamples() {
    const before = chooser.example.value;
    chooser.example.replaceChildren();
    data.tests.forEach((test, place) => {
      if (test.language !== chooser.language.value) return;
      const outcome = chooser.outcome.value;
      if (outcome && (outcome === "right") !== isRight(test)) return;
      const text = [...(test.text_a || "")];
      const start = text.slice(0, 90).join("") + (text.length > 90 ? " …" : "");
      chooser.example.append(option(place, (isRight(test) ? "✓ " : "✗ ") + start));
    });
    if ([...chooser.example.options].some((one) => one.value === before)) chooser.example.value = before;
    showExample();
  }

  const languages = [...new Set(data.tests.map((test) => test.language))];
  chooser.language.append(...languages.map((language) => option(language, language)));
  chooser.view.append(...data.views.map((view, place) => option(place, view.title)));
  chooser.language.addEventListener("change", listExamples);
  chooser.outcome.addEventListener("change", listExamples);
  chooser.example.addEventListener("change", showExample);
  chooser.view.addEventListener("change", listExamples);
  listExamples();
})();
