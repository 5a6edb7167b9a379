/* Explorer: filter, search and read test examples with their proponents and opponents.
   Its data is unpacked when the reader comes near. Texts are inserted as text, never as markup. */
(function () {
  const PER_PAGE = 8, FIRST_LISTED = 5;
  const byId = (id) => document.getElementById(id);
  const section = byId("examples");
  if (!window.DecompressionStream) return; // page.js tells the reader
  let data = null, matching = [], page = 0, chosen = -1, view = 0, listedAll = false, searched = null;

  function make(tag, attributes, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) element.setAttribute(name, value);
    element.append(...children);
    return element;
  }

  const option = (value, text) => make("option", { value }, text);
  const count = (number) => number.toLocaleString("en");
  const percent = (share) => Math.round(share / 100) + "%";
  const label = (number) => (number === null || number < 0 ? "?" : data.labels[number] || String(number));
  const languageTag = (name) => name.replace("_", "-");

  /* --- data --------------------------------------------------------------------------------------- */
  const array = (base64, Kind) => new Kind(bytesOf(base64).buffer);

  function half(bits) {
    const exponent = (bits >> 10) & 31, part = bits & 1023;
    const size = exponent ? 2 ** (exponent - 15) * (1 + part / 1024) : 2 ** -24 * part;
    return bits & 0x8000 ? -size : size;
  }

  async function open() {
    data = JSON.parse(await unpacked("explorer-data"));
    const Position = data.train.label.length < 65535 ? Uint16Array : Uint32Array;
    for (const entry of data.views) {
      entry.prediction = array(entry.prediction, Int16Array);
      entry.shares = array(entry.shares, Uint16Array);
      entry.places = array(entry.places, Position);
      entry.scores = array(entry.scores, Uint16Array);
    }
  }

  /* Shares of the languages for a test example in a view. Side 0: proponents, side 1: opponents. */
  function sharesOf(entry, test, side) {
    const start = (2 * test + side) * data.languages.length;
    return entry.shares.subarray(start, start + data.languages.length);
  }

  /* Listed training examples of a test example in a view: pairs of position and score. */
  function listedOf(entry, test, side) {
    const start = (2 * test + side) * data.shown, listed = [];
    for (let i = start; i < start + data.shown; i++) {
      if (entry.places[i] < data.train.label.length) listed.push([entry.places[i], entry.unit * half(entry.scores[i])]);
    }
    return listed;
  }

  const seenIn = (entry, test) => sharesOf(entry, test, 0).some((share) => share > 0);

  /* --- the list ------------------------------------------------------------------------------------ */
  function isRight(test) {
    return data.views[view].prediction[test] === data.test.label[test];
  }

  function search() {
    const wanted = { language: byId("choose-language").value, label: byId("choose-label").value,
      outcome: byId("choose-outcome").value, words: byId("choose-text").value.toLowerCase().trim() };
    if (wanted.words && searched === null) {
      searched = data.test.text_a.map((text, i) => ((text || "") + "\n" + (data.test.text_b[i] || "")).toLowerCase());
    }
    matching = [];
    for (let i = 0; i < data.test.label.length; i++) {
      if (wanted.language && data.test.language[i] !== wanted.language) continue;
      if (wanted.label && String(data.test.label[i]) !== wanted.label) continue;
      if (wanted.outcome && (wanted.outcome === "right") !== isRight(i)) continue;
      if (wanted.words && !searched[i].includes(wanted.words)) continue;
      matching.push(i);
    }
    page = Math.max(0, Math.floor(matching.indexOf(chosen) / PER_PAGE));
    if (!matching.includes(chosen)) chosen = matching.length ? matching[0] : -1;
    showPage();
    showExample();
  }

  function showPage() {
    const first = page * PER_PAGE, last = Math.min(matching.length, first + PER_PAGE);
    const whole = data.test.label.length;
    byId("choose-count").textContent = matching.length === 0 ? "No example matches."
      : count(first + 1) + "–" + count(last) + " of " + count(matching.length)
        + (matching.length < whole ? ", chosen from " + count(whole) : "");
    byId("previous-page").disabled = page === 0;
    byId("next-page").disabled = last >= matching.length;
    byId("choose-example").replaceChildren(...matching.slice(first, last).map((test) => {
      const language = data.test.language[test];
      const known = data.views[view].prediction[test] >= 0;
      const text = Array.from(data.test.text_a[test] || "").slice(0, 160).join("");
      const button = make("button", { type: "button", "aria-pressed": String(test === chosen) },
        make("span", { class: "outcome " + (isRight(test) ? "right" : "wrong") }, !known ? "" : isRight(test) ? "✓ right" : "✗ wrong"),
        make("span", { class: "tag" }, language), make("span", { class: "tag" }, label(data.test.label[test])),
        make("span", { class: "start", lang: languageTag(language), dir: "auto" }, text));
      button.addEventListener("click", () => {
        chosen = test;
        for (const other of byId("choose-example").querySelectorAll("button")) {
          other.setAttribute("aria-pressed", String(other === button));
        }
        showExample();
      });
      return make("li", {}, button);
    }));
  }

  /* --- the chosen example ----------------------------------------------------------------------------- */
  function texts(examples, position, name) {
    return [examples.text_a[position], examples.text_b[position]].filter(Boolean).map((text) =>
      make("p", { class: name, lang: languageTag(examples.language[position]), dir: "auto" }, text));
  }

  /* The own language comes first, so that strips of several views can be compared; names appear where they fit. */
  function strip(shares, own, width) {
    const order = data.languages.map((_, position) => position).sort((a, b) =>
      (data.languages[b] === own) - (data.languages[a] === own));
    const shown = order.filter((position) => shares[position] > 0);
    const description = shown.map((position) => data.languages[position] + " " + percent(shares[position])).join(", ");
    const parts = shown.map((position) => {
      const language = data.languages[position], text = language + " " + percent(shares[position]);
      const part = make("span", { title: text, class: language === own ? "mine" : "" },
        [text, language].find((name) => 7.4 * name.length + 6 < (width * shares[position]) / 10000) || "");
      part.style.width = shares[position] / 100 + "%";
      return part;
    });
    return make("div", { class: "strip", role: "img", "aria-label": description || "none" }, ...parts);
  }

  function showExample() {
    const some = chosen >= 0;
    byId("explorer").hidden = !some;
    if (!some) return;
    const own = data.test.language[chosen];
    showStrips(own);
    const predicted = data.views[view].prediction[chosen];
    const outcome = predicted < 0 ? "" : ", predicted " + label(predicted) + (isRight(chosen) ? " (right)" : " (wrong)");
    const group = data.test.group[chosen];
    byId("explorer-text").replaceChildren(...texts(data.test, chosen, "text"),
      make("p", { class: "under" }, own + ", label " + label(data.test.label[chosen]) + outcome
        + (group === null ? "" : ", item " + group)));
    showListed();
  }

  function showStrips(own) {
    data.views.forEach((entry, position) => {
      const cells = byId("explorer-views").querySelectorAll("label")[position].querySelectorAll(".strips > div");
      [0, 1].forEach((side) => cells[side].replaceChildren(seenIn(entry, chosen)
        ? strip(sharesOf(entry, chosen, side), own, cells[side].clientWidth) : make("span", { class: "under" }, "not computed")));
    });
  }

  function scientific(score) {
    const [digits, exponent] = score.toExponential(2).split("e");
    const raised = [...exponent.replace("+", "")].map((sign) =>
      sign === "-" ? "\u207b" : "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079"[sign]);
    return digits.replace("-", "\u2212") + "\u00a0×\u00a010" + raised.join("");
  }

  function isWanted(position) {
    const language = byId("train-language").value, wanted = byId("train-label").value;
    const own = data.test.language[chosen], trained = data.train.language[position];
    if (language === "own" && trained !== own || language === "other" && trained === own) return false;
    if (language.startsWith("=") && trained !== language.slice(1)) return false;
    return !wanted || (wanted === "same") === (data.train.label[position] === data.test.label[chosen]);
  }

  function row([position, score]) {
    const language = data.train.language[position], group = data.train.group[position];
    const same = group !== null && group === data.test.group[chosen];
    return make("tr", same ? { class: "same-item" } : {},
      make("td", { class: "tag" + (language === data.test.language[chosen] ? " own" : "") }, language),
      make("td", {}, ...texts(data.train, position, "listed-text"),
        make("small", {}, label(data.train.label[position]) + (group === null ? "" : " · item " + group)
          + (same ? " · same item as the test example" : ""))),
      make("td", { class: "n" }, scientific(score)));
  }

  function listing(title, side) {
    const all = listedOf(data.views[view], chosen, side), wanted = all.filter(([position]) => isWanted(position));
    const shown = listedAll ? wanted : wanted.slice(0, FIRST_LISTED);
    const head = make("thead", {}, make("tr", {}, ...["Language", "Training example", "Score"].map((name) =>
      make("th", { scope: "col", class: name === "Score" ? "n" : "" }, name))));
    const summary = wanted.length === all.length
      ? "The " + shown.length + " strongest of " + all.length + " listed here."
      : wanted.length + " of the " + all.length + " listed here match" + (shown.length < wanted.length ? "; " + shown.length + " shown." : ".");
    return make("div", {}, make("h3", {}, title), make("p", { class: "under" }, summary),
      make("table", {}, head, make("tbody", {}, ...shown.map(row))));
  }

  function showListed() {
    byId("listed").replaceChildren(listing("Strongest proponents", 0), listing("Strongest opponents", 1));
    byId("list-all").textContent = listedAll ? "Show fewer" : "Show up to " + data.shown;
  }

  /* --- controls --------------------------------------------------------------------------------------- */
  function viewChoice(entry, position) {
    const input = make("input", { type: "radio", name: "explorer-view", value: position });
    input.checked = position === view;
    input.addEventListener("change", () => {
      view = position;
      search(); // whether a prediction is right depends on the view
    });
    return make("label", {}, input, make("span", { class: "name" }, entry.title),
      make("span", { class: "strips" }, make("div"), make("div")));
  }

  function fill() {
    const languages = [...new Set(data.test.language)];
    byId("choose-language").append(...languages.map((name) => option(name, name)));
    byId("choose-label").append(...data.labels.map((name, position) => option(position, name)));
    byId("train-language").append(...data.languages.map((name) => option("=" + name, name)));
    byId("explorer-views").append(...data.views.map(viewChoice));
    for (const id of ["choose-language", "choose-label", "choose-outcome"]) byId(id).addEventListener("change", search);
    byId("choose-text").addEventListener("input", search);
    for (const id of ["train-language", "train-label"]) byId(id).addEventListener("change", showListed);
    byId("list-all").addEventListener("click", () => { listedAll = !listedAll; showListed(); });
    window.addEventListener("resize", () => { if (chosen >= 0) showStrips(data.test.language[chosen]); });
    for (const [id, step] of [["previous-page", -1], ["next-page", 1]]) {
      byId(id).addEventListener("click", () => { page += step; showPage(); });
    }
  }

  new IntersectionObserver(async (entries, observer) => {
    if (!entries.some((entry) => entry.isIntersecting)) return;
    observer.disconnect();
    await open();
    if (data.views.length) {
      fill();
      search();
    } else {
      byId("choose-count").textContent = "No influence in this run.";
    }
    section.dataset.ready = "yes";
  }, { rootMargin: "1000px" }).observe(section);
})();
