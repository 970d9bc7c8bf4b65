// What each layer keeps.
const layered = { sparsity: 0 };
const short = (name) => name.replace(/\.weight$/, "");
/** A layer's name on an axis; on a phone the end of a long one, which tells layers apart. */
function fitting(name) {
  const most = innerWidth < 500 ? 20 : 90;
  return plain(short(name).length > most ? `…${short(name).slice(1 - most)}` : short(name));
}
const height = (rows) => Math.max(180, 70 + 27 * rows);

/** Mean share of weights kept in each layer, by method, at the sparsity that is chosen. */
function kept() {
  const groups = new Map();
  for (const { run } of runs()) {
    if (isDense(run) || run.sparsity !== layered.sparsity) continue;
    if (!groups.has(run.method)) groups.set(run.method, []);
    groups.get(run.method).push(run);
  }
  return [...groups]
    .sort(([a], [b]) => a - b)
    .map(([method, own]) => {
      const { layers, numel } = data.models[own[0].model];
      return {
        method,
        layers,
        seeds: own.length,
        shares: layers.map((_, i) => mean(own.map((run) => run.layers[i] / numel[i]))),
      };
    });
}

function layersChart() {
  const groups = kept().filter(({ method }) => shown(method));
  if (!groups.length) return "No method is shown.";
  const traces = groups.map(({ method, layers, shares, seeds }) => {
    const { color, symbol } = look(method);
    return {
      x: shares.map((share) => (share > 0 ? 100 * share : null)),
      y: layers.map((_, i) => i),
      mode: "markers",
      marker: { color, symbol, size: 10, line: { color: css("--paper"), width: 1 } },
      hoverinfo: "text",
      hovertext: layers.map(
        (layer, i) =>
          `${plain(setting().methods[method])}<br>${plain(layer)}: ${percent(shares[i], 3)} kept, mean of ${count(seeds, "seed")}`,
      ),
    };
  });
  const names = groups[0].layers;
  return {
    height: height(names.length),
    traces,
    layout: {
      shapes: [
        {
          type: "line",
          yref: "paper",
          y0: 0,
          y1: 1,
          x0: 100 * (1 - layered.sparsity),
          x1: 100 * (1 - layered.sparsity),
          line: { color: css("--soft"), dash: "dot", width: 1.4 },
        },
      ],
      xaxis: {
        title: "weights kept",
        ...logTicks(
          traces.flatMap(({ x }) => x),
          (v) => `${v}%`,
        ),
      },
      yaxis: {
        title: "layer",
        tickvals: names.map((_, i) => i),
        ticktext: names.map(fitting),
        range: [names.length - 0.5, -0.5],
        zeroline: false,
      },
    },
  };
}

function layersFinding() {
  const best = kept()[0];
  if (!best || best.layers.length < 2) return "What each layer keeps";
  const order = best.shares.map((share, i) => [share, i]).sort((a, b) => b[0] - a[0]);
  const say = ([share, i]) => `${percent(share, share < 0.01 ? 2 : 1)} of layer ${short(best.layers[i])}`;
  const where = `${setting().methods[best.method]} at ${level(layered.sparsity)}`;
  const [most, least] = [order[0], order.at(-1)];
  if (percent(most[0], 1) === percent(least[0], 1)) return `${where} keeps ${percent(most[0], 1)} of every layer`;
  return `${where} keeps ${say(most)} and ${say(least)}`;
}

const refreshKept = chart(byId("layers-chart"), layersChart);
const refreshLayerNumbers = numbers("layers-numbers", () => ({
  caption: "Layers of every run",
  columns: [
    { name: "method", text: true },
    { name: "sparsity asked", show: level },
    { name: "seed" },
    { name: "layer", text: true },
    { name: "shape", text: true },
    { name: "weights" },
    { name: "nonzeros" },
    { name: "sparsity", show: (v) => percent(v, 3) },
  ],
  rows: runs().flatMap(({ run }) =>
    data.models[run.model].layers.map((layer, i) => {
      const { shapes, numel } = data.models[run.model];
      return [
        methodOf(run),
        run.sparsity,
        run.seed,
        layer,
        shapes[i],
        numel[i],
        run.layers[i],
        1 - run.layers[i] / numel[i],
      ];
    }),
  ),
}));
methodsChanged.push(refreshKept);
section(() => {
  const any = runs().some(({ run }) => !isDense(run) && run.layers.length);
  byId("layers").hidden = !any;
  if (!any) return;
  layered.sparsity = setting().focus;
  const update = () => {
    byId("layers-h").textContent = layersFinding();
    refreshKept();
  };
  byId("layers-controls").replaceChildren(
    ...(setting().sparsities.length > 1
      ? [
          choice(
            "Sparsity",
            setting().sparsities.map((s) => [s, level(s)]),
            layered.sparsity,
            (v) => {
              layered.sparsity = v;
              update();
            },
          ),
        ]
      : []),
  );
  update();
  refreshLayerNumbers();
});
