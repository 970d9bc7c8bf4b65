// How long each layer takes, compiled and dense.
const timing = { run: null };

function timeChart() {
  const run = data.runs[timing.run];
  const rows = run.bench.layers;
  const place = rows.map((_, i) => i);
  const bar = (name, color, values, pattern) => ({
    type: "bar",
    orientation: "h",
    name,
    y: place,
    x: values.map((v) => 1e6 * v),
    marker: { color, pattern },
    hoverinfo: "text",
    hovertext: rows.map(
      ([layer, kernel], i) =>
        `${plain(layer)}${name === "compiled" ? ` (${plain(kernel)})` : ""}<br>${name}: ${duration(values[i])}`,
    ),
  });
  return {
    height: height(1.5 * rows.length),
    traces: [
      bar(
        "compiled",
        look(run.method).color,
        rows.map((row) => row[2]),
        {},
      ),
      bar(
        "PyTorch, dense",
        css("--soft"),
        rows.map((row) => row[3]),
        { shape: "/", size: 6, solidity: 0.35 },
      ),
    ],
    layout: {
      showlegend: true,
      barmode: "group",
      bargap: 0.25,
      xaxis: { title: "µs", zeroline: false },
      yaxis: {
        tickvals: place,
        ticktext: rows.map(([layer]) => fitting(layer)),
        range: [rows.length - 0.5, -0.5],
        zeroline: false,
      },
    },
  };
}

const refreshTimes = chart(byId("layers-time-chart"), () =>
  timing.run === null ? "No run here was timed." : timeChart(),
);
const refreshTimeNumbers = numbers("layers-time-numbers", () => ({
  caption: "Time of each layer, one call",
  columns: [
    { name: "run", text: true },
    { name: "layer", text: true },
    { name: "kernel", text: true },
    { name: "compiled, s", show: duration },
    { name: "PyTorch dense, s", show: (v) => (v ? duration(v) : "–") },
  ],
  rows: runs()
    .filter(({ run }) => run.bench)
    .flatMap(({ run }) => run.bench.layers.map((row) => [nameOf(run), ...row])),
}));

section(() => {
  const timed = runs().filter(({ run }) => run.bench && run.bench.layers.length);
  byId("layers-time").hidden = !timed.length;
  timing.run = timed.length ? (leading((run) => run.bench?.layers.length) ?? timed[0]).index : null;
  if (!timed.length) return;
  const updateTimes = () => {
    const run = data.runs[timing.run],
      sum = (i) => run.bench.layers.reduce((total, row) => total + row[i], 0);
    byId("layers-time-h").textContent =
      `The layers of ${nameOf(run)} take ${duration(sum(2))} in all, ${duration(sum(3))} dense in PyTorch`;
    refreshTimes();
  };
  byId("layers-time-controls").replaceChildren(
    ...(timed.length > 1
      ? [
          choice(
            "Run",
            timed.map(({ run, index }) => [index, nameOf(run)]),
            timing.run,
            (v) => {
              timing.run = v;
              updateTimes();
            },
          ),
        ]
      : []),
  );
  updateTimes();
  refreshTimeNumbers();
});
