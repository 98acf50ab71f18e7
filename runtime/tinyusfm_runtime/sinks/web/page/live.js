// The live page: draws what arrives over one WebSocket, and takes an overlay off when it is too old.
// Messages are defined in live_page.py. Nothing is stored, nothing is fetched from elsewhere.
"use strict";

const WORDS = {
  connecting: "waiting for the program",
  live: "frames arrive and answers are in time",
  stale: "late: what is shown is not what the probe sees now",
  frozen: "the link is alive but the image does not change",
  lost: "no frames: the source is gone",
  degraded: "not answered by the chosen artefact, or not in time",
  ended: "the source has ended",
  offline: "no connection to the program: start it again with the same command; this page finds it by itself",
};
const DROPS = {
  overtaken: "overtaken", out_of_order: "out of order", duplicate: "duplicate", closing: "at the end",
};
const TREND = 600;
const SILENCE_MS = 1500;
const STILL_MS = 3000;
const at = (id) => document.getElementById(id);
const frameCanvas = at("frame"), overlayCanvas = at("overlay");
const frameContext = frameCanvas.getContext("2d"), overlayContext = overlayCanvas.getContext("2d");
let trend = [], socket = null, heard = 0, shown = null, expiry = 0, overlayMs = 1000, image = null, order = Promise.resolve();
const want = { mask: true, ellipse: true }, seen = { mask: false, ellipse: false };
const page = { state: "connecting", overlay: false, frames: 0, messages: 0, results: 0, unshown: 0, fault: "" };
let drawnAt = performance.now(), resultsThen = 0;

function connect() {
  const base = location.href.split(/[?#]/)[0].replace(/^http/, "ws");
  socket = new WebSocket(base + "ws" + location.search);
  socket.binaryType = "arraybuffer";
  // one after the other: an image that decodes faster must not overtake the one before it
  // one that cannot be drawn must not hold up those behind it
  socket.onmessage = (event) => { order = order.then(() => receive(event.data)).catch((error) => failed(String(error))); };
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
  page.unshown = header.unshown.count;
  if (header.unshown.newest) failed(header.unshown.newest);
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
  if (page.fault) words.push(page.fault);
  if (shown && !page.overlay) words.push(shown.error && !shown.models ? "no answer" : "overlay withdrawn");
  at("notice").hidden = !words.length;
  at("notice").textContent = words.join(": ");
}

function failed(reason) {
  page.fault = "the newest frame cannot be shown (" + reason + "), this is an older one";
  withdraw();
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
  drawnAt = received;
  resultsThen = header.results;
  page.fault = "";
  page.frames += 1;
  const left = overlayMs - (frame.age_ms ?? 0) - (performance.now() - received);
  const valid = frame.models ? frame.models.some((one) => one.valid) : frame.valid;
  const lasting = valid && !frame.stale && !frame.withheld && left > 0 && !["lost", "stale", "ended"].includes(page.state);
  if (lasting) {
    image = { frame, mask };
    draw();
    clearTimeout(expiry);
    expiry = setTimeout(withdraw, left);
  } else withdraw();
  fit("mask", mask.length > 0);
  fit("ellipse", (frame.models || [frame]).some((one) => one.ellipse));
  read(frame, lasting);
  models(frame.models || [], lasting);
  at("engine").textContent = frame.engine + (frame.level ? " (fallback " + frame.level + ")" : "");
  const size = frame.full[0] + " x " + frame.full[1];
  at("frame-facts").textContent = "frame " + frame.seq + ", " + size + (frame.width === frame.full[0] ? "" : ", shown at " + frame.width);
}

// a button is there once the model has given what it switches
function fit(name, given) {
  seen[name] = seen[name] || given;
  at("toggle-" + name).hidden = !seen[name];
}

function withdraw() {
  clearTimeout(expiry);
  overlayContext.clearRect(0, 0, overlayCanvas.width, overlayCanvas.height);
  image = null;
  page.overlay = false;
  at("reading").textContent = "\u2013";
  at("unit").textContent = "";
  at("smoothed").textContent = "";
  for (const number of document.querySelectorAll(".model .number")) number.textContent = "\u2013";
  notice();
}

function draw() {
  if (!image) return;
  const { frame, mask } = image, w = frame.width, h = frame.height;
  overlayContext.clearRect(0, 0, w, h);
  // of several models each mask and ellipse has a colour of its own; ABGR of the outline, CSS of the ellipse
  let begin = 0;
  const parts = (frame.models || [{ ...frame, mask_bytes: mask.length }]).map((one, i) => {
    const bits = mask.subarray(begin, begin + one.mask_bytes);
    begin += one.mask_bytes;
    return { one, bits, colour: COLOURS[i % COLOURS.length] };
  });
  if (want.mask && mask.length) outlines(parts, w, h);
  if (want.ellipse) for (const part of parts) if (part.one.ellipse) curve(part, w, h, !frame.models);
  page.overlay = true;
  notice();
}

const COLOURS = [[0xffdc46, "#46dcff"], [0xdc8cff, "#ff8cdc"], [0x8cff8c, "#8cff8c"], [0x5aaaff, "#ffaa5a"]];

function outlines(parts, w, h) {
  const image = overlayContext.createImageData(w, h), cells = new Uint32Array(image.data.buffer);
  for (const { bits, colour } of parts) {
    if (!bits.length) continue;
    const bit = (i) => (bits[i >> 3] >> (7 - (i & 7))) & 1;
    const wide = Math.max(1, Math.round(Math.min(w, h) / 320));
    for (let y = 0, i = 0; y < h; y += 1) {
      for (let x = 0; x < w; x += 1, i += 1) {
        if (!bit(i)) continue;
        const edge = x < wide || y < wide || x >= w - wide || y >= h - wide
          || !bit(i - wide) || !bit(i + wide) || !bit(i - wide * w) || !bit(i + wide * w);
        cells[i] = ((edge ? 0xff000000 : 0x20000000) | colour[0]) >>> 0;
      }
    }
  }
  overlayContext.putImageData(image, 0, 0);
}

function curve({ one, colour }, w, h, only) {
  overlayContext.beginPath();
  for (const [x, y] of one.ellipse) overlayContext.lineTo(x, y);
  overlayContext.closePath();
  const dash = Math.max(4, Math.min(w, h) / 40);
  overlayContext.setLineDash(one.reading === "doubtful" ? [dash, dash] : []);
  overlayContext.strokeStyle = only ? "#ffcd3c" : colour[1];
  overlayContext.lineWidth = Math.max(1.4, Math.min(w, h) / 200);
  overlayContext.stroke();
  overlayContext.setLineDash([]);
}

// of several models what each says: its name and state, its reading, and why there is none
function models(said, lasting) {
  at("models").hidden = !said.length;
  document.body.classList.toggle("several", said.length > 0);
  at("models").replaceChildren(...said.map((one, i) => {
    const card = document.createElement("div"), parts = [];
    const part = (tag, name, text) => {
      const made = document.createElement(tag);
      made.className = name;
      made.textContent = text;
      parts.push(made);
      return made;
    };
    const shows = lasting || (one.valid && !one.stale && !one.withheld);
    card.className = "card model model-" + (i % COLOURS.length + 1);
    card.dataset.state = one.skipped ? "skipped" : one.state;
    card.dataset.model = one.model;
    const head = part("h2", "", one.model + (one.name && one.name !== one.model ? ": " + one.name : ""));
    const state = document.createElement("span");
    state.className = "aside own-state";
    state.textContent = one.skipped ? "SKIPPED" : one.state.toUpperCase();
    head.append(state);
    const has = shows && one.value !== null;
    part("p", "number", has ? one.value.toFixed(one.unit === "px" ? 0 : 1) + " " + one.unit
      : shows && one.found === false ? one.none || "nothing" : "\u2013");
    if (one.skipped) part("p", "why", one.skipped);
    else part("p", "flags", flagsOf(one, shows).join(", "));
    part("p", "why", one.engine + (one.level ? " (fallback " + one.level + ")" : ""));
    card.append(...parts);
    return card;
  }));
}

function read(frame, lasting) {
  at("reading-name").textContent = frame.models ? frame.models[0].model + ": " + (frame.name || "reading") : frame.name || "Reading";
  const digits = frame.unit === "px" ? 0 : 1;
  const has = lasting && frame.value !== null;
  at("reading").textContent = has ? frame.value.toFixed(digits) : lasting && frame.found === false ? frame.none || "nothing" : "\u2013";
  at("unit").textContent = has ? frame.unit : "";
  overTime(frame, lasting);
  at("flags").textContent = flagsOf(frame, lasting).join(", ");
}

function flagsOf(frame, lasting) {
  const flags = [];
  if (frame.level) flags.push("fallback " + frame.level + " answers, not the chosen artefact");
  if (lasting) flags.push(...trust(frame));
  if (!frame.verified) flags.push("unverified artefact");
  if (frame.degraded) flags.push("degraded");
  if (frame.withheld) flags.push("withheld: too late");
  else if (frame.stale) flags.push("late");
  if (frame.error) flags.push(frame.error);
  else if (frame.skipped) flags.push("skipped: " + frame.skipped);
  else if (!frame.valid && !frame.withheld) flags.push("not valid");
  return flags;
}

const AGAINST = {
  confidence: "low confidence", agreement: "mask and ellipse disagree", border: "touches the border: too small",
  sector: "cut by the field of view: too small", size: "size not plausible", spacing: "spacing not plausible",
  drift: "unlike the calibration frames",
};

// how far the reading may be trusted, and what else was measured
function trust(frame) {
  const words = [];
  if (frame.reading === "doubtful") words.push("DOUBTFUL");
  words.push(...frame.reasons.map((reason) => AGAINST[reason] || reason));
  if (frame.border && !frame.reasons.includes("border") && !frame.reasons.includes("sector")) words.push(AGAINST.border);
  if (frame.reading === "unchecked") words.push("reading unchecked");
  if (frame.confidence !== null) words.push("confidence " + (100 * frame.confidence).toFixed(0) + " %");
  if (frame.drift_status !== "checked") words.push("drift: " + frame.drift_status);
  if (frame.second_pass === "off") words.push("second pass off");
  for (const row of frame.labels.slice(1)) words.push(row.label + ": " + (row.found ? row.reading + ", " + area(row) : "not found"));
  for (const [label, share] of frame.classes.slice(0, 6)) words.push(label + " " + (100 * share).toFixed(1) + " %");
  return words;
}

function area(row) {
  return row.area_mm2 === null ? row.area_px.toFixed(0) + " px" : row.area_mm2.toFixed(0) + " mm\u00b2";
}

// where each label lies, for whoever points at the reading
function places(frame) {
  const found = frame.labels.filter((row) => row.found);
  return found.map((row) => row.label + ": area " + area(row) + ", box " + row.box_px.slice(2).map((side) => side.toFixed(0)).join(" x ") +
    " at row " + row.box_px[0].toFixed(0) + ", column " + row.box_px[1].toFixed(0) + ", centre " +
    row.centroid_px.map((place) => place.toFixed(0)).join(", ") + (row.touches_border ? ", at the border" : "")).join("\n");
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
  const skipped = header.skipped ? header.skipped + " frames were not drawn by this browser. " : "";
  at("skipped").textContent = skipped + (header.unshown.count ? header.unshown.count + " frames could not be shown." : "");
}

let budgetMs = null;
function charts(budget) {
  budgetMs = budget;
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
  const top = Math.max(Math.max(...values) * 1.02, (limit || 0) * 1.1, 1);
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
// charts are drawn for the size they have
window.addEventListener("resize", () => { if (trend.length) charts(budgetMs); });
setInterval(() => {
  // the program tells its state several times a second; silence means that nothing here is true any more
  if (socket && socket.readyState === WebSocket.OPEN && performance.now() - heard > SILENCE_MS) { say("offline"); withdraw(); }
  else if (shown && page.results > resultsThen && performance.now() - drawnAt > STILL_MS && !page.fault) {
    page.fault = "the image stands still while results go on: it is " + STILL_MS / 1000 + " s old or more";
    withdraw();
  }
}, 250);
window.livePage = page;
connect();
