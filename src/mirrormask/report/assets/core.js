// What everything else uses: the data, the state of the page, elements made of text only, numbers in words.
const data = JSON.parse(document.getElementById("data").textContent);
const state = { setting: 0, hidden: new Set() };
const setting = () => data.settings[state.setting];
const byId = (id) => document.getElementById(id);

/** The runs of the setting that is shown, with their place in the data. */
const runs = () => data.runs.map((run, index) => ({ run, index })).filter(({ run }) => run.setting === state.setting);
const isDense = (run) => run.method === data.settings[run.setting].dense;
const methodOf = (run) => data.settings[run.setting].methods[run.method];

/** An element; strings among the children become text, whatever they hold. Handlers are functions under `on...`. */
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}

/** Text for a chart: Plotly reads a few tags in what it shows, so that a name with markup must be written as text. */
const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

const number = (value, digits = 4) => {
  if (value === null || value === undefined) return "–";
  if (Number.isInteger(value)) return value.toLocaleString("en");
  const size = Math.abs(value);
  return size !== 0 && (size < 1e-3 || size >= 1e6)
    ? Number(value.toPrecision(digits)).toExponential()
    : String(Number(value.toPrecision(digits)));
};
const percent = (share, digits = 2) =>
  share === null || share === undefined ? "–" : `${(100 * share).toFixed(digits)}%`;
const level = (sparsity) => `${Number((100 * sparsity).toPrecision(6))}%`;
const points = (difference, digits = 2) =>
  difference === null || difference === undefined
    ? "–"
    : `${difference < 0 ? "−" : "+"}${Math.abs(100 * difference).toFixed(digits)}`;
const plusMinus = (mean, half, digits = 2) =>
  percent(mean, digits) + (half === null || half === undefined ? "" : ` ± ${(100 * half).toFixed(digits)}`);
function size(bytes) {
  if (bytes === null || bytes === undefined) return "–";
  const [unit, divisor] = bytes >= 1e6 ? ["MB", 1e6] : bytes >= 1e3 ? ["kB", 1e3] : ["B", 1];
  return `${Number((bytes / divisor).toPrecision(3))} ${unit}`;
}
function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  const [unit, factor] = seconds < 1e-3 ? ["µs", 1e6] : seconds < 1 ? ["ms", 1e3] : ["s", 1];
  return `${Number((seconds * factor).toPrecision(3))} ${unit}`;
}
const count = (n, one, many = `${one}s`) => `${n.toLocaleString("en")} ${n === 1 ? one : many}`;
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
const nameOf = (run) => `${methodOf(run)}${isDense(run) ? "" : ` at ${level(run.sparsity)}`}, seed ${run.seed}`;

/** A labelled select; `choose` is called with the value of the option that was picked. */
function choice(label, options, value, choose) {
  const select = el("select", { onchange: () => choose(JSON.parse(select.value)) });
  for (const [each, text] of options)
    select.append(el("option", { value: JSON.stringify(each), selected: each === value }, text));
  return el("label", {}, label, select);
}

/** The first run, in the order of seeds, of the best method at the sparsity in focus. */
function leading(fits = () => true) {
  const own = runs().filter(({ run }) => !isDense(run) && fits(run));
  const inFocus = own.filter(({ run }) => run.sparsity === setting().focus);
  const among = inFocus.length ? inFocus : own;
  return among.sort((a, b) => a.run.method - b.run.method || a.run.seed - b.run.seed)[0] ?? null;
}

const sections = [];
/** Registers what a section does when another setting is shown; it hides itself where it has nothing to say. */
const section = (update) => sections.push(update);
const methodsChanged = [];
