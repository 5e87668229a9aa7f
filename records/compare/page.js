"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const groups = data.groups;
  const COLOURS = 7;
  const [LEFT, RIGHT, TOP, BOTTOM, HEIGHT] = [54, 12, 10, 38, 300];

  // Elements. Texts become text nodes only, so nothing that a log says is taken for markup.
  function make(name, attributes = {}, ...children) {
    const svg = ["svg", "g", "path", "line", "circle", "text", "rect", "clipPath", "title"].includes(name);
    const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }

  const look = (number) => `c${number % COLOURS} d${Math.floor(number / COLOURS) % 3}`;
  const figure = (value, digits) => value.toLocaleString("en", {maximumFractionDigits: digits});
  const runs = (group) => group.runs === 1 ? "1 run" : `${figure(group.runs, 0)} runs`;

  // What the four plots show: for each visible group, lines of points {x, y, low, high, said}.
  const PLOTS = {
    time: {name: "training time (seconds)", x: (point) => point[4] === null ? null : point[4] / 1000},
    tokens: {name: "tokens (millions)", x: (point) => point[5] === null ? null : point[5] / 1e6},
    steps: {name: "step", x: (point) => point[0]},
    pace: {name: "step"},
  };

  function linesOf(kind) {
    const lines = [];
    groups.forEach((group, number) => {
      if (!group.on) return;
      if (kind === "pace") {
        for (const pace of group.paces) {
          lines.push({number, points: pace.points.map(([step, ms]) => ({x: step, y: ms, said: [
            group.label, pace.name, `up to step ${figure(step, 0)}`, `${figure(ms, 2)} ms a step`]}))});
        }
        return;
      }
      const points = [];
      for (const point of group.curve) {
        const x = PLOTS[kind].x(point);
        if (x === null) continue;
        const [step, mean, low, high, ms, tokens] = point;
        points.push({x, y: mean, low, high, said: [
          group.label,
          `step ${figure(step, 0)}` + (tokens === null ? "" : `, ${figure(tokens / 1e6, 2)} M tokens`)
            + (ms === null ? "" : `, ${figure(ms / 1000, 2)} s`),
          `validation loss ${mean.toFixed(4)}` + (low < high ? ` (${low.toFixed(4)} to ${high.toFixed(4)})` : ""),
          runs(group)]});
      }
      if (points.length) lines.push({number, points});
    });
    return lines;
  }

  function ticks(low, high, about) {
    const rough = (high - low) / about || 1;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 5, 10].find((nice) => nice * power >= rough);
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) found.push(i * step || 0);
    return {found, digits: Math.max(0, -Math.floor(Math.log10(step) + 1e-9))};
  }

  // The range of y: for losses from the lowest end to the first point after step 0, whose loss is far above; for times
  // from zero to what is usual, so that one stall does not press everything to the ground (it is told by the number above).
  function range(kind, lines, xs, targets) {
    const inside = lines.flatMap((line) => line.points.filter((point) => point.x >= xs[0]));
    if (kind === "pace") {
      const times = inside.map((point) => point.y).sort((a, b) => a - b);
      const usual = times[Math.floor(times.length / 2)] || 1;
      return [0, Math.min(4 * usual, 1.08 * times[times.length - 1]) || 1];
    }
    let high = -Infinity, low = Infinity;
    for (const line of lines) {
      const shown = line.points.filter((point) => point.x >= xs[0]);
      const trained = shown.filter((point) => point.x > 0);
      for (const point of trained.length ? trained : shown) high = Math.max(high, point.high);
      for (const point of shown) low = Math.min(low, point.low);
    }
    for (const target of targets) {
      low = Math.min(low, target);
      high = Math.max(high, target);
    }
    const margin = 0.05 * (high - low) || 0.01;
    return [low - margin, high + margin];
  }

  function draw(host) {
    const kind = host.dataset.x;
    const lines = linesOf(kind);
    const width = Math.max(260, Math.floor(host.clientWidth));
    host.replaceChildren();
    if (!lines.length) {
      const why = groups.some((group) => group.on) ? {time: "The logs tell no training times.",
        pace: "The logs tell no training times.", tokens: "The logs tell no tokens a step."}[kind]
        : "No curve is switched on.";
      host.append(make("p", {class: "hint"}, why || "No loss was validated."));
      return;
    }
    const end = document.getElementById("end").checked;
    let last = 0;
    for (const line of lines) for (const point of line.points) last = Math.max(last, point.x);
    const xs = [end ? last * 2 / 3 : 0, last || 1];
    const targets = kind === "pace" ? [] : [...new Set(groups.filter((group) => group.on && group.target !== null)
      .map((group) => group.target))];
    const ys = range(kind, lines, xs, targets);
    const X = (x) => LEFT + 4 + (x - xs[0]) / (xs[1] - xs[0]) * (width - LEFT - RIGHT - 8);
    const Y = (y) => HEIGHT - BOTTOM - (y - ys[0]) / (ys[1] - ys[0]) * (HEIGHT - TOP - BOTTOM);
    const caption = host.previousSibling.textContent;
    const svg = make("svg", {viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", "aria-label": caption});
    const name = kind === "pace" ? "ms a step" : "nats" + (data.unit ? ` a ${data.unit}` : "");
    const across = ticks(xs[0], xs[1], width / 80), up = ticks(ys[0], ys[1], 6);
    for (const y of up.found) {
      svg.append(make("line", {class: "grid", x1: LEFT, x2: width - RIGHT, y1: Y(y), y2: Y(y)}),
        make("text", {x: LEFT - 6, y: Y(y) + 4, "text-anchor": "end"}, y.toFixed(up.digits)));
    }
    for (const x of across.found) {
      svg.append(make("line", {class: "grid", x1: X(x), x2: X(x), y1: TOP, y2: HEIGHT - BOTTOM}),
        make("text", {x: X(x), y: HEIGHT - BOTTOM + 15, "text-anchor": "middle"}, figure(x, across.digits)));
    }
    svg.append(make("text", {x: width - RIGHT, y: HEIGHT - 6, "text-anchor": "end"}, PLOTS[kind].name),
      make("text", {x: 2, y: HEIGHT - 6}, name));
    const clip = `clip-${kind}`;
    svg.append(make("clipPath", {id: clip}, make("rect", {x: LEFT, y: TOP - 4, width: width - LEFT - RIGHT,
      height: HEIGHT - TOP - BOTTOM + 4})));
    const inside = make("g", {"clip-path": `url(#${clip})`});
    for (const target of targets) {
      inside.append(make("line", {class: "target", x1: LEFT, x2: width - RIGHT, y1: Y(target), y2: Y(target)}));
    }
    const seen = [];
    let beyond = 0;
    for (const {number, points} of lines) {
      const at = points.map((point) => `${X(point.x).toFixed(1)},${Y(point.y).toFixed(1)}`);
      const line = make("g", {class: look(number)});
      if (points.some((point) => point.low < point.high)) {
        const edge = points.map((point) => `${X(point.x).toFixed(1)},${Y(point.high).toFixed(1)}`).concat(
          points.map((point) => `${X(point.x).toFixed(1)},${Y(point.low).toFixed(1)}`).reverse());
        line.append(make("path", {class: "band", d: `M${edge.join("L")}Z`}));
      }
      line.append(make("path", {class: kind === "pace" ? "line thin" : "line", d: `M${at.join("L")}`}));
      const dots = kind !== "pace" && points.length <= 60 || points.length === 1;
      for (const point of points) {
        const [x, y] = [X(point.x), Y(point.y)];
        if (dots) line.append(make("circle", {cx: x.toFixed(1), cy: y.toFixed(1), r: 2.2}));
        if (point.y > ys[1] && kind === "pace") beyond++;
        if (point.x >= xs[0]) seen.push({x, y: Math.max(TOP, Math.min(HEIGHT - BOTTOM, y)), number, said: point.said});
      }
      inside.append(line);
    }
    if (beyond) svg.append(make("text", {x: width - RIGHT, y: TOP + 8, "text-anchor": "end"},
      `${beyond} beyond the top (point at them)`));
    const mark = make("circle", {r: 4.5, class: "mark", visibility: "hidden"});
    svg.append(inside, ...targets.map((target) => make("text", {
      x: LEFT + 6, y: Y(target) - 4, class: "target"}, `target ${target}`)), mark);
    host.append(svg);
    hover(svg, mark, seen, width);
  }

  const tip = document.body.appendChild(make("div", {id: "tip", role: "status", hidden: ""}));

  function hover(svg, mark, seen, width) {
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect(), scale = width / box.width;
      const [x, y] = [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
      let best = null, least = Infinity;
      for (const point of seen) {
        const far = (point.x - x) ** 2 + (point.y - y) ** 2;
        if (far < least) [best, least] = [point, far];
      }
      if (!best) return;
      mark.setAttribute("cx", best.x);
      mark.setAttribute("cy", best.y);
      mark.setAttribute("class", `mark ${look(best.number)}`);
      mark.setAttribute("visibility", "visible");
      tip.replaceChildren(...best.said.map((line) => make("div", {}, line)));
      tip.hidden = false;
      const left = box.left + best.x / scale, top = box.top + best.y / scale;
      const beside = left + 14 + tip.offsetWidth < document.documentElement.clientWidth ? left + 14
        : Math.max(4, left - 14 - tip.offsetWidth);
      tip.style.left = `${beside + window.scrollX}px`;
      tip.style.top = `${top + window.scrollY + 12}px`;
    });
    svg.addEventListener("pointerleave", () => {
      tip.hidden = true;
      mark.setAttribute("visibility", "hidden");
    });
  }

  // The legend.
  const plots = [...document.querySelectorAll(".plot")];
  const redraw = () => plots.forEach(draw);
  const keys = groups.map((group, number) => {
    const swatch = make("svg", {
      viewBox: "0 0 26 10", width: 26, height: 10, class: look(number), "aria-hidden": "true"},
      make("path", {class: "line", d: "M0,5L26,5"}));
    const key = make("button", {type: "button", class: "key", "aria-pressed": group.on}, swatch,
      make("bdi", {}, group.label), ` (${runs(group)})`);
    key.addEventListener("click", () => set(number, !group.on, true));
    return key;
  });

  function set(number, on, show) {
    groups[number].on = on;
    keys[number].setAttribute("aria-pressed", on);
    if (show) redraw();
  }

  document.getElementById("legend").append(...keys);
  for (const [id, on] of [["all", true], ["none", false]]) {
    document.getElementById(id).addEventListener("click", () => {
      groups.forEach((_, number) => set(number, on, false));
      redraw();
    });
  }
  document.getElementById("end").addEventListener("change", redraw);

  let drawn = 0;
  function fit() {
    const width = plots[0].clientWidth;
    if (width !== drawn) redraw();
    drawn = width;
  }
  window.addEventListener("resize", fit);
  fit();

  // Tables: a click on a column's name sorts by it, a second one the other way; empty cells stay last.
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
    const value = (row, column) => row.cells[column].dataset.v === undefined ? row.cells[column].textContent
      : Number(row.cells[column].dataset.v);
    heads.forEach((head, column) => head.firstChild.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending" ? 1 : -1;
      const rows = [...body.rows].map((row) => [value(row, column), row]);
      const texts = new Intl.Collator("en", {numeric: true});
      rows.sort(([a], [b]) => (a === "") - (b === "") || (typeof a === "string") - (typeof b === "string")
        || up * (typeof a === "number" ? a - b : texts.compare(a, b)));
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up > 0 ? "ascending" : "descending");
      body.append(...rows.map(([, row]) => row));
    }));
  }

  const unfold = document.getElementById("unfold");
  if (unfold) unfold.addEventListener("click", () => {
    const folds = [...document.querySelectorAll(".fold")];
    const open = folds.some((fold) => !fold.open);
    folds.forEach((fold) => { fold.open = open; });
    unfold.textContent = open ? "fold all" : "unfold all";
  });
})();
