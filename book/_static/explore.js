// Explorables: figures and audio players that follow sliders, from data embedded in the page.
//
// <div class="explorable" data-kind="curves|bands|grids|meters|listen"> holds range inputs, a .drawing, a .caption (a live
// region) and a <script type="application/json">: {common, settings}. The settings cover all positions of the sliders, the
// last slider fastest; each has a `caption`, in sentences, and the data that its kind draws. This script computes nothing
// that a reader sees: bsmamba2.teaching.explorables does, and writes the elements. Of kind "blind" are tests with a player
// and a <select> for each hidden sound: see `blind`.
"use strict";

(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const MARGIN = { top: 26, right: 14, bottom: 40, left: 54 };

  function add(parent, name, attributes = {}, text) {
    const svg = parent.namespaceURI === SVG || name === "svg";
    const made = svg ? document.createElementNS(SVG, name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    return parent.appendChild(made);
  }

  const number = (value) => value.toLocaleString("en", { maximumSignificantDigits: 3 });
  const fixed = (value, digits) => (Math.abs(value) < 0.5 / 10 ** digits ? 0 : value).toFixed(digits).replace("-", "−");

  // --- scales: from a value to a position between 0 and 1 ---

  function scale(kind, low, high) {
    // "hertz" is linear to 1 kHz and logarithmic above, as in the figures of the book.
    const through = {
      linear: (v) => v,
      log: (v) => Math.log(v),
      hertz: (v) => (v <= 1000 ? v / 1000 : 1 + Math.log(v / 1000)),
    }[kind];
    return (v) => (through(v) - through(low)) / (through(high) - through(low));
  }

  function ticks(most, count = 4) {
    const rough = most / count, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
    return Array.from({ length: Math.floor(most / step + 1e-9) + 1 }, (_, i) => i * step);
  }

  function frame(drawing, panel, width, height) {
    const svg = add(drawing, "svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": panel.alt });
    const x0 = MARGIN.left, y0 = height - MARGIN.bottom;
    const across = scale(panel.xscale, ...panel.xlim), inner = width - MARGIN.left - MARGIN.right;
    const x = (v) => x0 + inner * across(v);
    add(svg, "text", { x: x0, y: 15, class: "title" }, panel.title);
    let last = -Infinity; // where the last number stands: one that would touch it is left out
    for (const tick of panel.xticks) {
      add(svg, "line", { x1: x(tick), x2: x(tick), y1: y0, y2: y0 + 4, class: "axis" });
      if (x(tick) - last < 25) continue;
      last = x(tick);
      add(svg, "text", { x: last, y: y0 + 16, "text-anchor": "middle" }, tick >= 1000 ? `${tick / 1000}k` : String(tick).replace("-", "−"));
    }
    add(svg, "line", { x1: x0, x2: x0 + inner, y1: y0, y2: y0, class: "axis" });
    add(svg, "text", { x: x0 + inner / 2, y: height - 6, "text-anchor": "middle" }, panel.xlabel);
    return { svg, x, x0, y0, inner };
  }

  // --- kinds ---

  // Lines over one pair of axes, panel below panel. A setting gives `y`, new lines by panel and series, `mark`, a point on
  // the lines, and `at`, a point of its own, or some of these. The upward axis is logarithmic from `least` on, where a panel
  // has it, else linear from 0.
  function curves(drawing, common, setting, width) {
    common.panels.forEach((panel, i) => {
      const height = 210, { svg, x, x0, y0, inner } = frame(drawing, panel, width, height);
      const upward = panel.least ? scale("log", panel.least, panel.most) : scale("linear", 0, panel.most);
      const y = (v) => y0 - (y0 - MARGIN.top) * upward(v);
      if (panel.shade) {
        const [from, to] = panel.shade.map(x);
        add(svg, "rect", { x: from, y: MARGIN.top, width: to - from, height: y0 - MARGIN.top, class: "shade" });
        add(svg, "text", { x: (from + to) / 2, y: MARGIN.top + 14, "text-anchor": "middle" }, panel.shadeLabel);
      }
      for (const tick of panel.yticks || ticks(panel.most)) {
        add(svg, "line", { x1: x0, x2: x0 + inner, y1: y(tick), y2: y(tick), class: "grid" });
        add(svg, "text", { x: x0 - 6, y: y(tick) + 4, "text-anchor": "end" }, number(tick));
      }
      panel.series.forEach((series, j) => {
        const values = setting.y ? setting.y[i][j] : series.y;
        const points = panel.x.map((v, k) => `${x(v).toFixed(1)},${y(values[k]).toFixed(1)}`).join(" ");
        add(svg, "polyline", { points, class: `series s${j}` });
        if (panel.series.length > 1) {
          const at = { x: x0 + inner * (0.02 + 0.3 * j), y: MARGIN.top + 12 };
          add(svg, "line", { x1: at.x, x2: at.x + 22, y1: at.y - 4, y2: at.y - 4, class: `series s${j}` });
          add(svg, "text", { x: at.x + 27, y: at.y }, series.name);
        }
        if (setting.mark !== undefined) {
          add(svg, "circle", { cx: x(panel.x[setting.mark]), cy: y(values[setting.mark]), r: 5, class: `dot s${j}` });
        }
      });
      if (setting.at) add(svg, "circle", { cx: x(setting.at[0]), cy: y(setting.at[1]), r: 6, class: "dot s1" });
    });
    if (common.sound) play(drawing, common.label, common.sound);
  }

  // Rows of blocks on a hertz axis: one that moves, above one that stays.
  function bands(drawing, common, setting, width) {
    const { svg, x } = frame(drawing, common.panel, width, 190);
    const rows = [[setting.name, setting.edges], [common.still.name, common.still.edges]];
    rows.forEach(([name, edges], row) => {
      const top = MARGIN.top + 18 + row * 58;
      add(svg, "text", { x: MARGIN.left, y: top - 5 }, name);
      for (let k = 0; k + 1 < edges.length; k++) {
        const from = x(edges[k]), to = x(Math.min(edges[k + 1], common.panel.xlim[1]));
        add(svg, "rect", { x: from, y: top, width: Math.max(to - from - 0.4, 0.4), height: 30, class: `block s${k % 2}` });
      }
      for (const hertz of common.marks) {
        add(svg, "line", { x1: x(hertz), x2: x(hertz), y1: top - 2, y2: top + 34, class: "mark" });
      }
    });
    play(drawing, common.label, setting.sound);
  }

  // Tables of cells, side by side where there is room. A panel's `values` are its own or the setting's: numbers, or a string
  // of digits; their size is the strength of the colour, their sign its hue, unless the panel names `classes` for them. With
  // `digits` they are written too. `pick` names the sliders that a touched cell sets, by its row and column.
  function grids(drawing, common, setting, width, set) {
    common.panels.forEach((panel, i) => {
      const { rows, cols, labels = {}, digits, pick, most, classes } = panel;
      const left = labels.row ? 18 : 0, top = labels.col ? 40 : 24;
      const size = Math.min(panel.size, Math.floor((width - left - 2) / cols));
      const extra = panel.key ? 20 : 0;
      const wide = Math.max(left + cols * size + 2, Math.min(width, 140)), high = top + rows * size + 2 + extra;
      const svg = add(drawing, "svg", { viewBox: `0 0 ${wide} ${high}`, width: wide, height: high, role: "img", "aria-label": panel.alt });
      const at = (row, col) => ({ x: left + col * size, y: top + (panel.up ? rows - 1 - row : row) * size, width: size, height: size });
      const middle = ({ x, y, width }) => ({ x: x + width / 2, y: y + width / 2 + 4, "text-anchor": "middle" });
      const values = panel.values || setting.values[i];
      add(svg, "text", { x: left, y: 14, class: "title" }, panel.title);
      (labels.col || []).forEach((label, col) => add(svg, "text", { ...middle(at(0, col)), y: top - 6 }, label));
      (labels.row || []).forEach((label, row) => add(svg, "text", { ...middle(at(row, 0)), x: left - 4, "text-anchor": "end" }, label));
      add(svg, "rect", { x: left, y: top, width: cols * size, height: rows * size, class: "cells" });
      for (let cell = 0; cell < rows * cols; cell++) {
        const place = at(Math.floor(cell / cols), cell % cols);
        const value = values[cell] === null ? null : Number(values[cell]);
        const shown = value !== null && (!classes || classes[value]);
        const hue = shown ? (classes ? classes[value] : value < 0 ? "s1" : "s0") : "empty";
        const strength = !shown ? 1 : classes ? 0.75 : Math.min(Math.abs(value) / most, 1) * (digits === undefined ? 1 : 0.5);
        add(svg, "rect", { ...place, class: `block cell ${hue}`, "fill-opacity": strength, "data-cell": cell });
        if (digits !== undefined && value !== null) add(svg, "text", { ...middle(place), class: "value" }, fixed(value, digits));
      }
      if (pick) {
        svg.classList.add("pick");
        svg.addEventListener("click", (event) => {
          const { cell } = event.target.dataset;
          if (cell) set({ [pick.row]: Math.floor(cell / cols), [pick.col]: cell % cols });
        });
      }
      for (const border of panel.borders || []) {
        const x = left + border * size, y = top + border * size;
        add(svg, "line", { x1: left, x2: left + cols * size, y1: y - 0.5, y2: y - 0.5, class: "axis" });
        add(svg, "line", { x1: x + 0.5, x2: x + 0.5, y1: top, y2: top + rows * size, class: "axis" });
      }
      for (const [row, col, kind] of setting.marks[i]) add(svg, "rect", { ...at(row, col), class: `outline ${kind}` });
      let x = left;
      (panel.key || []).forEach((words, value) => {
        if (!words) return;
        add(svg, "rect", { x, y: high - 15, width: 12, height: 12, class: `block ${classes[value]}`, "fill-opacity": 0.75 });
        add(svg, "text", { x: x + 16, y: high - 5 }, words);
        x += 24 + 6.5 * words.length;
      });
    });
  }

  // Scores on one axis, row by row: a ring where each was, a dot where it is.
  function meters(drawing, common, setting, width) {
    const { svg, x, x0, inner } = frame(drawing, common.panel, width, 84 + 40 * common.names.length);
    const inside = (v) => x(Math.max(common.panel.xlim[0], Math.min(common.panel.xlim[1], v)));
    common.names.forEach((name, i) => {
      const y = MARGIN.top + 38 + 40 * i, [before, now] = [setting.before[i], setting.values[i]];
      add(svg, "text", { x: x0, y: y - 14 }, `${name}: ${fixed(now, 1)} dB`);
      add(svg, "line", { x1: x0, x2: x0 + inner, y1: y, y2: y, class: "grid" });
      add(svg, "line", { x1: inside(before), x2: inside(now), y1: y, y2: y, class: "series s1" });
      add(svg, "circle", { cx: inside(before), cy: y, r: 7, class: "ring" });
      add(svg, "circle", { cx: inside(now), cy: y, r: 5, class: "dot s0" });
    });
    play(drawing, common.label, setting.sound);
  }

  function play(drawing, label, src) {
    const figure = add(drawing, "figure", { class: "player" });
    add(figure, "figcaption", {}, label);
    add(figure, "audio", { controls: "", preload: "metadata", "aria-label": label, src });
  }

  // Pictures and players, side by side where there is room.
  function listen(drawing, common, setting) {
    setting.parts.forEach((part, i) => {
      const figure = add(drawing, "figure");
      add(figure, "figcaption", {}, common.labels[i]);
      add(figure, "img", { src: part.picture, alt: part.alt });
      add(figure, "audio", { controls: "", preload: "metadata", "aria-label": common.labels[i], src: part.sound });
    });
  }

  const KINDS = { curves, bands, grids, meters, listen };

  // --- one explorable ---

  function start(box) {
    const { common, settings } = JSON.parse(box.querySelector('script[type="application/json"]').textContent);
    const sliders = [...box.querySelectorAll('input[type="range"]')];
    const drawing = box.querySelector(".drawing"), caption = box.querySelector(".caption");
    const names = sliders.map((slider) => JSON.parse(slider.dataset.values));
    let width = 0;

    function draw() {
      const index = sliders.reduce((sum, slider, i) => sum * names[i].length + Number(slider.value), 0);
      drawing.replaceChildren();
      KINDS[box.dataset.kind](drawing, common, settings[index], width, set);
      sliders.forEach((slider, i) => {
        const value = names[i][slider.value];
        slider.setAttribute("aria-valuetext", value);
        box.querySelector(`output[for="${slider.id}"]`).textContent = value;
      });
      if (caption.textContent !== settings[index].caption) caption.textContent = settings[index].caption;
    }

    function set(values) {
      sliders.forEach((slider, i) => (slider.value = values[i] ?? slider.value));
      draw();
    }

    box.querySelector(".controls").hidden = false;
    new ResizeObserver(() => {
      const now = Math.max(260, Math.floor(drawing.clientWidth));
      if (now === width) return;
      const first = width === 0;
      width = now;
      if (first || !drawing.querySelector("audio")) draw(); // redrawing would stop a player
    }).observe(drawing);
    sliders.forEach((slider) => slider.addEventListener("input", draw));
  }

  // Sounds without their names: once the answer is open, each guess is marked.
  function blind(box) {
    const answer = box.querySelector("details"), guesses = [...box.querySelectorAll("select")];
    function mark() {
      const right = guesses.filter((guess) => guess.value === guess.dataset.right);
      for (const guess of guesses) {
        const words = right.includes(guess) ? "right" : `it is ${guess.dataset.right}`;
        guess.nextElementSibling.textContent = answer.open ? words : "";
      }
      box.querySelector(".caption").textContent = answer.open ? `Right guesses: ${right.length} of ${guesses.length}.` : "";
    }
    answer.addEventListener("toggle", mark);
    guesses.forEach((guess) => guess.addEventListener("change", mark));
  }

  document.addEventListener("DOMContentLoaded", () => {
    document.querySelectorAll(".explorable").forEach((box) => (box.dataset.kind === "blind" ? blind : start)(box));
  });
})();
