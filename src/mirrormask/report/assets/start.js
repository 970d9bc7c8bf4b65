// The setting that is shown, the theme, and the way around the page.
const ONE = { runs: "run", settings: "setting", methods: "method", sparsities: "sparsity", seeds: "seed" };
function tiles() {
  const own = runs(),
    seeds = new Set(own.map(({ run }) => run.seed)).size;
  const facts = [
    ["runs", data.runs.length],
    ["methods", setting().methods.length - (setting().dense === null ? 0 : 1)],
    ["sparsities", setting().sparsities.length],
    ["seeds", seeds],
  ];
  if (data.settings.length > 1) facts.splice(1, 0, ["settings", data.settings.length]);
  const lead = leading();
  if (data.single && lead) {
    const { run } = lead;
    facts.splice(
      0,
      facts.length,
      [setting().accuracy, percent(run.validation ?? run.test)],
      ["sparsity", percent(run.obtained, 3)],
      ["nonzeros", run.nonzeros.toLocaleString("en")],
      ["file", size(run.bytes)],
      ["training", duration(run.seconds)],
    );
  }
  if (data.skipped.length) facts.push(["not shown", data.skipped.length]);
  byId("tiles").replaceChildren(
    ...facts
      .map(([name, value]) => [value === 1 ? (ONE[name] ?? name) : name, value])
      .map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, String(value)))),
  );
}

const NAMES = {
  run: "One run",
  accuracy: "Accuracy",
  size: "File size",
  time: "CPU time",
  pairs: "Significance",
  training: "Training",
  layers: "Layers",
  weights: "Weights",
  records: "Every run",
  skipped: "Not shown",
  terms: "Terms",
};
function contents() {
  const parts = [...document.querySelectorAll("main > section")].filter((node) => !node.hidden);
  byId("contents").replaceChildren(...parts.map(({ id }) => el("li", {}, el("a", { href: `#${id}` }, NAMES[id]))));
}
const reading = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries) {
      const link = byId("contents").querySelector(`[href="#${target.id}"]`);
      if (isIntersecting) link?.setAttribute("aria-current", "true");
      else link?.removeAttribute("aria-current");
    }
  },
  { rootMargin: "-30% 0px -65% 0px" },
);
for (const node of document.querySelectorAll("main > section")) reading.observe(node);

function show(index) {
  state.setting = index;
  state.hidden.clear();
  byId("title").textContent = setting().title;
  byId("detail").textContent = ` · ${setting().detail}`;
  byId("headline").textContent = setting().findings.accuracy;
  byId("summary").textContent = setting().findings.summary;
  for (const node of document.querySelectorAll("[data-finding]"))
    node.textContent = setting().findings[node.dataset.finding];
  tiles();
  legends();
  for (const update of sections) update();
  contents();
}

// A single run begins with itself; among many, one run is a detail that comes after the comparison.
if (!data.single) byId("training").before(byId("run"));
if (data.settings.length > 1) {
  byId("setting-choice").hidden = false;
  byId("setting").append(
    ...data.settings.map(({ title, detail }, i) => el("option", { value: String(i) }, `${title}; ${detail}`)),
  );
  byId("setting").addEventListener("change", () => show(Number(byId("setting").value)));
}

function themed() {
  byId("theme").setAttribute("aria-pressed", String(isDark()));
  byId("theme").textContent = isDark() ? "Light theme" : "Dark theme";
  legends();
  redraw();
}
byId("theme").addEventListener("click", () => {
  const next = isDark() ? "light" : "dark";
  document.documentElement.dataset.theme = next;
  try {
    localStorage.setItem("mirrormask-theme", next);
  } catch {
    /* without storage it lasts until the page is closed */
  }
  themed();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", themed);
addEventListener("beforeprint", () => {
  for (const made of charts) if (made.stale) draw(made);
});

show(0);
themed();
document.documentElement.dataset.ready = "true";
