// Training curves: one small chart a quantity, one line a run.
const training = { sparsity: 0, seed: null };
const PANELS = [
  ["accuracy", "epoch", "Accuracy (%)", "On the images that training does not see.", 100],
  ["loss", "step", "Training loss", "On a logarithmic axis.", 1, "log"],
  ["sparsity", "step", "Sparsity (%)", "Weights that are exactly zero.", 100],
  ["below_threshold", "step", "Below threshold (%)", "Weights under 1% of their layer's root mean square.", 100],
  ["alpha", "step", "Decay α", "How strongly the implicit bias pulls.", 1],
  ["decay_integral", "step", "Decay integral ∫α", "What stays of the pull when it ends.", 1],
  ["median_a", "step", "Median a", "From an L2 bias (high) to an L1 bias (low).", 1, "log"],
  ["l1_norm", "step", "L1 norm", "The sum of |x| over all weights.", 1],
  ["sign_flips", "step", "Sign flips", "Weights whose sign is not their first one.", 1],
];
const heldOut = () => (setting().accuracy.startsWith("validation") ? "validation_accuracy" : "test_accuracy");
const column = (block, name) =>
  block && name in block ? (Array.isArray(block[name]) ? block[name] : block.x.map(() => block[name])) : null;

/** The runs whose curves are shown. */
const traced = () =>
  runs().filter(
    ({ run }) =>
      run.curves &&
      shown(run.method) &&
      (training.seed === null || run.seed === training.seed) &&
      (isDense(run) || data.single || run.sparsity === training.sparsity),
  );

function panel([name, kind, , , factor, type]) {
  const key = name === "accuracy" ? heldOut() : name;
  const chosen = traced()
    .map(({ run }) => ({ run, y: column(run.curves[kind], key), x: run.curves[kind].x }))
    .filter(({ y }) => y?.some((v) => v !== null));
  if (!chosen.length) return name === "median_a" ? "No method that is shown has a scale a." : "Nothing was logged.";
  const traces = chosen.map(({ run, x, y }) => {
    const { color, symbol, dash } = look(run.method);
    return {
      x,
      y: y.map((v) => (v === null || (type === "log" && v <= 0) ? null : v * factor)),
      mode: x.length < 25 ? "lines+markers" : "lines",
      connectgaps: false,
      line: { color, dash, width: chosen.length > 12 ? 1.2 : 1.8 },
      marker: { color, symbol, size: 4.5 },
      opacity: chosen.length > 20 ? 0.6 : 1,
      hoverinfo: "text",
      hovertext: x.map(
        (epoch, i) => `${plain(nameOf(run))}<br>epoch ${number(epoch)}: ${y[i] === null ? "–" : number(y[i] * factor)}`,
      ),
    };
  });
  const own =
    type === "log"
      ? logTicks(
          traces.flatMap((trace) => trace.y),
          (v) => number(v, 1),
        )
      : { rangemode: name === "accuracy" ? "normal" : "tozero" };
  // The first epochs would take all the room from the differences that matter.
  if (name === "accuracy") {
    const between = (from) => {
      const values = traces.flatMap(({ y }) => y.slice(Math.floor(from * y.length))).filter((v) => v !== null);
      return [Math.min(...values), Math.max(...values)];
    };
    const [late, all] = [between(0.6), between(0)];
    const [low, high] = all[1] - all[0] < 5 * (late[1] - late[0]) ? all : late;
    own.range = [low - 0.08 * (high - low) - 0.2, high + 0.08 * (high - low) + 0.2];
  }
  return {
    traces,
    layout: { margin: { l: 4, r: 8, t: 6, b: 4 }, xaxis: { nticks: 6, zeroline: false }, yaxis: { nticks: 5, ...own } },
  };
}

const refreshTraining = PANELS.map((spec) => {
  const node = el("div", { class: "chart", id: `training-${spec[0]}`, "aria-label": `${spec[2]} over epochs` });
  byId("training-charts").append(el("div", { class: "panel" }, el("h3", {}, spec[2]), el("p", {}, spec[3]), node));
  return chart(node, () => panel(spec));
});
refreshTraining.push(
  numbers("training-numbers", () => {
    const names = [
      "lr",
      "loss",
      "alpha",
      "decay_integral",
      "median_a",
      "l1_norm",
      "sparsity",
      "below_threshold",
      "sign_flips",
    ];
    const rows = traced().flatMap(({ run }) => {
      const { epoch, step } = run.curves,
        columns = names.map((name) => column(step, name));
      const ends = Object.fromEntries(epoch.x.map((x, i) => [x, i])),
        train = column(epoch, "train_accuracy"),
        held = column(epoch, heldOut());
      return step.x.map((x, i) => [
        methodOf(run),
        run.seed,
        run.sparsity,
        x,
        x in ends ? (train?.[ends[x]] ?? null) : null,
        x in ends ? (held?.[ends[x]] ?? null) : null,
        ...columns.map((c) => (c ? c[i] : null)),
      ]);
    });
    return {
      caption: "Training curves",
      rows,
      columns: [
        { name: "method", text: true },
        { name: "seed" },
        { name: "sparsity asked", show: level },
        { name: "epoch" },
        { name: "training accuracy", show: (v) => percent(v) },
        { name: setting().accuracy, show: (v) => percent(v) },
        ...["learning rate", "loss", "α", "∫α", "median a", "L1 norm", "sparsity", "below threshold", "sign flips"].map(
          (name) => ({ name }),
        ),
      ],
    };
  }),
);

/** What the curves of the leading run say about its bias. */
function trainingFinding() {
  const lead = leading((run) => run.curves && (data.single || run.sparsity === training.sparsity));
  if (!lead) return "How accuracy and loss went";
  const a = (column(lead.run.curves.step, "median_a") ?? []).filter((v) => v > 0);
  const where = `${methodOf(lead.run)} at ${level(lead.run.sparsity)}`;
  if (a.length > 1 && a.at(-1) < a[0] / 1.5)
    return `Under ${where}, median a falls from ${number(a[0], 2)} to ${number(Math.min(...a), 2)}: from an L2 bias towards L1`;
  const loss = (column(lead.run.curves.step, "loss") ?? []).filter((v) => v !== null);
  return loss.length > 1
    ? `Under ${where}, the training loss goes from ${number(loss[0], 2)} to ${number(loss.at(-1), 2)}`
    : `How ${where} was trained`;
}

const updateTraining = () => {
  byId("training-h").textContent = trainingFinding();
  for (const refresh of refreshTraining) refresh();
};
methodsChanged.push(() => {
  for (const refresh of refreshTraining) refresh();
});
section(() => {
  const own = runs().filter(({ run }) => run.curves);
  byId("training").hidden = !own.length;
  if (!own.length) return;
  const seeds = [...new Set(own.map(({ run }) => run.seed))].sort((a, b) => a - b);
  const controls = [];
  training.sparsity = setting().focus;
  training.seed = seeds[0];
  if (setting().sparsities.length > 1 && !data.single)
    controls.push(
      choice(
        "Sparsity",
        setting().sparsities.map((s) => [s, level(s)]),
        training.sparsity,
        (v) => {
          training.sparsity = v;
          updateTraining();
        },
      ),
    );
  if (seeds.length > 1)
    controls.push(
      choice("Seed", [...seeds.map((s) => [s, String(s)]), [null, "every seed"]], training.seed, (v) => {
        training.seed = v;
        updateTraining();
      }),
    );
  byId("training-controls").replaceChildren(...controls);
  byId("training-choose").hidden = !controls.length;
  const most = Math.max(...own.map(({ run }) => run.curves.step.x.length));
  byId("training-thin").textContent =
    most < data.points ? "" : `Long curves are thinned to ${most} evenly spaced points a run.`;
  updateTraining();
});
