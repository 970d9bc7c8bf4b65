// How a method looks: the same colour, symbol and dash everywhere, and the buttons that show and hide it.
// Okabe and Ito's palette, which the colour-blind tell apart; darker or lighter where the background needs it.
const COLORS = {
  light: ["#0072b2", "#d55e00", "#009e73", "#b5548a", "#c98500", "#3a9bd6", "#7d6f00"],
  dark: ["#4aa8ec", "#ff8440", "#2fca9c", "#e79bc6", "#f2b632", "#a5dcff", "#efe45a"],
};
const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x", "hexagon"];
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash"];
const PATHS = {
  circle: "M5 1a4 4 0 1 0 .01 0z",
  square: "M1.5 1.5h7v7h-7z",
  diamond: "M5 .3 9.7 5 5 9.7.3 5z",
  "triangle-up": "M5 .8 9.5 8.8H.5z",
  "triangle-down": "M5 9.2.5 1.2h9z",
  cross: "M3.5.8h3v2.7h2.7v3H6.5v2.7h-3V6.5H.8v-3h2.7z",
  x: "M2.6.8 5 3.2 7.4.8l1.8 1.8L6.8 5l2.4 2.4-1.8 1.8L5 6.8 2.6 9.2.8 7.4 3.2 5 .8 2.6z",
  star: "M5 .3 6.4 3.6 9.9 3.9 7.2 6.2 8 9.7 5 7.8 2 9.7 2.8 6.2.1 3.9 3.6 3.6z",
  hexagon: "M5 .5 9 2.8v4.4L5 9.5 1 7.2V2.8z",
};
const STROKES = { solid: "", dash: "5 3", dot: "1.5 2.5", dashdot: "5 2.5 1.5 2.5", longdash: "8 3" };

const isDark = () => {
  const kept = document.documentElement.dataset.theme;
  return kept ? kept === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
};
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
function look(method) {
  if (method === setting().dense) return { color: css("--soft"), symbol: "star", dash: "dash" };
  const colors = COLORS[isDark() ? "dark" : "light"];
  return {
    color: colors[method % colors.length],
    symbol: SYMBOLS[method % SYMBOLS.length],
    dash: DASHES[Math.floor(method / colors.length) % DASHES.length],
  };
}
const shown = (method) => !state.hidden.has(method);

function swatch(method) {
  const { color, symbol, dash } = look(method);
  const make = (tag, attributes) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    return node;
  };
  const svg = make("svg", { width: 26, height: 10, "aria-hidden": "true" });
  svg.append(make("path", { d: "M0 5h26", stroke: color, "stroke-width": 2, "stroke-dasharray": STROKES[dash] }));
  svg.append(make("path", { d: PATHS[symbol], fill: color, transform: "translate(8 0)" }));
  return svg;
}

/** The buttons that show and hide methods, the same in every section. */
function legends() {
  for (const node of document.querySelectorAll(".legend")) {
    node.replaceChildren(
      ...setting().methods.map((name, method) =>
        el(
          "button",
          {
            type: "button",
            "aria-pressed": String(shown(method)),
            onclick: () => {
              if (state.hidden.has(method)) state.hidden.delete(method);
              else state.hidden.add(method);
              const place = [...node.closest("main").querySelectorAll(".legend")].indexOf(node);
              legends();
              document.querySelectorAll(".legend")[place].children[method].focus();
              for (const refresh of methodsChanged) refresh();
            },
          },
          swatch(method),
          name,
        ),
      ),
    );
  }
}
