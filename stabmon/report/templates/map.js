(async () => {
  "use strict";
  const $ = (id) => document.getElementById(id);
  const meta = JSON.parse($("meta").textContent);
  const bytes = (text) => Uint8Array.from(atob(text), (sign) => sign.charCodeAt(0));
  const unzip = new DecompressionStream("gzip");
  const buffer = await new Response(new Blob([bytes($("packed").textContent)]).stream().pipeThrough(unzip)).arrayBuffer();
  $("packed").textContent = "";
  const codes = meta.bytes === 2 ? new Uint16Array(buffer) : new Uint8Array(buffer);
  const palette = bytes(meta.palette);
  const canvas = $("canvas"), pen = canvas.getContext("2d");
  const decode = new Float32Array(meta.levels + 2);
  for (let code = 0; code <= meta.levels; code++) decode[code] = meta.root ? (code / meta.levels) ** 2 : code / meta.levels;
  decode[meta.levels + 1] = NaN;
  let at = 0;
  for (const layer of meta.layers) { layer.start = at; at += layer.heads.length * layer.rows * layer.cols; }

  let view = null, shown = null, top = 1, cursor = null, drag = null;
  const option = (value, text) => { const made = document.createElement("option"); made.value = value; made.textContent = text; return made; };
  meta.layers.forEach((layer, i) => $("layer").append(option(i, layer.name)));
  $("layer").value = meta.layer;
  const layer = () => meta.layers[$("layer").value];

  function fillHeads() {
    const before = $("head").value;
    $("head").replaceChildren(option("mean", "mean of heads"), ...layer().heads.map((head, i) => option(i, String(head))));
    $("head").value = before !== "" && [...$("head").options].some((each) => each.value === before) ? before : "0";
  }
  function load() {
    const { rows, cols, heads, tops, start } = layer(), size = rows * cols;
    const chosen = $("head").value, list = chosen === "mean" ? heads.map((_, i) => i) : [Number(chosen)];
    const values = new Float32Array(size);
    for (const head of list) {
      const from = start + head * size, high = tops[head] / list.length;
      for (let i = 0; i < size; i++) values[i] += decode[codes[from + i]] * high;
    }
    top = 0;
    for (const value of values) if (value > top) top = value;
    shown = { rows, cols, values };
    if (!view || view.q1 >= rows || view.k1 >= cols) view = { q0: 0, q1: rows - 1, k0: 0, k1: cols - 1 };
    if (!cursor || cursor.q >= rows || cursor.k >= cols) cursor = { q: rows - 1, k: 0 };
  }
  const edge = { left: 52, top: 8, bottom: 72, right: 10 };
  function place() {
    const wide = canvas.clientWidth || 640;
    const rows = view.q1 - view.q0 + 1, cols = view.k1 - view.k0 + 1;
    const across = wide - edge.left - edge.right;
    const high = Math.max(120, Math.min(across, across * rows / cols));
    return { wide, across, high, rows, cols };
  }
  const name = (tokens, cell) => {
    if (!tokens || meta.factor > 1) return "";
    const token = tokens[cell];
    return token === undefined ? "" : token.replace(/\n/g, "↵");
  };
  const short = (text) => { const signs = [...text]; return signs.length > 8 ? signs.slice(0, 7).join("") + "…" : text; };
  function draw() {
    const { wide, across, high, rows, cols } = place();
    const ratio = Math.max(1, window.devicePixelRatio || 1), style = getComputedStyle(document.body);
    canvas.width = wide * ratio; canvas.height = (high + edge.top + edge.bottom) * ratio;
    canvas.style.aspectRatio = `${canvas.width} / ${canvas.height}`;
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.fillStyle = style.backgroundColor; pen.fillRect(0, 0, wide, high + edge.top + edge.bottom);
    const small = document.createElement("canvas"); small.width = cols; small.height = rows;
    const paint = small.getContext("2d"), image = paint.createImageData(cols, rows);
    const limit = $("top").value === "one" ? 1 : top || 1, power = Number($("scale").value);
    for (let q = 0, i = 0; q < rows; q++) for (let k = 0; k < cols; k++, i += 4) {
      const value = shown.values[(q + view.q0) * shown.cols + k + view.k0];
      if (Number.isNaN(value)) image.data.fill(184, i, i + 3);
      else {
        const colour = 3 * Math.round(255 * Math.min(1, value / limit) ** power);
        for (let c = 0; c < 3; c++) image.data[i + c] = palette[colour + c];
      }
      image.data[i + 3] = 255;
    }
    paint.putImageData(image, 0, 0);
    pen.imageSmoothingEnabled = false;
    pen.drawImage(small, edge.left, edge.top, across, high);
    pen.fillStyle = style.color; pen.font = "12px system-ui, sans-serif"; pen.textBaseline = "middle";
    const step = (count, room) => Math.max(1, Math.ceil(count / room));
    pen.textAlign = "right";
    for (let q = 0; q < rows; q += step(rows, high / 18)) {
      const text = rows <= high / 14 && short(name(meta.queries, q + view.q0)) || String((q + view.q0) * meta.factor);
      pen.fillText(text, edge.left - 5, edge.top + (q + .5) * high / rows, edge.left - 6);
    }
    pen.textAlign = "center";
    for (let k = 0; k < cols; k += step(cols, across / 44)) {
      const text = cols <= across / 40 && short(name(meta.keys, k + view.k0)) || String((k + view.k0) * meta.factor);
      pen.fillText(text, edge.left + (k + .5) * across / cols, edge.top + high + 11, 42);
    }
    const bar = pen.createLinearGradient(edge.left, 0, edge.left + 160, 0);
    for (let i = 0; i <= 16; i++) { const c = 3 * Math.round(255 * (i / 16) ** power); bar.addColorStop(i / 16, `rgb(${palette[c]},${palette[c + 1]},${palette[c + 2]})`); }
    const low = edge.top + high + 32;
    pen.fillStyle = bar; pen.fillRect(edge.left, low, 160, 12);
    pen.fillStyle = style.color; pen.textAlign = "right"; pen.fillText("0", edge.left - 5, low + 6);
    pen.textAlign = "left"; pen.fillText(limit.toPrecision(3), edge.left + 166, low + 6);
    pen.fillText(`${meta.unit}; across: key, down: query`, edge.left, low + 26, wide - edge.left);
    if (cursor.q >= view.q0 && cursor.q <= view.q1 && cursor.k >= view.k0 && cursor.k <= view.k1) {
      const w = across / cols, h = high / rows, x = edge.left + (cursor.k - view.k0) * w, y = edge.top + (cursor.q - view.q0) * h;
      pen.strokeStyle = "#fff"; pen.lineWidth = 3; pen.strokeRect(x - 1, y - 1, Math.max(w, 4) + 2, Math.max(h, 4) + 2);
      pen.strokeStyle = "#d00"; pen.lineWidth = 1.5; pen.strokeRect(x - 1, y - 1, Math.max(w, 4) + 2, Math.max(h, 4) + 2);
    }
    if (drag && drag.to) {
      pen.strokeStyle = "#d00"; pen.lineWidth = 1; pen.setLineDash([4, 3]);
      pen.strokeRect(Math.min(drag.x, drag.to.x), Math.min(drag.y, drag.to.y), Math.abs(drag.x - drag.to.x), Math.abs(drag.y - drag.to.y));
      pen.setLineDash([]);
    }
    for (const [id, value] of [["q0", view.q0], ["q1", view.q1], ["k0", view.k0], ["k1", view.k1]])
      if (document.activeElement !== $(id)) $(id).value = value * meta.factor + (id[1] === "1" ? meta.factor - 1 : 0);
  }
  function read() {
    const value = shown.values[cursor.q * shown.cols + cursor.k];
    const part = (cell, tokens) => {
      const from = cell * meta.factor, token = name(tokens, cell);
      return meta.factor > 1 ? `${from}–${from + meta.factor - 1}` : token ? `${from} “\u2068${token}\u2069”` : String(from);
    };
    const text = Number.isNaN(value) ? "not a number" : value.toPrecision(3);
    $("readout").textContent = `query ${part(cursor.q, meta.queries)} → key ${part(cursor.k, meta.keys)}: ${text}`;
  }
  const show = () => { draw(); read(); };
  const reload = () => { load(); show(); };
  function cell(event) {
    const box = canvas.getBoundingClientRect(), { across, high, rows, cols } = place();
    const x = event.clientX - box.left, y = event.clientY - box.top;
    const fit = (value, low, top) => Math.max(low, Math.min(top, value));
    return { x, y, q: fit(view.q0 + Math.floor((y - edge.top) / high * rows), view.q0, view.q1), k: fit(view.k0 + Math.floor((x - edge.left) / across * cols), view.k0, view.k1) };
  }
  canvas.addEventListener("pointermove", (event) => {
    const here = cell(event);
    cursor = { q: here.q, k: here.k };
    if (drag) drag.to = here;
    show();
  });
  canvas.addEventListener("pointerdown", (event) => { const here = cell(event); cursor = { q: here.q, k: here.k }; if (event.pointerType === "mouse") drag = here; show(); });
  window.addEventListener("pointerup", () => {
    const from = drag; drag = null;
    if (from && from.to && Math.abs(from.to.x - from.x) > 8 && Math.abs(from.to.y - from.y) > 8)
      view = { q0: Math.min(from.q, from.to.q), q1: Math.max(from.q, from.to.q), k0: Math.min(from.k, from.to.k), k1: Math.max(from.k, from.to.k) };
    if (from) draw();
  });
  const whole = () => { view = null; load(); show(); };
  canvas.addEventListener("dblclick", whole);
  $("all").addEventListener("click", whole);
  const turn = (id, by) => { const list = $(id); const next = list.selectedIndex + by; if (next >= 0 && next < list.options.length) { list.selectedIndex = next; if (id === "layer") fillHeads(); reload(); } };
  canvas.addEventListener("keydown", (event) => {
    const by = event.shiftKey ? 10 : 1;
    const move = { ArrowUp: [-by, 0], ArrowDown: [by, 0], ArrowLeft: [0, -by], ArrowRight: [0, by] }[event.key];
    if (move) {
      cursor = { q: Math.max(view.q0, Math.min(view.q1, cursor.q + move[0])), k: Math.max(view.k0, Math.min(view.k1, cursor.k + move[1])) };
      show();
    } else if (event.key === "[") turn("head", -1);
    else if (event.key === "]") turn("head", 1);
    else if (event.key === "PageUp") turn("layer", -1);
    else if (event.key === "PageDown") turn("layer", 1);
    else return;
    event.preventDefault();
  });
  $("layer").addEventListener("change", () => { fillHeads(); reload(); });
  $("head").addEventListener("change", reload);
  for (const id of ["scale", "top"]) $(id).addEventListener("change", draw);
  for (const id of ["q0", "q1", "k0", "k1"]) $(id).addEventListener("change", () => {
    const number = (name, most) => Math.max(0, Math.min(most, Math.floor(Number($(name).value) / meta.factor) || 0));
    const q = [number("q0", shown.rows - 1), number("q1", shown.rows - 1)].sort((a, b) => a - b);
    const k = [number("k0", shown.cols - 1), number("k1", shown.cols - 1)].sort((a, b) => a - b);
    view = { q0: q[0], q1: q[1], k0: k[0], k1: k[1] };
    $(id).blur(); draw();
  });
  $("save").addEventListener("click", () => canvas.toBlob((blob) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = `attention_${layer().name.replace(/[^\w.-]+/g, "_")}_head_${$("head").value}.png`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }));
  window.addEventListener("resize", draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  fillHeads(); reload();
  document.documentElement.dataset.ready = "yes";
})();
