// Which differences between methods are more than chance.
const pairTable = () => ({
  caption: `${setting().title}: paired differences, a minus b`,
  columns: [
    { name: "a", text: true },
    { name: "b", text: true },
    { name: "sparsity", show: level },
    { name: "seeds" },
    { name: "difference, points", show: (v) => points(v) },
    { name: "± 95%", show: (v) => percent(v) },
    { name: "p", show: (v) => number(v, 3) },
    { name: "p, corrected", show: (v) => number(v, 3) },
    { name: "more than chance", text: true, mark: (v) => (v === "yes" ? "yes" : "") },
  ],
  rows: setting()
    .pairs.filter((p) => shown(p[0]) && shown(p[1]))
    .map(([a, b, s, n, d, half, p, corrected, sure]) => [
      setting().methods[a],
      setting().methods[b],
      s,
      n,
      d,
      half,
      p,
      corrected,
      p === null ? "" : sure ? "yes" : "no",
    ]),
  order: [2, "descending"],
});
const refreshPairs = () => {
  byId("pairs").hidden = data.single || !setting().pairs.length;
  if (!byId("pairs").hidden) byId("pairs-table").replaceChildren(table(pairTable()));
};
methodsChanged.push(refreshPairs);
section(refreshPairs);
