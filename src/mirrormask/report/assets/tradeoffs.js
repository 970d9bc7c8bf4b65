// Accuracy against bytes and seconds, and the tables beside these charts.
function costChart(name, key, title, show) {
  const chosen = setting().cells.filter((cell) => cell[key] !== null);
  if (!chosen.some((cell) => cell.method !== setting().dense)) return null;
  const where = (cell) => cell[key];
  return {
    traces: [
      frontBand(name, chosen, where),
      ...methodLines(
        chosen,
        where,
        (cell) => `<br>${show(cell[key])}${cell.front.includes(name) ? ", on the Pareto front" : ""}`,
      ),
    ],
    layout: {
      xaxis: { title, ...logTicks(chosen.map(where), show) },
      yaxis: {
        title: `${setting().accuracy} (%)`,
        range: accuracyRange(chosen.filter((cell) => shown(cell.method))),
        zeroline: false,
      },
    },
  };
}

const cellTable = () => ({
  caption: `${setting().title}: means over seeds`,
  columns: [
    { name: "method", text: true },
    { name: "sparsity", show: level },
    { name: "seeds" },
    { name: setting().accuracy, show: (v) => percent(v) },
    { name: "± 95%", show: (v) => percent(v) },
    { name: "from dense, points", show: (v) => points(v) },
    { name: "± 95% of that", show: (v) => percent(v) },
    { name: "file bytes" },
    { name: "seconds a call", show: duration },
    { name: "Pareto front for", text: true },
  ],
  rows: setting().cells.map((c) => [
    setting().methods[c.method],
    c.sparsity,
    c.n,
    c.mean,
    c.half,
    c.difference,
    c.difference_half,
    c.bytes,
    c.call,
    c.front.join(", "),
  ]),
});
const withinTable = (key, unit, show) => () => ({
  caption: `${setting().title}: the most accurate method within each ${unit}`,
  columns: [
    { name: `at most`, show },
    { name: "method", text: true },
    { name: "sparsity", show: level },
    { name: setting().accuracy, show: (v) => percent(v) },
    { name: "± 95%", show: (v) => percent(v) },
    { name: "costs", show },
  ],
  rows: setting()[key].map((row) => [row.limit, row.method, row.sparsity, row.mean, row.half_width, row.cost]),
});

const refreshTradeoffs = [
  chart(byId("accuracy-chart"), sparsityChart),
  chart(byId("size-chart"), () => costChart("size", "bytes", "file size", size)),
  chart(
    byId("time-chart"),
    () =>
      costChart("time", "call", "time of a call", duration) ??
      "“mirrormask bench RUN” times a run; then make this page again.",
  ),
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
  byId("time-where").textContent = timed ? ` Measured on ${setting().conditions}.` : "";
  byId("time").querySelector(".legend").hidden = !timed;
  byId("time-numbers").hidden = !timed;
  byId("time-text").hidden = !timed;
  for (const refresh of refreshTradeoffs) refresh();
});
