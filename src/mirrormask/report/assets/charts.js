// Charts: drawn when they come into view, in the colours of the theme.
const charts = [];
const watcher = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries) {
      const chart = charts.find(({ node }) => node === target);
      chart.near = isIntersecting;
      if (isIntersecting && chart.stale) draw(chart);
    }
  },
  { rootMargin: "200px" },
);

/** A chart in a node. build() gives { traces, layout }, or a sentence that says why there is nothing to draw. */
function chart(node, build) {
  const made = { node, build, near: false, stale: true };
  node.setAttribute("role", "group");
  charts.push(made);
  watcher.observe(node);
  return () => {
    made.stale = true;
    if (made.near) draw(made);
  };
}

function draw(chart) {
  const { node } = chart;
  const made = chart.build();
  chart.stale = false;
  node.classList.toggle("empty", typeof made === "string");
  if (typeof made === "string") {
    Plotly.purge(node);
    node.replaceChildren(el("p", {}, made));
    return;
  }
  if (node.firstElementChild?.tagName === "P") node.replaceChildren();
  if (made.height) node.style.height = `${made.height}px`;
  Plotly.react(node, made.traces, layout(made.layout), {
    displaylogo: false,
    responsive: true,
    modeBarButtons: [["zoom2d", "pan2d", "resetScale2d", "toImage"]],
    displayModeBar: node.clientWidth > 500 ? "hover" : false,
    toImageButtonOptions: { format: "svg", filename: node.id || "chart" },
  });
}

function layout(own) {
  const ink = css("--ink"),
    soft = css("--soft"),
    grid = css("--grid"),
    line = css("--line");
  const axis = (mine = {}) => ({
    gridcolor: grid,
    linecolor: line,
    zerolinecolor: grid,
    tickcolor: line,
    automargin: true,
    tickfont: { color: soft, size: 12 },
    ...mine,
    title: { text: mine.title ?? "", font: { color: soft, size: 12.5 }, standoff: 10 },
  });
  return {
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: css("--sans"), color: ink, size: 13 },
    margin: { l: 10, r: 14, t: 34, b: 10 },
    showlegend: false,
    hovermode: "closest",
    hoverdistance: 24,
    // A finger that drags over a chart means to scroll the page.
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
    hoverlabel: {
      bgcolor: css("--panel"),
      bordercolor: css("--soft"),
      font: { color: ink, family: css("--sans"), size: 13 },
      align: "left",
    },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: soft, activecolor: css("--accent") },
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { color: soft } },
    ...own,
    xaxis: axis(own.xaxis),
    yaxis: axis(own.yaxis),
  };
}

/** Ticks of a logarithmic axis over these values: 1, 2 and 5 of each power of ten, or fewer where that is too many. */
function logTicks(values, show) {
  const known = values.filter((value) => value > 0);
  if (!known.length) return { type: "log" };
  const [low, high] = [Math.min(...known) / 1.3, Math.max(...known) * 1.3];
  const decades = Math.log10(high / low);
  const narrow = innerWidth < 500;
  const steps =
    decades < 0.7
      ? narrow
        ? [1, 2, 3, 5]
        : [1, 1.5, 2, 3, 4, 5, 6, 8]
      : decades < (narrow ? 1.5 : 3)
        ? [1, 2, 5]
        : [1];
  const places = [],
    every = decades > 6 ? 2 : 1;
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power += every)
    places.push(...steps.map((step) => Number(`${step}e${power}`)));
  const inside = places.filter((place) => place >= low && place <= high);
  return {
    type: "log",
    tickvals: inside,
    ticktext: inside.map(show),
    range: [Math.log10(low), Math.log10(high)],
    zeroline: false,
  };
}

const redraw = () => {
  for (const chart of charts) {
    chart.stale = true;
    if (chart.near) draw(chart);
  }
};
