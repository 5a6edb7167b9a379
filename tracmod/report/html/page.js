"use strict";
/* Draws figures in the theme's colors when the reader comes near, switches tabs, compares views, and prints. */

function bytesOf(base64) {
  const text = atob(base64), bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

/* Return the text of a script element that holds base64 of gzip. */
async function unpacked(id) {
  const stream = new Blob([bytesOf(document.getElementById(id).textContent)]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}

(function () {
  if (!window.DecompressionStream) {
    const note = document.createElement("p");
    note.textContent = "The figures and the examples need a browser of May 2023 or later.";
    document.querySelector("main").prepend(note);
    return;
  }
  let figures = null; // Plotly's data of each plot, once unpacked
  const dark = window.matchMedia("(prefers-color-scheme: dark)");

  function color(name) {
    return getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
  }

  /* Text size in pixels; smaller on paper, where figures are narrower. */
  const textSize = () => (document.documentElement.dataset.paper ? 9.5 : 12);

  function scale(kind) {
    const prefix = kind === "diverging" ? "div-" : "seq-";
    return [0, 1, 2, 3, 4].map((step) => [step / 4, color(prefix + step)]);
  }

  function channels(hex) {
    return [1, 3, 5].map((start) => parseInt(hex.slice(start, start + 2), 16));
  }

  /* Return the relative luminance (WCAG) of a position from 0 to 1 on a color scale. */
  function luminance(steps, position) {
    const step = Math.min(3, Math.floor(4 * position));
    const [low, high] = [channels(steps[step][1]), channels(steps[step + 1][1])];
    const linear = low.map((value, i) => {
      const part = (value + (high[i] - value) * (4 * position - step)) / 255;
      return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  }

  /* Return a trace of the numbers in a heat map's cells, dark or light depending on each cell's color. */
  function numbers(trace, steps) {
    const text = { type: "scatter", mode: "text", x: [], y: [], text: [], hoverinfo: "skip",
      showlegend: false, textfont: { size: textSize(), color: [] } };
    trace.z.forEach((row, i) => row.forEach((value, j) => {
      if (value === null) return;
      const position = Math.min(1, Math.max(0, (value - trace.zmin) / (trace.zmax - trace.zmin)));
      text.x.push(trace.x[j]);
      text.y.push(trace.y[i]);
      text.text.push(trace.text[i][j]);
      text.textfont.color.push(luminance(steps, position) > 0.179 ? "#000000" : "#ffffff");
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
    for (const note of layout.annotations || []) note.font = { color: muted, size: textSize() - 1 };
    for (const axis of ["xaxis", "yaxis"]) {
      const own = layout[axis] || {};
      const title = own.title && own.title.text ? own.title : { text: own.title || "" };
      layout[axis] = Object.assign({}, own, {
        title: Object.assign({}, title, { standoff: 10, font: { size: textSize(), color: muted } }),
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
        font: { family: getComputedStyle(document.body).fontFamily, size: textSize(), color: ink },
        legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { color: ink } },
        hoverlabel: { bgcolor: color("panel"), bordercolor: line, font: { color: ink }, align: "left" },
      }),
    };
  }

  /* --- drawing: everything is unpacked once, when idle; a figure is drawn when the reader comes near --- */
  async function unpack() {
    const [source, data] = await Promise.all([unpacked("plotly"), unpacked("figure-data")]);
    const script = document.createElement("script");
    script.textContent = source;
    document.head.append(script);
    figures = JSON.parse(data);
  }

  let unpacking = null;
  function withPlotly() {
    unpacking = unpacking || unpack();
    return unpacking;
  }

  function draw(element) {
    const own = element.closest(".compare");
    const figure = themed(own ? compared(own) : figures[Number(element.dataset.figure)]);
    element.dataset.drawn = "yes";
    Plotly.react(element, figure.data, figure.layout, { responsive: true, displayModeBar: false });
    const ruler = document.getElementById("js-plotly-tester"); // an invisible element in which Plotly measures texts
    if (ruler) ruler.setAttribute("aria-hidden", "true");
  }

  const plots = Array.from(document.querySelectorAll(".plot"));
  const waiting = [];

  /* Draw one figure at a time, so that the page stays responsive. */
  function drawNext() {
    const element = waiting.shift();
    if (waiting.length) setTimeout(drawNext);
    if (element && !element.dataset.drawn && !element.closest("[hidden]")) draw(element);
  }

  const nearby = new IntersectionObserver((entries) => {
    const near = entries.filter((entry) => entry.isIntersecting).map((entry) => entry.target);
    if (near.length === 0) return;
    withPlotly().then(() => {
      const idle = waiting.length === 0;
      waiting.push(...near);
      if (idle) setTimeout(drawNext);
    });
  }, { rootMargin: "500px" });
  plots.forEach((element) => nearby.observe(element));
  if (plots.length) {
    const whenIdle = window.requestIdleCallback || ((work) => setTimeout(work, 300));
    window.addEventListener("load", () => setTimeout(() => whenIdle(withPlotly), 100));
  }
  const redraw = () => plots.filter((element) => element.dataset.drawn).forEach(draw);
  dark.addEventListener("change", redraw);

  /* --- tabs: one panel of a section is shown --------------------------------------------------------- */
  for (const input of document.querySelectorAll(".switch input")) {
    input.addEventListener("change", () => {
      const panels = input.closest(".switched").querySelectorAll(":scope > .panel");
      panels.forEach((panel, position) => { panel.hidden = position !== Number(input.value); });
    });
  }

  /* --- comparison: the numbers of one view minus those of another ------------------------------------ */
  function signed(value) {
    const text = value.toFixed(1);
    return (Number(text) < 0 ? "\u2212" : "+") + text.replace("-", "");
  }

  function compared(element) {
    const [shown, base] = Array.from(element.querySelectorAll("select"), (select) => select.value);
    const figure = structuredClone(figures[Number(shown)]);
    if (base === "") return figure;
    const trace = figure.data[0], other = figures[Number(base)].data[0];
    trace.z = trace.z.map((row, i) => row.map((value, j) => {
      const from = (other.z[other.y.indexOf(trace.y[i])] || [])[other.x.indexOf(trace.x[j])];
      return value === null || typeof from !== "number" ? null : value - from;
    }));
    trace.zmax = Math.max(...trace.z.flat().map((value) => Math.abs(value || 0))) || 1;
    trace.zmin = -trace.zmax;
    trace.meta = { scale: "diverging" };
    const cells = (write) => trace.z.map((row, i) => row.map((value, j) => value === null ? "" : write(value, i, j)));
    if (trace.text) trace.text = cells(signed);
    trace.hovertext = cells((value, i, j) => "test language " + trace.y[i] + ", training language " + trace.x[j] + "<br>" + signed(value));
    return figure;
  }

  for (const element of document.querySelectorAll(".compare")) {
    const [shown, base] = element.querySelectorAll("select");
    const show = () => {
      const name = (select) => select.selectedOptions[0].textContent;
      const title = name(shown) + (base.value === "" ? "" : " \u2212 " + name(base));
      element.querySelector("figcaption").textContent = title;
      const plot = element.querySelector(".plot");
      plot.setAttribute("aria-label", title);
      if (plot.dataset.drawn) draw(plot);
    };
    element.addEventListener("change", show);
    show();
  }

  /* --- printing: light theme, as wide as the sheet, every panel and table open ------------------------ */
  let restore = null;
  window.addEventListener("beforeprint", () => {
    if (restore) return;
    const closed = document.querySelectorAll("details:not([open])");
    closed.forEach((details) => { details.open = true; });
    restore = () => closed.forEach((details) => { details.open = false; });
    document.documentElement.dataset.paper = "yes";
    if (figures) plots.filter((element) => element.offsetWidth).forEach(draw);
  });
  window.addEventListener("afterprint", () => {
    if (!restore) return;
    delete document.documentElement.dataset.paper;
    restore();
    restore = null;
    redraw();
  });

  /* --- the current section is marked in the table of contents ---------------------------------------- */
  const links = new Map(Array.from(document.querySelectorAll("nav a"), (link) => [link.hash.slice(1), link]));
  const current = new IntersectionObserver((entries) => {
    for (const entry of entries.filter((other) => other.isIntersecting)) {
      links.forEach((link, id) => link.setAttribute("aria-current", String(id === entry.target.id)));
    }
  }, { rootMargin: "-20% 0px -75% 0px" });
  document.querySelectorAll("main > section").forEach((section) => current.observe(section));

  for (const button of document.querySelectorAll("button[data-copy]")) {
    button.addEventListener("click", async () => {
      const source = document.getElementById(button.dataset.copy);
      try {
        await navigator.clipboard.writeText(source.textContent);
        button.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(source); // the page may not write to the clipboard
        button.textContent = "Selected: press Ctrl+C";
      }
      setTimeout(() => { button.textContent = "Copy"; }, 2000);
    });
  }
})();
