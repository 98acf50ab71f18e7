// The live page: draws what arrives over one WebSocket, and takes an overlay off when it is too old.
// Messages are defined in live_page.py. Nothing is stored, nothing is fetched from elsewhere.
"use strict";

const WORDS = {
  connecting: "waiting for the program",
  live: "frames arrive and answers are in time",
  stale: "late: what is shown is not what the probe sees now",
  frozen: "the link is alive but the picture does not change",
  lost: "no frames: the source is gone",
  degraded: "not answered by the chosen artefact, or not in time",
  ended: "the source has ended",
  offline: "no connection to the program; trying again",
};
const DROPS = {
  overtaken: "overtaken", out_of_order: "out of order", duplicate: "duplicate", closing: "at the end",
};
const TREND = 600;
const SILENCE_MS = 1500;
const at = (id) => document.getElementById(id);
const frameCanvas = at("frame"), overlayCanvas = at("overlay");
const frameContext = frameCanvas.getContext("2d"), overlayContext = overlayCanvas.getContext("2d");
let trend = [], socket = null, heard = 0, shown = null, expiry = 0, overlayMs = 1000, picture = null, order = Promise.resolve();
const want = { mask: true, ellipse: true };
const page = { state: "connecting", overlay: false, frames: 0, messages: 0, results: 0 };

function connect() {
  const base = location.href.split(/[?#]/)[0].replace(/^http/, "ws");
  socket = new WebSocket(base + "ws" + location.search);
  socket.binaryType = "arraybuffer";
  // one after the other: a picture that decodes faster must not overtake the one before it
  socket.onmessage = (event) => { order = order.then(() => receive(event.data)); };
  socket.onclose = () => {
    say("offline");
    withdraw();
    setTimeout(connect, 1000);
  };
}

async function receive(buffer) {
  const own = socket;
  heard = performance.now();
  const length = new DataView(buffer).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  const png = new Uint8Array(buffer, 4 + length, header.png_bytes);
  const mask = new Uint8Array(buffer, 4 + length + header.png_bytes, header.mask_bytes);
  page.messages += 1;
  try {
    tell(header);
    if (header.frame) await show(header, png, mask);
  } finally {
    if (own && own.readyState === WebSocket.OPEN) own.send("drawn");
  }
}

function tell(header) {
  if (trend.length && header.results < trend.length) trend = [];
  trend = trend.concat(header.trend).slice(-TREND);
  overlayMs = header.overlay_ms;
  page.results = header.results;
  at("title").textContent = header.title || "tinyusfm-edge live";
  say(header.state, header.reason);
  if (["lost", "stale", "ended"].includes(header.state)) withdraw();
  count(header);
  happened(header.events);
  if (header.trend.length) charts(header.budget_ms);
}

function say(state, reason) {
  if (document.body.dataset.state !== state) document.body.dataset.state = state;
  page.state = state;
  at("state").textContent = state.toUpperCase();
  at("state-why").textContent = state === "live" ? WORDS.live : reason || WORDS[state];
  notice();
}

function notice() {
  const words = [];
  if (page.state !== "live") words.push(page.state.toUpperCase());
  if (shown && !page.overlay) words.push(shown.error ? "no answer" : "overlay withdrawn");
  at("notice").hidden = !words.length;
  at("notice").textContent = words.join(": ");
}

async function show(header, png, mask) {
  const frame = header.frame, received = performance.now();
  const bitmap = await createImageBitmap(new Blob([png], { type: "image/png" }));
  for (const canvas of [frameCanvas, overlayCanvas]) {
    if (canvas.width !== frame.width || canvas.height !== frame.height) {
      canvas.width = frame.width;
      canvas.height = frame.height;
    }
  }
  frameContext.drawImage(bitmap, 0, 0);
  bitmap.close();
  shown = frame;
  page.frames += 1;
  const left = overlayMs - (frame.age_ms ?? 0) - (performance.now() - received);
  const lasting = frame.valid && !frame.stale && !frame.withheld && left > 0 && !["lost", "stale", "ended"].includes(page.state);
  if (lasting) {
    picture = { frame, mask };
    draw();
    clearTimeout(expiry);
    expiry = setTimeout(withdraw, left);
  } else withdraw();
  read(frame, lasting);
  at("engine").textContent = frame.engine + (frame.rung ? " (fallback " + frame.rung + ")" : "");
  const size = frame.full[0] + " x " + frame.full[1];
  at("frame-facts").textContent = "frame " + frame.seq + ", " + size + (frame.width === frame.full[0] ? "" : ", shown at " + frame.width);
}

function withdraw() {
  clearTimeout(expiry);
  overlayContext.clearRect(0, 0, overlayCanvas.width, overlayCanvas.height);
  picture = null;
  page.overlay = false;
  at("reading").textContent = "\u2013";
  at("unit").textContent = "";
  at("smoothed").textContent = "";
  notice();
}

function draw() {
  if (!picture) return;
  const { frame, mask } = picture, w = frame.width, h = frame.height;
  overlayContext.clearRect(0, 0, w, h);
  if (want.mask && mask.length) {
    const image = overlayContext.createImageData(w, h), cells = new Uint32Array(image.data.buffer);
    const bit = (i) => (mask[i >> 3] >> (7 - (i & 7))) & 1;
    const wide = Math.max(1, Math.round(Math.min(w, h) / 320));
    for (let y = 0, i = 0; y < h; y += 1) {
      for (let x = 0; x < w; x += 1, i += 1) {
        if (!bit(i)) continue;
        const edge = x < wide || y < wide || x >= w - wide || y >= h - wide
          || !bit(i - wide) || !bit(i + wide) || !bit(i - wide * w) || !bit(i + wide * w);
        cells[i] = edge ? 0xffffdc46 : 0x20ffdc46;  // ABGR of #46dcff
      }
    }
    overlayContext.putImageData(image, 0, 0);
  }
  if (want.ellipse && frame.ellipse) {
    overlayContext.beginPath();
    for (const [x, y] of frame.ellipse) overlayContext.lineTo(x, y);
    overlayContext.closePath();
    overlayContext.strokeStyle = "#ffcd3c";
    overlayContext.lineWidth = Math.max(1.4, Math.min(w, h) / 200);
    overlayContext.stroke();
  }
  page.overlay = true;
  notice();
}

function read(frame, lasting) {
  at("reading-name").textContent = frame.name || "Reading";
  const digits = frame.unit === "px" ? 0 : 1;
  const has = lasting && frame.value !== null;
  at("reading").textContent = has ? frame.value.toFixed(digits) : lasting && frame.found === false ? "no head" : "\u2013";
  at("unit").textContent = has ? frame.unit : "";
  overTime(frame, lasting);
  const flags = [];
  if (frame.rung) flags.push("fallback " + frame.rung + " answers, not the chosen artefact");
  if (frame.border && has) flags.push("touches the border: too small");
  if (!frame.verified) flags.push("unverified artefact");
  if (frame.degraded) flags.push("degraded");
  if (frame.withheld) flags.push("withheld: too late");
  else if (frame.stale) flags.push("late");
  if (frame.error) flags.push(frame.error);
  else if (!frame.valid && !frame.withheld) flags.push("not valid");
  at("flags").textContent = flags.join(", ");
}

// beside the reading of this very frame, never instead of it; a held one comes when the frame itself gave none
function overTime(frame, lasting) {
  const said = frame.smoothed, words = [];
  if (said && !frame.withheld && !frame.stale && (lasting || said.held)) {
    if (said.hc_mm !== null) {
      const held = said.held ? "HELD for " + said.held_ms.toFixed(0) + " ms: " : "";
      words.push(held + "smoothed " + said.hc_mm.toFixed(1) + " mm");
    }
    if (frame.mask_smoothed) words.push("mask smoothed");
  }
  if (said && said.flicker !== null) {
    words.push("flicker " + (100 * said.flicker).toFixed(1) + " %, smoothed " + (100 * said.flicker_smoothed).toFixed(1) + " %");
  }
  at("smoothed").textContent = words.join(", ");
}

function happened(events) {
  at("events").hidden = !events.length;
  at("events").replaceChildren(...events.map((event) => {
    const item = document.createElement("li");
    item.textContent = event.kind.replaceAll("_", " ") + ", " + (event.ago_ms / 1000).toFixed(0) + " s ago: " + event.reason;
    return item;
  }));
}

function count(header) {
  const rows = [["results", header.results]], counters = header.counters;
  if (counters) {
    rows[0] = ["received", counters.received];
    rows.push(["answered", counters.processed]);
    for (const [name, number] of Object.entries(DROPS)) {
      if (name !== "closing" || counters.dropped[name]) rows.push([number, counters.dropped[name] || 0]);
    }
    for (const [name, number] of Object.entries(counters.rejected)) rows.push(["refused: " + name.replaceAll("_", " "), number]);
    for (const [name, number] of Object.entries(counters.source)) rows.push(["source: " + name.replaceAll("_", " "), number]);
    at("balance").textContent = counters.balanced ? "every frame accounted for" : "counters do not add up";
  }
  at("counts").replaceChildren(...rows.flatMap(([name, number]) => {
    const term = document.createElement("dt"), value = document.createElement("dd");
    term.textContent = name;
    value.textContent = number;
    return [term, value];
  }));
  at("skipped").textContent = header.skipped ? header.skipped + " frames were not drawn by this browser." : "";
}

function charts(budget) {
  const ages = trend.map((point) => point[3]).filter((age) => age !== null);
  const latencies = trend.map((point) => point[4]).filter((latency) => latency !== null);
  at("age-now").textContent = middle(ages);
  at("latency-now").textContent = middle(latencies);
  line(at("trend"), trend);
  bars(at("ages"), ages, budget, "#46dcff");
  bars(at("latencies"), latencies, null, "#3ddc84");
}

function middle(values) {
  if (!values.length) return "";
  const sorted = values.slice().sort((a, b) => a - b), pick = (q) => sorted[Math.min(sorted.length - 1, Math.floor(q * sorted.length))];
  return "p50 " + pick(0.5).toFixed(1) + ", p99 " + pick(0.99).toFixed(1) + " ms";
}

function surface(canvas) {
  const scale = window.devicePixelRatio || 1, w = canvas.clientWidth, h = canvas.clientHeight;
  canvas.width = Math.round(w * scale);
  canvas.height = Math.round(h * scale);
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  context.font = "12px system-ui, sans-serif";
  context.fillStyle = "#9fb0c2";
  return [context, w, h];
}

function line(canvas, points) {
  const [context, w, h] = surface(canvas), values = points.map((point) => point[2]);
  const known = values.filter((value) => value !== null);
  if (!known.length) {
    context.fillText("nothing to show yet", 4, h / 2);
    return;
  }
  let low = Math.min(...known), high = Math.max(...known);
  const pad = Math.max(0.08 * (high - low), 0.5);
  low -= pad;
  high += pad;
  const x = (i) => 40 + (w - 48) * (points.length > 1 ? i / (points.length - 1) : 1);
  const y = (value) => h - 16 - (h - 24) * (value - low) / (high - low);
  context.fillText(high.toFixed(0), 4, 14);
  context.fillText(low.toFixed(0), 4, h - 14);
  const spanS = (points[points.length - 1][1] - points[0][1]) / 1000;
  context.fillText("last " + spanS.toFixed(0) + " s", w - 66, h - 2);
  context.strokeStyle = "#ffcd3c";
  context.lineWidth = 1.6;
  context.beginPath();
  let pen = false;
  values.forEach((value, i) => {
    if (value === null) { pen = false; return; }
    if (pen) context.lineTo(x(i), y(value)); else { context.moveTo(x(i), y(value)); context.lineTo(x(i) + 0.1, y(value)); }
    pen = true;
  });
  context.stroke();
}

function bars(canvas, values, limit, colour) {
  const [context, w, h] = surface(canvas);
  if (!values.length) {
    context.fillText("nothing measured yet", 4, h / 2);
    return;
  }
  const sorted = values.slice().sort((a, b) => a - b);
  const top = Math.max(sorted[Math.floor(0.995 * (sorted.length - 1))] * 1.1, (limit || 0) * 1.1, 1);
  const bins = new Array(40).fill(0);
  for (const value of values) bins[Math.min(39, Math.floor(40 * value / top))] += 1;
  const tall = Math.max(...bins), bar = w / 40;
  context.fillStyle = colour;
  bins.forEach((number, i) => { if (number) context.fillRect(i * bar + 1, (h - 18) * (1 - number / tall), bar - 2, (h - 18) * number / tall); });
  context.fillStyle = "#9fb0c2";
  context.fillText("0", 0, h - 4);
  const end = top.toFixed(0) + " ms";
  context.fillText(end, w - context.measureText(end).width, h - 4);
  if (limit) {
    const x = w * limit / top;
    context.fillStyle = "#ffb020";
    context.fillRect(x - 1, 0, 2, h - 16);
    const words = "budget " + limit.toFixed(0);
    context.fillText(words, Math.min(Math.max(20, x - 20), w - 150), h - 4);
  }
}

function toggle(button, name) {
  button.addEventListener("click", () => {
    want[name] = !want[name];
    button.setAttribute("aria-pressed", String(want[name]));
    draw();
  });
}

toggle(at("toggle-mask"), "mask");
toggle(at("toggle-ellipse"), "ellipse");
at("fullscreen").addEventListener("click", () => {
  if (document.fullscreenElement) document.exitFullscreen(); else at("stage").requestFullscreen();
});
setInterval(() => {
  // the program tells its state several times a second; silence means that nothing here is true any more
  if (socket && socket.readyState === WebSocket.OPEN && performance.now() - heard > SILENCE_MS) { say("offline"); withdraw(); }
}, 250);
window.livePage = page;
connect();
