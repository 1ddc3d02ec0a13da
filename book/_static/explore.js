// Explorables: figures and audio players that follow sliders, from data embedded in the page.
//
// <div class="explorable" data-kind="curves|bands|listen"> holds range inputs, a .drawing, a .caption (a live region) and a
// <script type="application/json">: {common, settings}. The settings cover all positions of the sliders, the last slider
// fastest; each has a `caption`, a sentence, and the data that its kind draws. Written by bsmamba2.teaching.plotting.explorable.
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
    for (const tick of panel.xticks) {
      add(svg, "line", { x1: x(tick), x2: x(tick), y1: y0, y2: y0 + 4, class: "axis" });
      add(svg, "text", { x: x(tick), y: y0 + 16, "text-anchor": "middle" }, tick >= 1000 ? `${tick / 1000}k` : tick);
    }
    add(svg, "line", { x1: x0, x2: x0 + inner, y1: y0, y2: y0, class: "axis" });
    add(svg, "text", { x: x0 + inner / 2, y: height - 6, "text-anchor": "middle" }, panel.xlabel);
    return { svg, x, x0, y0, inner };
  }

  // --- kinds ---

  // Lines over one pair of axes, panel below panel. A setting gives `mark`, a point on fixed lines, or `y`, new lines.
  function curves(drawing, common, setting, width) {
    common.panels.forEach((panel, i) => {
      const height = 210, { svg, x, x0, y0, inner } = frame(drawing, panel, width, height);
      const upward = scale("linear", 0, panel.most);
      const y = (v) => y0 - (y0 - MARGIN.top) * upward(v);
      if (panel.shade) {
        const [from, to] = panel.shade.map(x);
        add(svg, "rect", { x: from, y: MARGIN.top, width: to - from, height: y0 - MARGIN.top, class: "shade" });
        add(svg, "text", { x: (from + to) / 2, y: MARGIN.top + 14, "text-anchor": "middle" }, panel.shadeLabel);
      }
      for (const tick of ticks(panel.most)) {
        add(svg, "line", { x1: x0, x2: x0 + inner, y1: y(tick), y2: y(tick), class: "grid" });
        add(svg, "text", { x: x0 - 6, y: y(tick) + 4, "text-anchor": "end" }, number(tick));
      }
      panel.series.forEach((series, j) => {
        const values = setting.y ? setting.y[i] : series.y;
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
    });
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

  const KINDS = { curves, bands, listen };

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
      KINDS[box.dataset.kind](drawing, common, settings[index], width);
      sliders.forEach((slider, i) => {
        const value = names[i][slider.value];
        slider.setAttribute("aria-valuetext", value);
        box.querySelector(`output[for="${slider.id}"]`).textContent = value;
      });
      if (caption.textContent !== settings[index].caption) caption.textContent = settings[index].caption;
    }

    new ResizeObserver(() => {
      const now = Math.max(260, Math.floor(drawing.clientWidth));
      if (now === width) return;
      const first = width === 0;
      width = now;
      if (first || box.dataset.kind !== "listen") draw(); // redrawing would stop a player
    }).observe(drawing);
    sliders.forEach((slider) => slider.addEventListener("input", draw));
  }

  document.addEventListener("DOMContentLoaded", () => document.querySelectorAll(".explorable").forEach(start));
})();
