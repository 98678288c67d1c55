"use strict";
// All text of files and answers goes through textContent: a hostile name of a video is only a name.
const el = (id) => document.getElementById(id);
const PAGE = 24, MOST = 200;
const state = { top: PAGE, moment: null, sides: [], library: null, current: null, playing: null, follow: 0, saving: Promise.resolve(), loop: true, hands: true,
  chart: null, cursor: 0, request: null, opening: 0 };

function clock(second, digits = 1) {
  const tenths = Math.round(second * 10), pad = (n) => String(n).padStart(2, "0");
  const hours = Math.floor(tenths / 36000), minutes = Math.floor(tenths / 600) % 60;
  const front = hours ? `${hours}:${pad(minutes)}` : minutes;
  return `${front}:${pad(Math.floor(tenths / 10) % 60)}${digits ? `.${tenths % 10}` : ""}`;
}
const thumbnail = (hit) => `/thumbnail/${hit.side}/${hit.row}?${state.library.started}`;
const span = (hit) => hit.end === null ? "whole video" : `${clock(hit.start)} – ${clock(hit.end)}`;

function seconds(text) {
  // "1:02:03.5", "2:03" and "123" are all times; null for none.
  if (!/^[0-9]+(:[0-9]+){0,2}(\.[0-9]+)?$/.test(text.trim())) return null;
  return text.trim().split(":").reduce((total, part) => total * 60 + Number(part), 0);
}

async function get(path, parameters = {}, options = {}) {
  const query = new URLSearchParams(Object.entries(parameters).filter(([, value]) => value !== null && value !== ""));
  return answerOf(fetch(`${path}?${query}`, options));
}

async function answerOf(sent) {
  const reply = await sent.catch((error) => {
    throw error.name === "AbortError" ? error : new Error("egohod serve does not answer; has it ended?");
  });
  const content = await reply.json().catch(() => ({})); // of a proxy between, or of a fault
  if (!reply.ok) throw new Error(content.error || `${reply.status} ${reply.statusText}`);
  return content;
}

// --- Query ---

const queryOf = () => state.moment ? { side: state.moment.side, row: state.moment.row } : { q: el("q").value.trim() };

function filters() {
  const [from, to] = ["from", "to"].map((name) => {
    const second = seconds(el(name).value), wrong = second === null && el(name).value.trim() !== "";
    el(name).setAttribute("aria-invalid", String(wrong));
    if (wrong) el("filters").open = true;
    return second;
  });
  const values = { video: el("video").value.trim(), from, to, overlapping: el("overlapping").checked || null };
  el("filters").classList.toggle("active", Object.values(values).some((value) => value));
  return values;
}

async function search(more = false) {
  state.top = more ? Math.min(state.top + PAGE, MOST) : PAGE;
  const query = queryOf(), parameters = { ...query, ...filters(), top: state.top };
  state.request?.abort();
  const request = state.request = new AbortController();
  el("status").textContent = "Searching…";
  // A reload, and another tab with this address, searches the same again.
  const hash = new URLSearchParams(Object.entries(parameters).filter(([name, value]) => value && name !== "top"));
  history.replaceState(null, "", `#${hash}`);
  let answer;
  try {
    answer = await get("/api/search", parameters, { signal: request.signal });
  } catch (error) {
    if (error.name !== "AbortError") el("status").textContent = `No answer: ${error.message}`;
    return;
  }
  performance.mark("answer");
  state.sides = answer.sides.map((side) => side.hits);
  if (query.q && !more) el("label").value = query.q;
  render(answer, Boolean(query.q || state.moment));
  requestAnimationFrame(() => setTimeout(() => performance.measure("first result", "answer")));
  return answer;
}

function render(answer, ranked) {
  const columns = answer.sides.map((side, number) => column(side, number, ranked));
  el("columns").replaceChildren(...columns);
  el("columns").classList.toggle("two", columns.length > 1);
  const count = Math.max(0, ...state.sides.map((hits) => hits.length));
  el("more").hidden = count < state.top || state.top >= MOST;
  let text = ranked ? `${count} moment${count === 1 ? "" : "s"}` : "Some of your moments. Type what you look for.";
  if (answer.seconds) {
    const [encode, find] = [answer.seconds.encode, answer.seconds.search].map((value) => Math.round(value * 1000));
    text += `, ${find} ms to rank ${state.library.sides.map((side) => side.moments.toLocaleString("en")).join(" + ")}` +
      (encode > 1 ? `, ${encode} ms to read the sentence` : "");
  }
  if (document.querySelector("#filters [aria-invalid=true]")) text = `Not a time, so not a filter (times are 1:02:03, 2:03.5 or 123). ${text}`;
  el("status").textContent = text;
  const first = document.querySelector(".card");
  if (first) first.tabIndex = 0;
}

function column(side, number, ranked) {
  const box = document.createElement("div"), grid = document.createElement("div");
  box.className = "column";
  if (state.library.sides.length > 1) {
    const head = document.createElement("h2");
    head.textContent = state.library.sides[number].name;
    box.append(head);
  }
  if (side.error || !side.hits.length) {
    const empty = document.createElement("p");
    empty.className = "empty";
    empty.textContent = side.error ? `No answer here: ${side.error}` : "No moment fits the filter.";
    box.append(empty);
    return box;
  }
  grid.className = "grid";
  grid.setAttribute("role", "listbox");
  grid.setAttribute("aria-label", state.library.sides[number].name);
  const values = side.hits.map((hit) => hit.similarity), low = Math.min(...values), high = Math.max(...values);
  grid.append(...side.hits.map((hit, place) => {
    const card = el("card").content.firstElementChild.cloneNode(true), part = (name) => card.querySelector(name);
    card.hit = hit;
    card.tabIndex = -1;
    const image = part("img");
    image.addEventListener("load", () => image.classList.toggle("strip", image.naturalWidth > 2 * image.naturalHeight));
    image.src = thumbnail(hit);
    part(".rank").textContent = ranked ? place + 1 : "";
    part(".rank").hidden = !ranked;
    // Relative to the shown ones: the range of similarities differs between sentences and checkpoints.
    part(".bar i").style.width = ranked ? `${25 + 75 * (hit.similarity - low) / Math.max(high - low, 1e-6)}%` : "0";
    part(".name").textContent = hit.video;
    part(".name").title = hit.video;
    part(".when").textContent = span(hit) + (ranked ? ` · ${hit.similarity.toFixed(3)}` : "");
    part(".text").textContent = hit.text;
    part(".other").textContent = ranked ? elsewhere(hit) : "";
    card.dataset.name = [`${ranked ? `${place + 1}. ` : ""}${hit.video}`, span(hit), hit.text].filter(Boolean).join(", ");
    card.setAttribute("aria-selected", "false");
    card.addEventListener("click", () => { select(card); play(hit); });
    card.addEventListener("focus", () => select(card));
    showMark(card);
    return card;
  }));
  box.append(grid);
  return box;
}

function elsewhere(hit) {
  if (state.sides.length < 2) return "";
  const end = (each) => each.end ?? Infinity;
  const place = state.sides[1 - hit.side].findIndex((each) =>
    each.video === hit.video && each.start < end(hit) && hit.start < end(each));
  return place < 0 ? "only here" : `number ${place + 1} in ${state.library.sides[1 - hit.side].name}`;
}

// --- Selection ---

const cards = () => [...document.querySelectorAll(".card")];
const selected = () => document.querySelector(".card[aria-selected=true]");

function select(card, focus = false) {
  const last = selected();
  if (last !== card) {
    for (const each of cards()) { each.setAttribute("aria-selected", String(each === card)); each.tabIndex = each === card ? 0 : -1; }
    state.current = card.hit;
    showMarks();
    // An open player follows, unless the next one is selected at once.
    clearTimeout(state.follow);
    if (!el("panel").hidden) state.follow = setTimeout(() => play(card.hit), 200);
  }
  if (!focus) return;
  card.focus({ preventScroll: true });
  card.scrollIntoView({ block: "nearest" });
}

function step(by) {
  const all = cards(), card = selected();
  const group = card ? [...card.parentElement.children] : all;
  const next = group[card ? group.indexOf(card) + by : 0];
  if (next) select(next, true);
}

function move(dx, dy) {
  // The nearest card in that direction; sideways at the end of a line the next one.
  const card = selected();
  if (!card) return step(1);
  const from = card.getBoundingClientRect();
  let best = null, least = Infinity;
  for (const each of cards()) {
    const to = each.getBoundingClientRect(), x = to.left - from.left, y = to.top - from.top;
    if (each === card || dx * x + dy * y < 8 || (dx && Math.abs(y) > from.height / 2)) continue;
    const distance = dx ? Math.abs(x) : Math.abs(y) * 3 + Math.abs(x);
    if (distance < least) [best, least] = [each, distance];
  }
  if (best) select(best, true);
  else if (dx) step(dx);
}

// --- Player ---

const player = el("player");
const base = () => state.playing ? state.playing.base : 0;

async function play(hit) {
  clearTimeout(state.follow);
  const number = ++state.opening;
  state.current = hit;
  el("panel").hidden = false;
  document.querySelector("main").classList.add("playing");
  el("title").textContent = hit.video;
  el("times").textContent = span(hit);
  showMarks();
  chart(hit);
  if (innerWidth <= 900) el("panel").scrollIntoView({ block: "start" });
  let moment;
  try {
    moment = await get(`/api/moment/${hit.side}/${hit.row}`);
  } catch (error) {
    moment = { ...hit, error: error.message };
  }
  if (number !== state.opening) return; // another one was opened meanwhile
  el("unplayable").hidden = !moment.error;
  el("unplayable").textContent = moment.error || "";
  el("narration").hidden = true;
  if (moment.error) {
    state.playing = null;
    player.pause();
    player.removeAttribute("src");
    player.load();
    el("note").hidden = true;
    return;
  }
  el("tracks").hidden = !moment.tracks.length;
  start(moment, !moment.file);
}

function start(moment, converted) {
  const source = converted ? moment.stretch : moment.file, last = state.playing;
  const playing = { ...moment, converted, base: converted ? moment.stretch_start : moment.file_start };
  // Of the same file only the time changes.
  const same = last && !converted && !last.converted && last.video === moment.video && last.side === moment.side &&
    last.base === playing.base && player.readyState > 0;
  state.playing = playing;
  setLoop(true);
  el("note").hidden = !converted;
  el("note").textContent = converted ? `A converted stretch without sound: ${moment.why || "the browser does not play the file"}.` : "";
  if (!same) player.src = source;
  player.currentTime = Math.max(0, moment.start - playing.base);
  player.play().catch(() => {}); // a browser may want a click first
}

player.addEventListener("error", () => {
  // What the header promised the browser may still not play.
  if (state.playing && !state.playing.converted && player.hasAttribute("src")) start(state.playing, true);
  else if (state.playing) {
    el("unplayable").hidden = false;
    el("unplayable").textContent = "The browser cannot play this video.";
  }
});
player.addEventListener("seeking", () => {
  const moment = state.playing, second = player.currentTime + base();
  if (moment && (second < moment.start - 0.5 || second > moment.end + 0.5)) setLoop(false);
});

function setLoop(on) {
  state.loop = on;
  el("looping").setAttribute("aria-pressed", String(on));
}

function frame() {
  requestAnimationFrame(frame);
  const moment = state.playing;
  if (!moment || el("panel").hidden || !player.readyState) return;
  const second = player.currentTime + moment.base;
  if (state.loop && (second >= moment.end - 0.03 || player.ended) && !player.seeking) {
    player.currentTime = Math.max(0, moment.start - moment.base);
    if (player.ended) player.play().catch(() => {});
  }
  cursorAt(".at", second);
  hands(second);
}

// --- Similarity over time ---

const SVG = "http://www.w3.org/2000/svg";
function shape(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

async function chart(hit) {
  // Without a query the moment itself is one.
  let query = queryOf();
  if (query.q === "") query = { side: hit.side, row: hit.row };
  let content;
  try {
    content = await get("/api/chart", { video_side: hit.side, video_row: hit.row, ...query });
  } catch { content = { lines: [], end: 0 }; } // not the chart of another video
  if (state.current !== hit) return;
  const points = content.lines.flat(), values = points.map((point) => point[1]);
  const low = Math.min(...values), high = Math.max(...values), end = Math.max(content.end, 0.1);
  state.chart = { hit, end };
  el("chart-figure").hidden = points.length < 2;
  const at = ([second, value]) => `${(600 * second / end).toFixed(1)} ${(112 - 104 * (value - low) / Math.max(high - low, 1e-6)).toFixed(1)}`;
  const lines = content.lines.map((line, number) => line.length < 2 ? null :
    shape("path", { d: `M${line.map(at).join("L")}`, class: number ? "second" : "first" }));
  const area = shape("rect", { x: 600 * hit.start / end, width: Math.max(2, 600 * ((hit.end ?? end) - hit.start) / end), y: 0, height: 120 });
  const line = (name) => shape("line", { class: name, x1: 0, x2: 0, y1: 0, y2: 120, visibility: "hidden" });
  el("chart").replaceChildren(area, ...lines.filter(Boolean), line("cursor"), line("at"));
  const best = points[values.indexOf(high)];
  el("chart-text").textContent = best ? `Similarity over ${clock(end, 0)}; highest ${high.toFixed(3)} at ${clock(best[0])}. Click to jump.` : "";
  state.cursor = hit.start;
  el("chart").setAttribute("aria-valuemin", "0");
  el("chart").setAttribute("aria-valuemax", end.toFixed(1));
  showCursor(false);
}

function cursorAt(name, second) {
  const line = el("chart").querySelector(name), x = state.chart ? 600 * second / state.chart.end : 0;
  if (!line) return;
  for (const each of ["x1", "x2"]) line.setAttribute(each, x.toFixed(2));
  line.setAttribute("visibility", "visible");
}

function showCursor(visible = true) {
  el("chart").setAttribute("aria-valuenow", state.cursor.toFixed(1));
  el("chart").setAttribute("aria-valuetext", clock(state.cursor));
  if (visible) cursorAt(".cursor", state.cursor);
}

async function jump(second) {
  if (!state.chart) return;
  const { side, row } = state.chart.hit;
  try {
    // The moment there is what is marked, looped and looked up next.
    play(await get("/api/at", { video_side: side, video_row: row, second }));
  } catch (error) {
    el("status").textContent = `No answer: ${error.message}`;
  }
}

const secondOf = (event) => {
  const area = el("chart").getBoundingClientRect();
  return Math.min(1, Math.max(0, (event.clientX - area.left) / area.width)) * (state.chart?.end ?? 0);
};
el("chart").addEventListener("click", (event) => jump(secondOf(event)));
el("chart").addEventListener("pointermove", (event) => { state.cursor = secondOf(event); showCursor(); });
el("chart").addEventListener("keydown", (event) => {
  if (!state.chart) return;
  const steps = { ArrowLeft: -1, ArrowRight: 1, PageDown: -10, PageUp: 10 }, end = state.chart.end;
  if (event.key in steps) state.cursor = Math.min(end, Math.max(0, state.cursor + steps[event.key] * end / 100));
  else if (event.key === "Home" || event.key === "End") state.cursor = event.key === "Home" ? 0 : end;
  else if (event.key === "Enter") jump(state.cursor);
  else return;
  showCursor();
  event.preventDefault();
  event.stopPropagation();
});

// --- Hands and objects ---

function hands(second) {
  const svg = el("overlay"), moment = state.playing;
  const clip = state.hands && moment.tracks.find((each) => each.start <= second && second <= each.end);
  el("narration").hidden = !(clip && clip.text);
  el("narration").textContent = clip ? clip.text : "";
  if (!clip || !player.videoWidth) { if (svg.firstChild) svg.replaceChildren(); return; }
  // The picture is letterboxed within the player.
  const scale = Math.min(player.clientWidth / player.videoWidth, player.clientHeight / player.videoHeight);
  const [width, height] = [player.videoWidth * scale, player.videoHeight * scale];
  Object.assign(svg.style, { width: `${width}px`, height: `${height}px`,
    left: `${(player.clientWidth - width) / 2}px`, top: `${(player.clientHeight - height) / 2}px` });
  const shapes = [];
  for (const [role, path] of Object.entries(clip.paths)) {
    for (const [name, until] of [["future", Infinity], ["", second]]) {
      const points = path.filter((point, i) => clip.times[i] <= until && point[0] !== null && point[1] !== null);
      if (points.length > 1) shapes.push(shape("path", { class: `path ${role} ${name}`, d: `M${points.map(([x, y]) => `${1000 * x} ${1000 * y}`).join("L")}` }));
    }
  }
  const nearest = Math.min(...clip.boxes.map((box) => Math.abs(box.second - second)));
  for (const box of clip.boxes) {
    if (Math.abs(box.second - second) > nearest + 1e-3 || nearest > 0.5) continue;
    const [left, top, right, bottom] = box.edges.map((edge) => 1000 * edge);
    shapes.push(shape("rect", { class: `box ${box.role} ${box.touches ? "touch" : ""}`, x: left, y: top, width: right - left, height: bottom - top }));
  }
  svg.replaceChildren(...shapes);
}

// --- Marks ---

const same = (a, b) => a && b && a.video === b.video && a.start === b.start && a.end === b.end;
const markOf = (hit) => hit?.marks[el("label").value.trim()] ?? null;

function showMark(card) {
  const mark = markOf(card.hit), badge = card.querySelector(".badge");
  card.classList.toggle("right", mark === "right");
  card.classList.toggle("wrong", mark === "wrong");
  badge.hidden = !mark;
  badge.textContent = mark === "right" ? "✓" : "✗";
  card.setAttribute("aria-label", card.dataset.name + (mark ? `, marked as ${mark}` : ""));
}

function showMarks() {
  cards().forEach(showMark);
  const mark = markOf(state.current);
  for (const name of ["right", "wrong"]) el(name).setAttribute("aria-pressed", String(mark === name));
}

function counts(values) {
  el("counts").textContent = `${values.right} right, ${values.wrong} wrong`;
}

function mark(kind) {
  const hit = state.current, label = el("label").value.trim();
  if (!hit) return;
  if (!label) {
    el("panel").hidden = false;
    document.querySelector("main").classList.add("playing");
    el("label").focus();
    el("status").textContent = "Type a label first: what is right or wrong for this moment.";
    return;
  }
  // One after the other, or a late answer would show the counts of an earlier one.
  state.saving = state.saving.then(() => save(hit, label, kind));
}

async function save(hit, label, kind) {
  const content = { side: hit.side, row: hit.row, label, mark: hit.marks[label] === kind ? null : kind };
  try {
    const answer = await answerOf(fetch("/api/marks", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(content) }));
    for (const each of [hit, state.playing, ...cards().map((card) => card.hit)]) if (same(each, hit)) each.marks = answer.marks;
    counts(answer.counts);
    showMarks();
  } catch (error) {
    el("status").textContent = `Not saved: ${error.message}`;
  }
}

async function refresh() {
  // Marks of other tabs.
  const parameters = { ...queryOf(), ...filters(), top: state.top };
  const [answer, library] = await Promise.all([get("/api/search", parameters), get("/api/library")]);
  const marks = new Map(answer.sides.flatMap((side) => side.hits).map((hit) => [`${hit.side}/${hit.row}`, hit.marks]));
  for (const card of cards()) card.hit.marks = marks.get(`${card.hit.side}/${card.hit.row}`) ?? card.hit.marks;
  counts(library.marks);
  showMarks();
}

// --- Moments as queries ---

function similarTo(hit) {
  state.moment = hit;
  el("q").hidden = Boolean(hit);
  el("chip").hidden = !hit;
  if (hit) {
    el("chip").querySelector("img").src = thumbnail(hit);
    el("chip").querySelector("span").textContent = `like ${hit.video}, ${span(hit)}`;
  }
}

async function searchAndSelect() {
  await search();
  const first = document.querySelector(".card");
  if (first) select(first, true);
}

// --- Events ---

el("search").addEventListener("submit", async (event) => {
  event.preventDefault();
  el("filters").open = false;
  await searchAndSelect();
});
for (const id of ["video", "from", "to", "overlapping"]) el(id).addEventListener("change", () => search());
el("chip").querySelector("button").addEventListener("click", () => { similarTo(null); el("q").focus(); search(); });
el("more").addEventListener("click", async () => {
  const { side, row } = state.current ?? {};
  await search(true);
  const card = cards().find((each) => each.hit.side === side && each.hit.row === row);
  if (card) select(card, true);
});
el("label").addEventListener("input", showMarks);
el("right").addEventListener("click", () => mark("right"));
el("wrong").addEventListener("click", () => mark("wrong"));
el("similar").addEventListener("click", () => { if (state.current) { similarTo(state.current); searchAndSelect(); scrollTo(0, 0); } });
el("looping").addEventListener("click", () => setLoop(!state.loop));
el("tracks").addEventListener("click", () => { state.hands = !state.hands; el("tracks").setAttribute("aria-pressed", String(state.hands)); });
el("help-button").addEventListener("click", () => el("help").showModal());
addEventListener("hashchange", () => location.reload()); // an address that was pasted
document.querySelector(".skip").addEventListener("click", (event) => { // its own target would be such an address
  event.preventDefault();
  (document.querySelector(".card[tabindex='0']") ?? el("results")).focus();
});
document.addEventListener("visibilitychange", () => { if (!document.hidden && state.library) refresh().catch(() => {}); });

const keys = {
  "/": () => { if (state.moment) similarTo(null); el("q").focus(); el("q").select(); },
  "?": () => el("help").showModal(),
  j: () => step(1), k: () => step(-1),
  ArrowDown: () => move(0, 1), ArrowUp: () => move(0, -1), ArrowRight: () => move(1, 0), ArrowLeft: () => move(-1, 0),
  r: () => mark("right"), w: () => mark("wrong"), s: () => el("similar").click(), l: () => el("looping").click(),
  t: () => { if (!el("tracks").hidden) el("tracks").click(); },
  " ": () => { if (player.paused) player.play().catch(() => {}); else player.pause(); },
  Enter: () => { if (selected()) play(selected().hit); },
};
document.addEventListener("keydown", (event) => {
  const target = event.target, typing = target.matches("input:not([type=checkbox])");
  if (event.key === "Escape" && typing) { target.blur(); return; }
  if (typing || event.ctrlKey || event.metaKey || event.altKey || el("help").open || !(event.key in keys)) return;
  const button = target.matches("button, a, summary, input, video");
  // What has a key of its own keeps it: Enter and Space press a button, arrows seek in the player.
  if (button && !target.matches(".card") && ["Enter", " "].includes(event.key)) return;
  if (target.matches("video") && event.key.startsWith("Arrow")) return;
  event.preventDefault();
  // A key that is held down moves on; it does not mark and take back by turns.
  if (!event.repeat || event.key.startsWith("Arrow") || "jk".includes(event.key)) keys[event.key]();
});

async function begin() {
  const library = state.library = await get("/api/library");
  counts(library.marks);
  el("names").append(...library.names.slice(0, 2000).map((name) => { const option = document.createElement("option"); option.value = name; return option; }));
  const gone = [...new Set(library.sides.flatMap((side) => side.missing))], notices = [];
  const why = library.sides.map((side) => side.no_text).find(Boolean);
  if (why) notices.push(`Sentences cannot be searched, only moments (key s): ${why}.`);
  if (gone.length) notices.push(`${gone.length} of the videos ${gone.length === 1 ? "is" : "are"} gone since they were indexed and cannot be shown: ${gone.slice(0, 5).join(", ")}${gone.length > 5 ? ", …" : ""}.`);
  el("notice").hidden = !notices.length;
  el("notice").textContent = notices.join(" ");
  if (library.sides.every((side) => side.no_text)) { el("q").disabled = true; el("q").placeholder = "Choose a moment and press s"; }
  const wanted = new URLSearchParams(location.hash.slice(1));
  el("q").value = wanted.get("q") ?? "";
  el("video").value = wanted.get("video") ?? "";
  for (const name of ["from", "to"]) el(name).value = wanted.has(name) ? clock(Number(wanted.get(name)), 0) : "";
  el("overlapping").checked = wanted.has("overlapping");
  if (wanted.has("row")) {
    const side = Number(wanted.get("side") ?? 0), row = Number(wanted.get("row"));
    await get(`/api/moment/${side}/${row}`).then((hit) => similarTo(hit)).catch(() => {});
  }
  await search();
  requestAnimationFrame(frame);
}
begin().catch((error) => { el("status").textContent = `No answer: ${error.message}`; });
