const $ = (id) => document.getElementById(id);
const make = (tag, attributes = {}, text = "") => {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== "") made.textContent = text;
  return made;
};
const meta = JSON.parse($("meta").textContent);
const packedBytes = Uint8Array.from(atob($("packed").textContent), (sign) => sign.charCodeAt(0));
$("packed").textContent = "";
const unzipped = new Blob([packedBytes]).stream().pipeThrough(new DecompressionStream("gzip"));
const codes = new Uint16Array(await new Response(unzipped).arrayBuffer());

const runs = meta.runs, signals = meta.signals, names = Object.keys(signals);
let offset = 0;
for (const run of runs) {
  run.heads = [];
  run.layers.forEach((layer, l) => {
    layer.start = run.heads.length;
    for (let head = 0; head < layer.heads; head++) run.heads.push({ layer: l, head });
  });
  run.at = {};
  for (const name of run.signals) {
    run.at[name] = offset;
    offset += run.planes * run.heads.length * run.steps.length;
  }
}
function decode(signal, code) {
  if (code > meta.top) return code === meta.top + 1 ? -Infinity : code === meta.top + 2 ? Infinity : NaN;
  const { low, high, soft } = signal, share = code / meta.top;
  if (!soft) return low + share * (high - low);
  const bottom = Math.asinh(low / soft);
  return soft * Math.sinh(bottom + share * (Math.asinh(high / soft) - bottom));
}
function valueOf(run, name, plane, head, column) {
  if (!(name in run.at) || column < 0) return NaN;
  const place = run.at[name] + (plane * run.heads.length + head) * run.steps.length + column;
  return decode(signals[name], codes[place]);
}
const worstPlane = (run, name) => (signals[name].worst === "high" ? run.planes - 1 : 0);
const shown = (value) => Number.isNaN(value) ? "not measured" : !Number.isFinite(value) ? (value > 0 ? "∞" : "−∞") : value === 0 ? "0" : Math.abs(value) >= 1e5 || Math.abs(value) < 1e-3 ? value.toExponential(2) : String(Number(value.toPrecision(3)));
function columnAt(run, step) {
  let low = 0, high = run.from.length;
  while (low < high) { const middle = (low + high) >> 1; if (run.from[middle] <= step) low = middle + 1; else high = middle; }
  return low - 1;
}
const places = [...new Set(runs.flatMap((run) => run.steps))].sort((a, b) => a - b);
const first = Math.min(...runs.map((run) => run.first)), last = Math.max(...runs.map((run) => run.last));
const unit = runs[0].unit;
const state = { place: places.length - 1, run: 0, head: 0 };
const stepNow = () => places[state.place];
const severe = { info: 0, warning: 1, error: 2, critical: 3 }, initials = ["i", "W", "E", "C"];
function openIssues(run, step) {
  const found = new Map();
  for (const [layer, head, from, to, severity, kind] of run.issues) {
    if (from > step || (to !== null && to <= step)) continue;
    const key = `${layer}.${head}`, before = found.get(key);
    if (!before || severe[severity] > before.rank) found.set(key, { rank: severe[severity], kind });
  }
  return found;
}
const anchors = [[0, 34, 78], [26, 56, 111], [67, 78, 108], [97, 101, 111], [125, 124, 120], [155, 148, 118], [188, 174, 108], [222, 201, 88], [254, 232, 56]];  // cividis
function colour(share) {
  const at = Math.min(anchors.length - 1.001, Math.max(0, share * (anchors.length - 1))), low = Math.floor(at);
  return anchors[low].map((part, i) => Math.round(part + (at - low) * (anchors[low + 1][i] - part)));
}
function shareOf(signal, value) {
  const low = signal.limits[0] ?? signal.low, high = signal.limits[1] ?? signal.high;
  if (!signal.soft) return (value - low) / (high - low || 1);
  const bottom = Math.asinh(low / signal.soft);
  return (Math.asinh(value / signal.soft) - bottom) / (Math.asinh(high / signal.soft) - bottom || 1);
}

const maps = [];
for (const [at, run] of runs.entries()) for (const slot of [0, 1]) {
  if (!run.heads.length) continue;
  const figure = make("figure"), canvas = make("canvas", { tabindex: "0", role: "img" });
  const title = make("figcaption"), said = make("output", { class: "said", "aria-live": "polite" });
  figure.append(title, canvas, said);
  $("grids").append(figure);
  maps.push({ run, at, slot, canvas, title, said, pen: canvas.getContext("2d") });
}
for (const slot of [0, 1]) {
  const list = $(`signal${slot}`);
  for (const name of names) list.append(make("option", { value: name }, signals[name].title));
  list.value = names[Math.min(slot, names.length - 1)];
  list.addEventListener("change", drawMaps);
}
function layout(map) {
  const wide = map.canvas.clientWidth || map.canvas.parentElement.clientWidth || 320, { run, pen } = map;
  const rows = run.layers.length, most = Math.max(...run.layers.map((layer) => layer.heads));
  pen.font = "12px system-ui, sans-serif";
  const left = Math.min(wide * 0.34, 10 + Math.max(...run.layers.map((layer) => pen.measureText(layer.short).width)));
  const high = Math.max(5, Math.min(30, 460 / rows));
  return { wide, left, top: 16, cell: (wide - left - 4) / most, high, rows, most };
}
function draw(map) {
  const { run, canvas, pen } = map, name = $(`signal${map.slot}`).value, signal = signals[name];
  const step = stepNow(), column = columnAt(run, step), plane = worstPlane(run, name), issues = openIssues(run, step);
  const ratio = Math.max(1, window.devicePixelRatio || 1), style = getComputedStyle(document.body);
  canvas.style.width = "100%";
  const { wide, left, top, cell, high, rows, most } = layout(map), tall = top + rows * high + 34;
  canvas.width = wide * ratio; canvas.height = tall * ratio; canvas.style.height = `${tall}px`;
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.fillStyle = style.backgroundColor; pen.fillRect(0, 0, wide, tall);
  pen.textBaseline = "middle";
  const write = (text, x, y, align, room, font = "12px") => { pen.font = `${font} system-ui, sans-serif`; pen.textAlign = align; pen.fillText(text, x, y, room); };
  pen.fillStyle = style.color;
  const gap = Math.max(1, Math.ceil(22 / cell));
  for (let head = 0; head < most; head += gap) write(String(head), left + (head + 0.5) * cell, 8, "center", cell * gap);
  run.layers.forEach((layer, l) => {
    const y = top + l * high, every = Math.max(1, Math.ceil(13 / high));
    pen.fillStyle = style.color;
    const mark = issues.get(`${l}.-1`);
    if (l % every === 0 || mark) write((mark ? `${initials[mark.rank]} ` : "") + layer.short, left - 5, y + high / 2, "right", left - 6, mark ? "bold 12px" : "12px");
    for (let head = 0; head < layer.heads; head++) {
      const value = valueOf(run, name, plane, layer.start + head, column), x = left + head * cell;
      const [r, g, b] = Number.isNaN(value) ? [150, 150, 150] : colour(shareOf(signal, value));
      pen.fillStyle = `rgb(${r},${g},${b})`;
      pen.fillRect(x, y, Math.max(1, cell - 1), Math.max(1, high - 1));
      pen.fillStyle = 0.3 * r + 0.59 * g + 0.11 * b > 120 ? "#000" : "#fff";
      const open = issues.get(`${l}.${head}`);
      const letter = open ? initials[open.rank] : "";
      if (cell >= 38 && high >= 15) write(Number.isNaN(value) ? "–" : shown(value), x + cell / 2 + (letter ? 5 : 0), y + high / 2, "center", cell - (letter ? 14 : 3), "11px");
      if (letter && cell >= 8 && high >= 9) write(letter, x + (cell >= 38 ? 7 : cell / 2), y + high / 2, "center", cell, "bold 11px");
      else if (letter) { pen.fillRect(x + cell / 3, y + high / 3, cell / 3, high / 3); }
    }
  });
  const chosen = run.heads[map.at === state.run ? state.head : sameHead(run)];
  if (chosen) {
    const x = left + chosen.head * cell - 1, y = top + chosen.layer * high - 1;
    for (const [line, width] of [["#fff", 4], ["#c00", 2]]) { pen.strokeStyle = line; pen.lineWidth = width; pen.strokeRect(x, y, cell + 1, high + 1); }
  }
  const bar = Math.min(140, wide - left - 90), low = tall - 22, from = signal.limits[0] ?? signal.low, to = signal.limits[1] ?? signal.high;
  for (let i = 0; i < bar; i++) { pen.fillStyle = `rgb(${colour(i / bar).join()})`; pen.fillRect(left + i, low, 1.5, 10); }
  pen.fillStyle = style.color;
  write(shown(from), left - 4, low + 5, "right", left - 4);
  write(`${shown(to)}  ${signal.unit}`, left + bar + 5, low + 5, "left", wide - left - bar - 5);
  const span = column < 0 ? "" : run.from[column] === run.steps[column] ? "" : `, ${signal.worst === "high" ? "largest" : "lowest"} of ${unit}s ${run.from[column]} to ${run.steps[column]}`;
  map.title.textContent = `${runs.length > 1 ? `${run.letter}: ` : ""}${signal.title}${span}`;
  canvas.setAttribute("aria-label", `${signal.title} of every head of ${run.name} at ${unit} ${step}; arrow keys move between heads, Enter opens one, [ and ] change the ${unit}`);
  if (chosen) {
    const index = run.layers[chosen.layer].start + chosen.head, open = issues.get(`${chosen.layer}.${chosen.head}`) || issues.get(`${chosen.layer}.-1`);
    const value = valueOf(run, name, plane, index, column);
    map.said.textContent = `${run.layers[chosen.layer].name} head ${chosen.head}: ${column < 0 ? "not yet measured" : shown(value)}${open ? ` (${["info", "warning", "error", "critical"][open.rank]}: ${open.kind.replaceAll("_", " ")})` : ""}`;
  }
}
function sameHead(run) {
  const chosen = runs[state.run].heads[state.head];
  if (!chosen) return -1;
  const layer = run.layers.findIndex((each) => each.name === runs[state.run].layers[chosen.layer].name);
  return layer < 0 || chosen.head >= run.layers[layer].heads ? -1 : run.layers[layer].start + chosen.head;
}
function drawMaps() { maps.forEach(draw); }
const nearest = (list, step) => { for (let i = list.length - 1; i >= 0; i--) if (list[i][0] <= step) return list[i][1]; return null; };
function tellStep() {
  const step = stepNow(), said = runs.map((run) => {
    const loss = nearest(run.loss, step), rate = nearest(run.rate, step);
    const open = run.incidents.filter(([from, to]) => from <= step && (to === null || to > step)).map((each) => each[3]);
    const parts = [step > run.last ? `ended at ${run.last}` : loss === null ? "loss not finite or unknown" : `loss ${shown(loss)}`];
    if (rate !== null && step <= run.last) parts.push(`rate ${shown(rate)}`);
    parts.push(open.length ? open.slice(0, 2).join("; ") + (open.length > 2 ? ` and ${open.length - 2} more` : "") : "no open incident");
    return `${runs.length > 1 ? `${run.letter}: ` : ""}${parts.join(", ")}`;
  });
  $("at").textContent = `${unit} ${step.toLocaleString("en")}. ${said.join(" · ")}`;
  $("step").setAttribute("aria-valuetext", `${unit} ${step}`);
}
function moveCursors() {
  const step = stepNow();
  for (const svg of document.querySelectorAll("svg.chart")) {
    let line = svg.querySelector(".cursor");
    if (!line) { line = document.createElementNS("http://www.w3.org/2000/svg", "line"); line.setAttribute("class", "cursor"); svg.append(line); }
    const { first: a, last: b, left, right } = svg.dataset, x = Number(left) + Math.min(1, Math.max(0, (step - a) / (b - a))) * (right - left);
    for (const [name, value] of [["x1", x], ["x2", x], ["y1", 18], ["y2", svg.viewBox.baseVal.height - 30]]) line.setAttribute(name, value);
  }
}
function setPlace(place) {
  state.place = Math.max(0, Math.min(places.length - 1, place));
  $("step").value = state.place;
  tellStep(); drawMaps(); moveCursors();
}
function setStep(step) {
  let best = 0;
  places.forEach((each, i) => { if (Math.abs(each - step) < Math.abs(places[best] - step)) best = i; });
  setPlace(best);
}
$("step").max = places.length - 1;
$("step").addEventListener("input", () => setPlace(Number($("step").value)));
$("back").addEventListener("click", () => setPlace(state.place - 1));
$("forth").addEventListener("click", () => setPlace(state.place + 1));
document.addEventListener("click", (event) => {
  const svg = event.target.closest?.("svg.chart");
  if (!svg || !places.length) return;
  const box = svg.getBoundingClientRect(), { first: a, last: b, left, right } = svg.dataset;
  const x = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
  setStep(Number(a) + Math.min(1, Math.max(0, (x - left) / (right - left))) * (b - a));
});
function cellUnder(map, event) {
  const box = map.canvas.getBoundingClientRect(), { left, top, cell, high } = layout(map);
  const layer = Math.floor((event.clientY - box.top - top) / high), head = Math.floor((event.clientX - box.left - left) / cell);
  const found = map.run.layers[layer];
  return found && head >= 0 && head < found.heads ? found.start + head : -1;
}
function choose(run, head) { state.run = run; state.head = head; drawMaps(); }
for (const map of maps) {
  map.canvas.addEventListener("pointermove", (event) => { const head = cellUnder(map, event); if (head >= 0 && (head !== state.head || map.at !== state.run)) choose(map.at, head); });
  map.canvas.addEventListener("click", (event) => { const head = cellUnder(map, event); if (head >= 0) { choose(map.at, head); openHead(true); } });
  map.canvas.addEventListener("keydown", (event) => {
    if (state.run !== map.at) { state.head = Math.max(0, sameHead(map.run)); state.run = map.at; }
    const here = map.run.heads[state.head], move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (move) {
      const layer = map.run.layers[Math.max(0, Math.min(map.run.layers.length - 1, here.layer + move[0]))];
      choose(map.at, layer.start + Math.max(0, Math.min(layer.heads - 1, here.head + move[1])));
    } else if (event.key === "Enter" || event.key === " ") openHead(true);
    else if (event.key === "[") setPlace(state.place - 1);
    else if (event.key === "]") setPlace(state.place + 1);
    else return;
    event.preventDefault();
  });
}
