// Accuracy against what it costs: zeros, bytes, seconds.
const cells = () => setting().cells.filter((cell) => cell.method !== setting().dense);
const denseCell = () => setting().cells.find((cell) => cell.method === setting().dense);
const accuracyText = (cell) => `${plain(setting().methods[cell.method])}${cell.method === setting().dense ? "" : ` at ${level(cell.sparsity)}`}<br>` +
  `${plusMinus(cell.mean, cell.half)} over ${count(cell.n, "seed")}`;

/** One line a method through its points. `where` gives a cell's place on the horizontal axis, `extra` a line of its label. */
function methodLines(chosen, where, extra) {
  return [...new Set(chosen.map((cell) => cell.method))].filter(shown).map((method) => {
    const own = chosen.filter((cell) => cell.method === method).sort((a, b) => where(a) - where(b));
    const { color, symbol, dash } = look(method);
    return {
      x: own.map(where), y: own.map((cell) => 100 * cell.mean), mode: "lines+markers", name: plain(setting().methods[method]),
      line: { color, dash, width: 2 }, marker: { color, symbol, size: 9, line: { color: css("--paper"), width: 1 } },
      error_y: { type: "data", array: own.map((cell) => 100 * (cell.half ?? 0)), color, thickness: 1.3, width: 4 },
      hoverinfo: "text", hovertext: own.map((cell) => accuracyText(cell) + extra(cell)),
    };
  });
}

/** The front as a broad band below everything else. */
function frontBand(name, chosen, where) {
  const front = chosen.filter((cell) => cell.front.includes(name)).sort((a, b) => where(a) - where(b));
  return { x: front.map(where), y: front.map((cell) => 100 * cell.mean), mode: "lines", hoverinfo: "skip", line: { color: css("--front"), width: 16 } };
}

function sparsityChart() {
  const chosen = cells();
  const where = (cell) => -Math.log10(1 - cell.sparsity);
  const all = [...new Set(chosen.map(where))].sort((a, b) => a - b);
  const margin = Math.max(0.06, 0.05 * (all.at(-1) - all[0]));
  const [from, to] = [all[0] - margin, all.at(-1) + margin];
  // Whiskers of methods at the same sparsity would hide each other: each stands a little to the side.
  const methods = [...new Set(chosen.map((cell) => cell.method))];
  const aside = (cell) => where(cell) + (methods.indexOf(cell.method) - (methods.length - 1) / 2) * Math.min(0.012, 0.35 * margin / methods.length);
  const traces = [frontBand("sparsity", chosen, aside), ...methodLines(chosen, aside, (cell) =>
    (cell.difference === null ? "" : `<br>${points(cell.difference)} points from dense`) + (cell.front.includes("sparsity") ? "<br>on the Pareto front" : ""))];
  const dense = denseCell(), shapes = [];
  if (dense && shown(dense.method)) {
    const half = 100 * (dense.half ?? 0), y = 100 * dense.mean, { color } = look(dense.method);
    shapes.push({ type: "rect", xref: "paper", x0: 0, x1: 1, y0: y - half, y1: y + half, fillcolor: color, opacity: 0.12, line: { width: 0 }, layer: "below" });
    const steps = Array.from({ length: 41 }, (_, i) => from + (i / 40) * (to - from));
    traces.push({ x: steps, y: steps.map(() => y), mode: "lines", line: { color, dash: "dash", width: 1.6 }, hoverinfo: "text", hovertext: accuracyText(dense) });
  }
  return { traces, layout: {
    shapes,
    xaxis: { title: "sparsity", range: [from, to], tickvals: setting().sparsities.map((s) => -Math.log10(1 - s)), ticktext: setting().sparsities.map(level), zeroline: false },
    yaxis: { title: `${setting().accuracy} (%)`, zeroline: false },
  } };
}

function costChart(name, key, title, show) {
  const chosen = setting().cells.filter((cell) => cell[key] !== null);
  if (!chosen.some((cell) => cell.method !== setting().dense)) return null;
  const where = (cell) => cell[key];
  return { traces: [frontBand(name, chosen, where), ...methodLines(chosen, where, (cell) => `<br>${show(cell[key])}${cell.front.includes(name) ? ", on the Pareto front" : ""}`)],
    layout: { xaxis: { title, ...logTicks(chosen.map(where), show) }, yaxis: { title: `${setting().accuracy} (%)`, zeroline: false } } };
}

const cellTable = () => ({
  caption: `${setting().title}: means over seeds`,
  columns: [{ name: "method", text: true }, { name: "sparsity", show: level }, { name: "seeds" }, { name: setting().accuracy, show: (v) => percent(v) }, { name: "± 95%", show: (v) => percent(v) },
    { name: "from dense, points", show: (v) => points(v) }, { name: "± 95% of that", show: (v) => percent(v) }, { name: "file bytes" }, { name: "seconds a call", show: duration }, { name: "Pareto front for", text: true }],
  rows: setting().cells.map((c) => [setting().methods[c.method], c.sparsity, c.n, c.mean, c.half, c.difference, c.difference_half, c.bytes, c.call, c.front.join(", ")]),
});
const withinTable = (key, unit, show) => () => ({
  caption: `${setting().title}: the most accurate method within each ${unit}`,
  columns: [{ name: `at most`, show }, { name: "method", text: true }, { name: "sparsity", show: level }, { name: setting().accuracy, show: (v) => percent(v) }, { name: "± 95%", show: (v) => percent(v) }, { name: "costs", show }],
  rows: setting()[key].map((row) => [row.limit, row.method, row.sparsity, row.mean, row.half_width, row.cost]),
});

const refreshTradeoffs = [
  chart(byId("accuracy-chart"), sparsityChart),
  chart(byId("size-chart"), () => costChart("size", "bytes", "file size", size)),
  chart(byId("time-chart"), () => costChart("time", "call", "time of a call", duration) ??
    "“mirrormask bench RUN” times a run; then make this page again."),
  numbers("accuracy-numbers", cellTable),
  numbers("size-numbers", withinTable("by_file", "size", size)),
  numbers("time-numbers", withinTable("by_time", "time", duration)),
];
methodsChanged.push(...refreshTradeoffs);
section(() => {
  const compared = !data.single && cells().length > 0;
  for (const id of ["accuracy", "size", "time"]) byId(id).hidden = !compared;
  byId("accuracy-notes").replaceChildren(...setting().notes.map((note) => el("li", {}, note)));
  const timed = cells().some((cell) => cell.call !== null);
  byId("time-h").textContent = timed ? setting().findings.time : "No run here was timed yet";
  if (timed) byId("time-text").append(byId("time-text").dataset.said ? "" : ` Measured on ${setting().conditions}.`);
  byId("time-text").dataset.said = "1";
  byId("time").querySelector(".legend").hidden = !timed;
  byId("time-numbers").hidden = !timed;
  byId("time-text").hidden = !timed;
  for (const refresh of refreshTradeoffs) refresh();
});

// Significance.
const pairTable = () => ({
  caption: `${setting().title}: paired differences, a minus b`,
  columns: [{ name: "a", text: true }, { name: "b", text: true }, { name: "sparsity", show: level }, { name: "seeds" }, { name: "difference, points", show: (v) => points(v) }, { name: "± 95%", show: (v) => percent(v) },
    { name: "p", show: (v) => number(v, 3) }, { name: "p, corrected", show: (v) => number(v, 3) }, { name: "more than chance", text: true, mark: (v) => (v === "yes" ? "yes" : "") }],
  rows: setting().pairs.filter((p) => shown(p[0]) && shown(p[1])).map(([a, b, s, n, d, half, p, corrected, sure]) => [setting().methods[a], setting().methods[b], s, n, d, half, p, corrected, p === null ? "" : sure ? "yes" : "no"]),
  order: [2, "descending"],
});
const refreshPairs = () => {
  byId("pairs").hidden = data.single || !setting().pairs.length;
  if (!byId("pairs").hidden) byId("pairs-table").replaceChildren(table(pairTable()));
};
methodsChanged.push(refreshPairs);
section(refreshPairs);
