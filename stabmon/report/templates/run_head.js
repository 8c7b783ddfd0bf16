const svgNamespace = "http://www.w3.org/2000/svg";
const drawn = (tag, attributes, text = "") => {
  const made = document.createElementNS(svgNamespace, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== "") made.textContent = text;
  return made;
};
const tick = (value) => value !== 0 && (Math.abs(value) >= 1e4 || Math.abs(value) < 1e-2) ? value.toExponential(0).replace("e+", "e") : shown(value);
function lineChart(name, heads) {
  const signal = signals[name], width = 300, left = 44, right = 292, top = 22, bottom = 112;
  const series = heads.flatMap(([run, at, head]) => {
    if (!(name in run.at)) return [];
    const low = run.steps.map((_, column) => valueOf(run, name, 0, head, column));
    const high = run.planes > 1 ? run.steps.map((_, column) => valueOf(run, name, 1, head, column)) : low;
    return [{ run, at, low, high }];
  });
  const finite = series.flatMap((each) => [...each.low, ...each.high]).filter(Number.isFinite);
  if (!finite.length) return null;
  let from = signal.limits[0] ?? finite.reduce((a, b) => Math.min(a, b)), to = signal.limits[1] ?? finite.reduce((a, b) => Math.max(a, b));
  if (to === from) { const room = Math.abs(to) * 0.1 || 1; from -= room; to += room; }
  const logged = signal.limits[0] === null && from > 0 && to / from > 20;
  const scale = (value) => (logged ? Math.log(Math.max(value, from) / from) / Math.log(to / from) : (value - from) / (to - from));
  const y = (value) => bottom - Math.min(1, Math.max(0, scale(value))) * (bottom - top);
  const x = (step) => left + (step - first) / (last - first || 1) * (right - left);
  const extreme = signal.worst === "high" ? Math.max : Math.min;
  const worst = finite.reduce((a, b) => extreme(a, b));
  const label = `${signal.title}: ${signal.worst === "high" ? "largest" : "lowest"} ${shown(worst)}, at the end ${series.map((each) => `${runs.length > 1 ? `${each.run.letter} ` : ""}${shown((signal.worst === "high" ? each.high : each.low).at(-1))}`).join(", ")}`;
  const svg = drawn("svg", { class: "chart", role: "img", "aria-label": label, viewBox: `0 0 ${width} 132`, width, height: 132, "data-first": first, "data-last": last, "data-left": left, "data-right": right });
  svg.append(drawn("text", { x: 2, y: 13, class: "title" }, `${signal.title}${logged ? " (logarithmic)" : ""}`));
  for (const value of [from, to]) {
    svg.append(drawn("line", { x1: left, x2: right, y1: y(value), y2: y(value), class: "grid" }));
    svg.append(drawn("text", { x: left - 4, y: y(value) + 4, "text-anchor": "end", class: "soft" }, tick(value)));
  }
  svg.append(drawn("text", { x: left, y: 127, class: "soft" }, String(first)), drawn("text", { x: right, y: 127, class: "soft", "text-anchor": "end" }, `${unit} ${last}`));
  for (const { run, at, low, high } of series) {
    let path = "", band = [], pen = "M";
    run.steps.forEach((step, column) => {
      const a = low[column], b = high[column];
      if (!Number.isFinite(a) || !Number.isFinite(b)) { pen = "M"; return; }
      path += `${pen}${x(step).toFixed(1)} ${y(a).toFixed(1)}` + (a === b ? (pen === "M" ? "h.1" : "") : `L${x(step).toFixed(1)} ${y(b).toFixed(1)}`);
      pen = "L";
    });
    svg.append(drawn("path", { d: path, class: `curve style${at % 6}` }));
    const end = high.findLastIndex(Number.isFinite);
    if (runs.length > 1 && end >= 0) svg.append(drawn("text", { x: Math.min(right, x(run.steps[end])) - 10 * at, y: y(high[end]) - 3, "text-anchor": "end", class: `letter style${at % 6}` }, run.letter));
  }
  const figure = make("figure");
  figure.append(svg);
  return figure;
}
function headOf(run, layer, head) {
  const place = run.layers.findIndex((each) => each.name === layer);
  return place < 0 || head >= run.layers[place].heads ? -1 : run.layers[place].start + head;
}
function drawHead() {
  const run = runs[state.run], chosen = run.heads[state.head];
  if (!chosen) return;
  const layer = run.layers[chosen.layer].name, head = chosen.head;
  $("head-title").textContent = `${layer} head ${head} over training`;
  $("layer").value = layer;
  $("number").replaceChildren(...Array.from({ length: run.layers[chosen.layer].heads }, (_, i) => make("option", { value: i }, String(i))));
  $("number").value = head;
  $("link").href = `#${encodeURIComponent(`${layer}.${head}`)}`;
  const heads = runs.map((each, at) => [each, at, headOf(each, layer, head)]).filter((each) => each[2] >= 0);
  $("lines").replaceChildren(...names.map((name) => lineChart(name, heads)).filter(Boolean));
  const items = heads.flatMap(([each]) => each.issues
    .filter(([l, h]) => each.layers[l].name === layer && (h === head || h === -1))
    .map(([, h, from, to, severity, kind]) => make("li", {}, `${runs.length > 1 ? `${each.letter}: ` : ""}${severity}, ${kind.replaceAll("_", " ")}${h === -1 ? " of the whole layer" : ""}: from ${unit} ${from} ${to === null ? "on, still open" : `to ${to}`}`)));
  const list = make("ul");
  list.append(...(items.length ? items.slice(0, 40) : [make("li", {}, "no issue of this head")]));
  $("head-issues").replaceChildren(list);
  moveCursors();
}
function openHead(byUser) {
  drawHead();
  if (!byUser) return;
  history.replaceState(null, "", $("link").getAttribute("href"));
  $("head").scrollIntoView({ block: "nearest" });
  $("head").focus({ preventScroll: true });
}
function openLinked() {
  let wanted = "";
  try { wanted = decodeURIComponent(location.hash.slice(1)); } catch { return; }
  const dot = wanted.lastIndexOf("."), layer = wanted.slice(0, dot), head = wanted.slice(dot + 1);
  if (dot < 1 || !/^\d+$/.test(head)) return;
  const run = runs.findIndex((each) => headOf(each, layer, Number(head)) >= 0);
  if (run < 0) return;
  state.run = run; state.head = headOf(runs[run], layer, Number(head));
  drawMaps(); drawHead();
  $("head").scrollIntoView({ block: "start" });
  $("head").focus({ preventScroll: true });
}
for (const name of new Set(runs.flatMap((run) => run.layers.map((layer) => layer.name)))) $("layer").append(make("option", { value: name }, name));
function fromLists() {
  const layer = $("layer").value;
  let run = runs.findIndex((each) => headOf(each, layer, Number($("number").value)) >= 0);
  if (run < 0) { run = runs.findIndex((each) => headOf(each, layer, 0) >= 0); $("number").value = 0; }
  choose(run, headOf(runs[run], layer, Number($("number").value) || 0));
  drawHead();
  history.replaceState(null, "", $("link").getAttribute("href"));
}
$("layer").addEventListener("change", fromLists);
$("number").addEventListener("change", fromLists);
$("head").addEventListener("keydown", (event) => { if (event.key === "Escape" && maps.length) maps[0].canvas.focus(); });
window.addEventListener("hashchange", openLinked);
window.addEventListener("resize", drawMaps);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawMaps);
