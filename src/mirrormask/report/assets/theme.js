// Before the first paint, so that a page kept dark does not flash white.
try {
  const kept = localStorage.getItem("mirrormask-theme");
  if (kept === "dark" || kept === "light") document.documentElement.dataset.theme = kept;
} catch {
  /* a page opened from a file may have no storage */
}
