// Every run, the command that trains it again, what it was made with, and what was passed over.
/** A table without one of its columns. */
const without = (place, { columns, rows, ...rest }) => ({
  ...rest,
  columns: columns.filter((_, i) => i !== place),
  rows: rows.map((row) => row.filter((_, i) => i !== place)),
});
const runTable = () =>
  without(data.settings.length > 1 ? null : 1, {
    caption: "Every run",
    columns: [
      { name: "run", text: true },
      { name: "setting", text: true },
      { name: "method", text: true },
      { name: "sparsity asked", show: level },
      { name: "obtained", show: (v) => percent(v, 4) },
      { name: "seed" },
      { name: "test accuracy", show: (v) => percent(v) },
      { name: "validation accuracy", show: (v) => percent(v) },
      { name: "before pruning", show: (v) => percent(v) },
      { name: "training accuracy", show: (v) => percent(v) },
      { name: "training loss" },
      { name: "nonzeros asked" },
      { name: "nonzeros" },
      { name: "weights" },
      { name: "file bytes" },
      { name: "epochs" },
      { name: "steps" },
      { name: "skipped steps" },
      { name: "training seconds" },
      { name: "seconds a call", show: duration },
      { name: "made with" },
    ],
    rows: data.runs.map((r) => [
      r.folder,
      `${data.settings[r.setting].title}, ${data.settings[r.setting].detail}`,
      methodOf(r),
      r.sparsity,
      r.obtained,
      r.seed,
      r.test,
      r.validation,
      r.unpruned,
      r.train,
      r.loss,
      r.nonzeros_asked,
      r.nonzeros,
      r.numel,
      r.bytes,
      r.epochs,
      r.steps,
      r.skipped,
      r.seconds,
      r.bench?.seconds.mirrormask ?? null,
      r.environment + 1,
    ]),
  });
byId("records-root").hidden = !data.root;
byId("records-root").textContent = `All of these folders lie in ${data.root}.`;
const commandTable = () => ({
  caption: "Commands",
  columns: [
    { name: "run", text: true },
    { name: "command", text: true, wrap: true, code: true },
    { name: "made with" },
  ],
  rows: data.runs.map((r) => [r.folder, r.command, r.environment + 1]),
});
const environmentTable = () => ({
  caption: "Processors and versions",
  columns: [
    { name: "number" },
    ...["processor", "gpu", "cores", "threads", "python", "platform"].map((name) => ({ name, text: true })),
    { name: "versions", text: true, wrap: true },
  ],
  rows: data.environments.map((e, i) => [
    i + 1,
    e.processor,
    e.gpu,
    e.cores,
    e.threads,
    e.python,
    e.platform,
    e.versions,
  ]),
});
const skippedTable = () => ({
  caption: "What was passed over",
  columns: [
    { name: "path", text: true },
    { name: "why", text: true, wrap: true },
  ],
  rows: data.skipped,
});

/** Long tables are made when they come near: a page of hundreds of runs must open at once. */
function soon(id, make) {
  const node = byId(id);
  new IntersectionObserver(
    (entries, observer) => {
      if (!entries.some((entry) => entry.isIntersecting)) return;
      observer.disconnect();
      node.replaceChildren(table(make()));
    },
    { rootMargin: "600px" },
  ).observe(node);
}
soon("records-runs", runTable);
soon("records-commands", commandTable);
soon("records-environments", environmentTable);
if (data.skipped.length) {
  byId("skipped").hidden = false;
  byId("skipped-h").textContent =
    `${count(data.skipped.length, "thing")} in these folders ${data.skipped.length === 1 ? "is" : "are"} not shown`;
  soon("skipped-table", skippedTable);
}
