// How the weights of a layer are spread, and how unbalanced their factors are.
const spread = { run: null, layer: 0 };
const centres = ([low, high, , counts]) => counts.map((_, i) => low + ((i + 0.5) * (high - low)) / counts.length);
const total = ([, , zeros, counts]) => zeros + counts.reduce((sum, n) => sum + n, 0);
const layerOf = (index) => data.runs[index].distributions?.[spread.layer];
const LAYER = { start: 1, trained: 2, final: 3, imbalance: 4, first: 5 };

function density(name, histogram, style) {
  if (!histogram || !histogram[3].length) return null;
  const [low, high, , counts] = histogram,
    width = (high - low) / counts.length,
    all = total(histogram);
  // An empty bin has no place on a logarithmic axis; half a weight stands for none.
  const floor = 0.5 / all / width;
  const y = [floor, ...counts.map((n) => (n ? n / all / width : floor)), floor],
    x = centres(histogram);
  return {
    x: [low - width / 2, ...x, high + width / 2],
    y,
    mode: "lines",
    name,
    line: { shape: "hvh", width: 1.8, ...style },
    hoverinfo: "text",
    hovertext: ["", ...counts.map((n, i) => `${name}<br>${count(n, "weight")} about ${number(x[i], 3)}`), ""],
  };
}

function weightsChart() {
  const run = data.runs[spread.run],
    own = layerOf(spread.run);
  const dense = run.dense !== undefined && run.dense !== spread.run ? layerOf(run.dense) : null;
  const traces = [
    density("at the start", own[LAYER.start], { color: css("--soft"), dash: "dot" }),
    dense && density("dense, at the end", dense[LAYER.final], { color: css("--ink"), dash: "dash", width: 1.3 }),
    density(own[LAYER.trained] ? "trained, before pruning" : "", own[LAYER.trained], {
      color: look(run.method).color,
      dash: "dash",
      width: 1.2,
    }),
    density("at the end", own[LAYER.final], { color: look(run.method).color }),
  ].filter(Boolean);
  return {
    traces,
    layout: {
      showlegend: true,
      xaxis: { title: "weight x", zeroline: true },
      yaxis: {
        title: "density",
        ...logTicks(
          traces.flatMap(({ y }) => y),
          (v) => number(v, 1),
        ),
      },
    },
  };
}

function imbalanceChart() {
  const own = layerOf(spread.run),
    histogram = own[LAYER.imbalance],
    first = own[LAYER.first];
  if (!histogram) return `${methodOf(data.runs[spread.run])} does not follow the flow of a product of two factors.`;
  if (!histogram[3].length) return "Every imbalance that lives is exactly zero.";
  const { color } = look(data.runs[spread.run].method);
  const shapes =
    first > 0
      ? [
          {
            type: "line",
            yref: "paper",
            y0: 0,
            y1: 1,
            x0: Math.log10(first),
            x1: Math.log10(first),
            line: { color: css("--soft"), dash: "dot", width: 1.5 },
          },
        ]
      : [];
  const annotations =
    first > 0
      ? [
          {
            x: Math.log10(first),
            y: 1,
            yref: "paper",
            yanchor: "top",
            xanchor: "right",
            xshift: -4,
            text: "at the start",
            showarrow: false,
            font: { color: css("--soft"), size: 12 },
          },
        ]
      : [];
  const x = centres(histogram);
  return {
    traces: [
      {
        type: "bar",
        x,
        y: histogram[3],
        marker: { color },
        hoverinfo: "text",
        hovertext: histogram[3].map((n, i) => `${count(n, "weight")} about |m² − w²| = ${number(10 ** x[i], 2)}`),
      },
    ],
    layout: {
      shapes,
      annotations,
      bargap: 0.04,
      xaxis: {
        title: "log₁₀ |m² − w²|",
        zeroline: false,
        range: [
          Math.min(histogram[0], first > 0 ? Math.log10(first) : histogram[0]) - 0.3,
          Math.max(histogram[1], first > 0 ? Math.log10(first) : histogram[1]) + 0.3,
        ],
      },
      yaxis: { title: "living weights" },
    },
  };
}

function weightsFindings() {
  const run = data.runs[spread.run],
    own = layerOf(spread.run),
    final = own[LAYER.final],
    all = total(final);
  byId("weights-h").textContent =
    `In layer ${short(own[0])} of ${nameOf(run)}, ${percent(final[2] / all, 1)} of ${all.toLocaleString("en")} weights end at exactly zero, and the largest is ${number(final[1], 3)}`;
  const histogram = own[LAYER.imbalance],
    first = own[LAYER.first];
  let text = "The imbalance of the factors";
  if (histogram?.[3].length && first > 0) {
    const half = histogram[3].reduce((sum, n) => sum + n, 0) / 2;
    let seen = 0,
      i = -1;
    while (seen < half) seen += histogram[3][++i];
    text = `The imbalance falls from ${number(first, 2)} to ${number(10 ** centres(histogram)[i], 2)} for the median weight that lives`;
  }
  byId("imbalance-h").textContent = text;
}

const refreshWeights = [
  chart(byId("weights-chart"), weightsChart),
  chart(byId("imbalance-chart"), imbalanceChart),
  numbers("weights-numbers", () => {
    const run = data.runs[spread.run];
    const rows = run.distributions.flatMap((layer) =>
      ["start", "trained", "final", "imbalance"].flatMap((name) => {
        const histogram = layer[LAYER[name]];
        if (!histogram) return [];
        const [low, high, zeros, counts] = histogram,
          width = (high - low) / counts.length,
          what = name === "imbalance" ? "log10 |m² − w²|" : `weights, ${name}`;
        return [
          [layer[0], what, 0, 0, zeros],
          ...counts.map((n, i) => [layer[0], what, low + i * width, low + (i + 1) * width, n]),
        ];
      }),
    );
    return {
      caption: `Histograms of ${nameOf(run)}; from 0 to 0 counts exact zeros`,
      rows,
      columns: [
        { name: "layer", text: true },
        { name: "of", text: true },
        { name: "from" },
        { name: "to" },
        { name: "count" },
      ],
    };
  }),
];
const updateWeights = () => {
  const { distributions } = data.runs[spread.run];
  spread.layer = Math.min(spread.layer, distributions.length - 1);
  const own = runs().filter(({ run }) => run.distributions?.length);
  byId("weights-controls").replaceChildren(
    choice(
      "Run",
      own.map(({ run, index }) => [index, nameOf(run)]),
      spread.run,
      (v) => {
        spread.run = v;
        updateWeights();
        byId("weights-controls").querySelectorAll("select")[0].focus();
      },
    ),
    choice(
      "Layer",
      distributions.map((layer, i) => [i, layer[0]]),
      spread.layer,
      (v) => {
        spread.layer = v;
        updateWeights();
        byId("weights-controls").querySelectorAll("select")[1].focus();
      },
    ),
  );
  weightsFindings();
  for (const refresh of refreshWeights) refresh();
};
section(() => {
  const own = runs().filter(({ run }) => run.distributions?.length);
  byId("weights").hidden = false;
  for (const node of byId("weights").querySelectorAll(".chart, h3, details, .controls, p:not(.over)"))
    node.hidden = node.id === "weights-missing" ? own.length > 0 : !own.length;
  spread.layer = 0;
  spread.run = own.length ? (leading((run) => run.distributions?.length) ?? own[0]).index : null;
  if (own.length) updateWeights();
  else byId("weights-h").textContent = "Not known for these runs";
});
