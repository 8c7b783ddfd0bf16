function save(parts, name, kind) {
  const link = make("a", { download: name });
  link.href = URL.createObjectURL(new Blob(parts, { type: kind }));
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
const quoted = (text) => `"${(/^[=+\-@\t\r]/.test(text) ? "'" : "") + text.replaceAll('"', '""')}"`;
const plain = (value) => (Number.isNaN(value) ? "nan" : value === Infinity ? "inf" : value === -Infinity ? "-inf" : String(Number(value.toPrecision(6))));
function csv() {
  const extremes = runs.some((run) => run.planes > 1) ? ["_min", "_max"] : [""];
  const parts = [["run", "first_step", "last_step", "layer", "head", ...names.flatMap((name) => extremes.map((end) => name + end))].join() + "\n"];
  for (const run of runs) run.steps.forEach((step, column) => {
    const lines = run.heads.map(({ layer, head }, index) => [quoted(run.name), run.from[column], step, quoted(run.layers[layer].name), head,
      ...names.flatMap((name) => extremes.map((_, plane) => plain(valueOf(run, name, Math.min(plane, run.planes - 1), index, column))))].join());
    parts.push(lines.join("\n") + "\n");
  });
  return parts;
}
function json() {
  const listed = (run, name, plane) => run.layers.map((layer) => Array.from({ length: layer.heads }, (_, head) => run.steps.map((_, column) => {
    const value = valueOf(run, name, plane, layer.start + head, column);
    return Number.isFinite(value) ? Number(value.toPrecision(6)) : plain(value);
  })));
  return JSON.stringify({
    schema_version: 1,
    runs: runs.map((run) => ({
      name: run.name, unit: run.unit, first_steps: run.from, last_steps: run.steps, loss: run.loss, learning_rate: run.rate,
      layers: run.layers.map((layer) => layer.name),
      issues: run.issues.map(([layer, head, from, to, severity, type]) => ({ layer: run.layers[layer].name, head: head < 0 ? null : head, from, to, severity, type })),
      signals: Object.fromEntries(run.signals.map((name) => [name, { min: listed(run, name, 0), max: listed(run, name, run.planes - 1) }])),
    })),
  });
}
$("csv").addEventListener("click", () => save(csv(), "stabmon_heads.csv", "text/csv"));
$("json").addEventListener("click", () => save([json()], "stabmon_heads.json", "application/json"));
function alone(figure) {
  const found = [...figure.querySelectorAll("svg.chart")].find((each) => getComputedStyle(each).display !== "none");
  const copy = found.cloneNode(true), style = getComputedStyle(document.documentElement);
  copy.querySelector(".cursor")?.remove();
  const variables = ["paper", "ink", "soft", "line", "warn", "bad", "run0", "run1", "run2", "run3", "run4", "run5"].map((name) => `--${name}:${style.getPropertyValue(`--${name}`)}`).join(";");
  copy.prepend(drawn("rect", { width: "100%", height: "100%", fill: style.getPropertyValue("--paper") }));
  copy.prepend(drawn("style", {}, `svg.chart{${variables}}${$("chart-style").textContent}`));
  return new XMLSerializer().serializeToString(copy);
}
for (const figure of document.querySelectorAll("figure.figure")) {
  const tools = make("div", { class: "tools" }), name = `stabmon_${figure.dataset.name}`;
  const asSvg = make("button", { type: "button", "aria-label": `save ${figure.dataset.name} as SVG` }, "SVG"), asPng = make("button", { type: "button", "aria-label": `save ${figure.dataset.name} as PNG` }, "PNG");
  asSvg.addEventListener("click", () => save([alone(figure)], `${name}.svg`, "image/svg+xml"));
  asPng.addEventListener("click", () => {
    const picture = new Image(), canvas = make("canvas");
    picture.onload = () => {
      canvas.width = 2 * picture.naturalWidth; canvas.height = 2 * picture.naturalHeight;
      canvas.getContext("2d").drawImage(picture, 0, 0, canvas.width, canvas.height);
      canvas.toBlob((blob) => save([blob], `${name}.png`, "image/png"));
    };
    picture.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(alone(figure))}`;
  });
  tools.append(asSvg, asPng);
  figure.append(tools);
}
for (const map of maps) {
  const button = make("button", { type: "button" }, "PNG"), tools = make("div", { class: "tools" });
  button.addEventListener("click", () => map.canvas.toBlob((blob) => save([blob], `stabmon_map_${map.run.letter}_${$(`signal${map.slot}`).value}_${stepNow()}.png`, "image/png")));
  tools.append(button);
  map.canvas.parentElement.append(tools);
}
for (const block of document.querySelectorAll("pre.code")) {
  const button = make("button", { type: "button", class: "copy" }, "copy"), code = block.querySelector("code");
  button.addEventListener("click", async () => {
    try { await navigator.clipboard.writeText(code.textContent); button.textContent = "copied"; }
    catch { getSelection().selectAllChildren(code); }
  });
  block.prepend(button);
}
$("interactive").hidden = false;
setPlace(state.place);
drawHead();
openLinked();
document.documentElement.dataset.ready = "yes";
