// One run: what was asked and obtained, the dense model beside the sparse one, predictions that changed.
const chosen = { run: null };

const askedTable = (run) => ({
  caption: "Asked and obtained",
  columns: [
    { name: "what", text: true },
    { name: "asked", text: true },
    { name: "obtained", text: true, mark: (v, row) => (row[0] === "nonzeros" ? (row[1] === v ? "yes" : "no") : "") },
  ],
  rows: [
    ["sparsity", level(run.sparsity), percent(run.obtained, 4)],
    ["nonzeros", run.nonzeros_asked.toLocaleString("en"), run.nonzeros.toLocaleString("en")],
    ["weights that may be zero", "", run.numel.toLocaleString("en")],
    ["epochs", String(run.epochs_asked), String(run.epochs)],
    ["steps", "", `${run.steps.toLocaleString("en")}${run.skipped ? `, ${run.skipped} skipped` : ""}`],
    ["accuracy before pruning", "", percent(run.unpruned)],
    ["test accuracy", "", percent(run.test)],
    ...(run.validation === null ? [] : [["validation accuracy", "", percent(run.validation)]]),
  ],
});

function besideTable(run, dense) {
  const times = (a, b) => (a && b ? `${Number((a / b).toPrecision(3))} ×` : "–");
  const rows = [
    ["test accuracy", percent(dense.test), percent(run.test), `${points(run.test - dense.test)} points`],
    [
      "nonzero weights",
      dense.nonzeros.toLocaleString("en"),
      run.nonzeros.toLocaleString("en"),
      `${times(dense.nonzeros, run.nonzeros)} fewer`,
    ],
    ["file", size(dense.bytes), size(run.bytes), `${times(dense.bytes, run.bytes)} smaller`],
    ["training", duration(dense.seconds), duration(run.seconds), `${times(run.seconds, dense.seconds)} as long`],
  ];
  const eager = run.bench?.seconds.eager,
    compiled = run.bench?.seconds.mirrormask;
  if (compiled && eager)
    rows.push([
      "one call (PyTorch eager, compiled)",
      duration(eager),
      duration(compiled),
      `${times(eager, compiled)} as fast`,
    ]);
  return {
    caption: `Dense beside ${methodOf(run)}, seed ${run.seed}`,
    rows,
    columns: [
      { name: "what", text: true },
      { name: "dense", text: true },
      { name: methodOf(run), text: true },
      { name: "sparse against dense", text: true },
    ],
  };
}

function pictures(run) {
  const verdict = (said, truth) =>
    el("dd", { class: said === truth ? "yes" : "no" }, said === truth ? `${said} ✓` : `${said} ✗`);
  return el(
    "ul",
    { class: "pictures" },
    ...run.changes.examples.map(([truth, dense, sparse, png]) =>
      el(
        "li",
        {},
        el("img", {
          src: `data:image/png;base64,${png}`,
          alt: `Test image of class ${truth}; dense says ${dense}, ${methodOf(run)} says ${sparse}`,
          loading: "lazy",
        }),
        el(
          "dl",
          {},
          el("dt", {}, "truth"),
          el("dd", {}, truth),
          el("dt", {}, "dense"),
          verdict(dense, truth),
          el("dt", {}, "sparse"),
          verdict(sparse, truth),
        ),
      ),
    ),
  );
}

const classTable = (run) => ({
  caption: "Accuracy by class, dense beside sparse",
  order: [4, "ascending"],
  columns: [
    { name: "class", text: true },
    { name: "images" },
    { name: "dense", show: (v) => percent(v, 1) },
    { name: "sparse", show: (v) => percent(v, 1) },
    { name: "change, points", show: (v) => points(v, 1), mark: (v) => (v < 0 ? "no" : v > 0 ? "yes" : "") },
  ],
  rows: run.changes.by_class
    .filter((row) => row[1])
    .map(([name, n, dense, sparse]) => [name, n, dense / n, sparse / n, (sparse - dense) / n]),
});

function changesPart(run) {
  if (!run.changes) {
    const why =
      run.dense === undefined
        ? "There is no dense run of the same seed to compare its predictions with."
        : "What it predicts otherwise than the dense model is not known: both runs must have a predictions.json, which runs trained with this version leave, and a page of many runs keeps it for some.";
    return [el("p", { class: "note" }, why)];
  }
  const { n, changed, lost, won, examples } = run.changes;
  const heading = `${changed.toLocaleString("en")} of ${n.toLocaleString("en")} test images get another class: ${lost.toLocaleString("en")} became wrong, ${won.toLocaleString("en")} became right`;
  return [
    el("h3", {}, changed ? heading : `Both models say the same about all ${n.toLocaleString("en")} test images`),
    ...(examples.length
      ? [el("p", {}, "Some of them, with the true class and what each model says:"), pictures(run)]
      : []),
    table(classTable(run)),
  ];
}

function updateRun() {
  const run = data.runs[chosen.run],
    dense = run.dense === undefined ? null : data.runs[run.dense];
  const exact =
    run.nonzeros === run.nonzeros_asked
      ? `has exactly the ${run.nonzeros.toLocaleString("en")} nonzeros asked for`
      : `has ${run.nonzeros.toLocaleString("en")} nonzeros where ${run.nonzeros_asked.toLocaleString("en")} were asked for`;
  const gap = dense
    ? `, ${Math.abs(100 * (run.test - dense.test)).toFixed(1)} points ${run.test < dense.test ? "below" : "above"} the dense model`
    : "";
  byId("run-h").textContent = `${nameOf(run)} ${exact}${gap}`;
  byId("run-asked").replaceChildren(table(askedTable(run)));
  byId("run-dense").replaceChildren(
    dense
      ? table(besideTable(run, dense))
      : el("p", { class: "note" }, "The dense run of the same recipe and seed is not among these runs."),
  );
  byId("run-changes").replaceChildren(...changesPart(run));
}

section(() => {
  const own = runs().filter(({ run }) => !isDense(run));
  byId("run").hidden = !own.length;
  if (!own.length) return;
  chosen.run = (leading((run) => run.changes) ?? leading() ?? own[0]).index;
  byId("run-controls").replaceChildren(
    ...(own.length > 1
      ? [
          choice(
            "Run",
            own.map(({ run, index }) => [index, nameOf(run)]),
            chosen.run,
            (v) => {
              chosen.run = v;
              updateRun();
            },
          ),
        ]
      : []),
  );
  updateRun();
});
