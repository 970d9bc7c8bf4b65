// Accuracy against sparsity, and the lines and the front that every chart of accuracy has.
const cells = () => setting().cells.filter((cell) => cell.method !== setting().dense);
const denseCell = () => setting().cells.find((cell) => cell.method === setting().dense);
const accuracyText = (cell) =>
  `${plain(setting().methods[cell.method])}${cell.method === setting().dense ? "" : ` at ${level(cell.sparsity)}`}<br>` +
  `${plusMinus(cell.mean, cell.half)} over ${count(cell.n, "seed")}`;

/** One line a method through its points. `where` gives a cell's place on the horizontal axis, `extra` a line of its label. */
function methodLines(chosen, where, extra) {
  // The best is drawn last, above the others.
  const methods = [...new Set(chosen.map((cell) => cell.method))].filter(shown).sort((a, b) => b - a);
  return methods.map((method) => {
    const own = chosen.filter((cell) => cell.method === method).sort((a, b) => where(a) - where(b));
    const { color, symbol, dash } = look(method);
    return {
      x: own.map(where),
      y: own.map((cell) => 100 * cell.mean),
      mode: "lines+markers",
      name: plain(setting().methods[method]),
      line: { color, dash, width: 2 },
      marker: { color, symbol, size: 9, line: { color: css("--paper"), width: 1 } },
      error_y: { type: "data", array: own.map((cell) => 100 * (cell.half ?? 0)), color, thickness: 1.3, width: 4 },
      hoverinfo: "text",
      hovertext: own.map((cell) => accuracyText(cell) + extra(cell)),
    };
  });
}

/** The front as a broad band below everything else. */
function frontBand(name, chosen, where) {
  const front = chosen.filter((cell) => cell.front.includes(name)).sort((a, b) => where(a) - where(b));
  return {
    x: front.map(where),
    y: front.map((cell) => 100 * cell.mean),
    mode: "lines",
    hoverinfo: "skip",
    line: { color: css("--front"), width: 16 },
  };
}

/** Room for the means and some of their whiskers: with two seeds a whisker can be longer than everything else. */
function accuracyRange(chosen) {
  const means = chosen.map((cell) => 100 * cell.mean),
    [low, high] = [Math.min(...means), Math.max(...means)];
  const most = 0.6 * (high - low) + 0.3;
  const reach = (sign) =>
    Math.max(
      ...chosen.map((cell, i) => sign * (means[i] - (sign > 0 ? high : low)) + Math.min(100 * (cell.half ?? 0), most)),
    );
  const margin = 0.04 * (high - low) + 0.05;
  return [low - reach(-1) - margin, Math.min(high + reach(1) + margin, 100.5)];
}

function sparsityChart() {
  const chosen = cells();
  const where = (cell) => -Math.log10(1 - cell.sparsity);
  const all = [...new Set(chosen.map(where))].sort((a, b) => a - b);
  const margin = Math.max(0.06, 0.05 * (all.at(-1) - all[0]));
  const [from, to] = [all[0] - margin, all.at(-1) + margin];
  // Whiskers of methods at the same sparsity would hide each other: each stands a little to the side.
  const methods = [...new Set(chosen.map((cell) => cell.method))];
  const aside = (cell) =>
    where(cell) +
    (methods.indexOf(cell.method) - (methods.length - 1) / 2) * Math.min(0.012, (0.35 * margin) / methods.length);
  const traces = [
    frontBand("sparsity", chosen, aside),
    ...methodLines(
      chosen,
      aside,
      (cell) =>
        (cell.difference === null ? "" : `<br>${points(cell.difference)} points from dense`) +
        (cell.front.includes("sparsity") ? "<br>on the Pareto front" : ""),
    ),
  ];
  const dense = denseCell(),
    shapes = [];
  if (dense && shown(dense.method)) {
    const half = 100 * (dense.half ?? 0),
      y = 100 * dense.mean,
      { color } = look(dense.method);
    shapes.push({
      type: "rect",
      xref: "paper",
      x0: 0,
      x1: 1,
      y0: y - half,
      y1: y + half,
      fillcolor: color,
      opacity: 0.12,
      line: { width: 0 },
      layer: "below",
    });
    const steps = Array.from({ length: 41 }, (_, i) => from + (i / 40) * (to - from));
    traces.push({
      x: steps,
      y: steps.map(() => y),
      mode: "lines",
      line: { color, dash: "dash", width: 1.6 },
      hoverinfo: "text",
      hovertext: accuracyText(dense),
    });
  }
  return {
    traces,
    layout: {
      shapes,
      xaxis: {
        title: "sparsity",
        range: [from, to],
        tickvals: setting().sparsities.map((s) => -Math.log10(1 - s)),
        ticktext: setting().sparsities.map(level),
        zeroline: false,
      },
      yaxis: {
        title: `${setting().accuracy} (%)`,
        range: accuracyRange(setting().cells.filter((cell) => shown(cell.method))),
        zeroline: false,
      },
    },
  };
}
