// Tables: sorted by their headings, copied as CSV or TSV, long ones shown in part until asked for.
const SHOWN_ROWS = 40;

/**
 * A table.
 * columns: { name, show: value -> text, text: true for words, wrap, code, mark: value -> class }.
 * rows: raw values, as they are copied; `order` is [column, direction] to begin with.
 */
function table({ caption, columns, rows, order = null }) {
  let sorted = rows;
  let all = rows.length <= SHOWN_ROWS;
  const body = el("tbody");
  const more = el(
    "button",
    {
      type: "button",
      onclick: () => {
        all = true;
        fill();
      },
    },
    `Show all ${rows.length.toLocaleString("en")} rows`,
  );
  const heads = columns.map((column, i) =>
    el(
      "th",
      { scope: "col", class: column.text ? null : "number", "aria-sort": "none" },
      el("button", { type: "button", onclick: () => sort(i) }, column.name),
    ),
  );

  function fill() {
    body.replaceChildren(
      ...(all ? sorted : sorted.slice(0, SHOWN_ROWS)).map((row) =>
        el(
          "tr",
          {},
          ...columns.map((column, i) => {
            const value = row[i];
            const empty = value === null || value === undefined || value === "";
            const kinds = [
              column.text ? "" : "number",
              column.wrap ? "wrap" : "",
              column.code ? "code" : "",
              !empty && column.mark ? column.mark(value, row) : "",
            ];
            const text = column.show
              ? column.show(value, row)
              : column.text
                ? String(empty ? "" : value)
                : number(value, 5);
            return el("td", { class: kinds.filter(Boolean).join(" ") || null }, text);
          }),
        ),
      ),
    );
    more.hidden = all;
  }

  function sort(i, direction = null) {
    const descending =
      direction === "descending" || (direction === null && heads[i].getAttribute("aria-sort") === "ascending");
    const sign = descending ? -1 : 1;
    const missing = (value) => value === null || value === undefined || value === "";
    sorted = [...rows].sort((a, b) => {
      if (missing(a[i]) || missing(b[i])) return missing(a[i]) - missing(b[i]);
      return sign * (columns[i].text ? String(a[i]).localeCompare(String(b[i]), "en", { numeric: true }) : a[i] - b[i]);
    });
    heads.forEach((head, j) =>
      head.setAttribute("aria-sort", j === i ? (descending ? "descending" : "ascending") : "none"),
    );
    fill();
  }

  const copier = (name, write) =>
    el(
      "button",
      {
        type: "button",
        onclick: () =>
          copy(
            write(
              columns.map((c) => c.name),
              sorted,
            ),
            name,
            rows.length,
          ),
      },
      `Copy ${name}`,
    );
  if (order) sort(...order);
  else fill();
  return el(
    "div",
    { class: "table" },
    el("div", { class: "tools" }, el("p", {}, caption), copier("CSV", csv), copier("TSV", tsv)),
    el(
      "div",
      { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
      el("table", {}, el("caption", { class: "away" }, caption), el("thead", {}, el("tr", {}, ...heads)), body),
    ),
    more,
  );
}

/** A spreadsheet takes a cell that begins like a formula for one; an apostrophe keeps words words. */
const cell = (value) => {
  if (value === null || value === undefined) return "";
  return typeof value === "string" && /^[=+\-@\t\r]/.test(value) ? `'${value}` : String(value);
};
const csv = (names, rows) =>
  [names, ...rows]
    .map((row) =>
      row
        .map(cell)
        .map((text) => (/[",\r\n]/.test(text) ? `"${text.replace(/"/g, '""')}"` : text))
        .join(","),
    )
    .join("\n");
const tsv = (names, rows) =>
  [names, ...rows].map((row) => row.map((value) => cell(value).replace(/[\t\r\n]+/g, " ")).join("\t")).join("\n");

async function copy(text, name, n) {
  let done = true;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // A page opened from a file may not use the clipboard's interface; the old command still works there.
    const area = el("textarea", { class: "away", "aria-hidden": "true" });
    area.value = text;
    document.body.append(area);
    const before = document.activeElement;
    area.select();
    done = document.execCommand("copy");
    area.remove();
    before?.focus();
  }
  byId("say").textContent = done ? `Copied ${count(n, "row")} as ${name}.` : "The browser did not allow copying.";
}

/** Fills a <details> with a table when it is first opened, and anew when the page changes while it is open. */
function numbers(id, make) {
  const details = byId(id);
  const fill = () => {
    details.querySelector(".table")?.remove();
    if (details.open && !details.hidden) details.append(table(make()));
  };
  details.addEventListener("toggle", fill);
  return () => {
    if (details.open) fill();
  };
}
