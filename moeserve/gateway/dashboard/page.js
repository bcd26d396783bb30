// Draws the snapshots that /dashboard/events sends. Text reaches the page as text nodes alone:
// whatever a member calls itself, it stays a name.

const byId = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const ROLES = ["prefill", "unified", "decode", "cache"];
const KEY = "moeserve-key";
const RETRY_MS = [500, 1000, 2000, 4000];
const SILENT_MS = 10000;

// ---------------------------------------------------------------- elements and numbers

function make(name, attributes, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes ?? {})) element.setAttribute(key, value);
  element.append(...children.map((child) => (child instanceof Node ? child : String(child))));
  return element;
}

function draw(name, attributes, ...children) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children.map((child) => (child instanceof Node ? child : String(child))));
  return element;
}

const say = (id, text) => {
  const element = byId(id);
  if (element.textContent !== text) element.textContent = text;
};
const whole = (value) => Math.round(value).toLocaleString("en");
const plural = (count, one, many) => `${whole(count)} ${count === 1 ? one : many ?? one + "s"}`;
const percent = (part, of) => (of > 0 ? `${Math.floor((1000 * part) / of) / 10} %` : "–");
const cut = (text, length) => (text.length > length ? `${text.slice(0, length - 1)}…` : text);

function rate(value) {
  return value >= 100 || value === 0 ? whole(value) : value.toFixed(1);
}

function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let at = 0;
  while (value >= 1024 && at < units.length - 1) [value, at] = [value / 1024, at + 1];
  return `${at && value < 100 ? value.toFixed(1) : whole(value)} ${units[at]}`;
}

function duration(seconds) {
  const [h, m] = [Math.floor(seconds / 3600), Math.floor(seconds / 60) % 60];
  return h ? `${h} h ${m} min` : m ? `${m} min` : `${Math.floor(seconds)} s`;
}

function bar(share, kind) {
  const filled = make("i", { class: kind });
  filled.style.width = `${Math.min(100, Math.max(0, 100 * share))}%`;
  return make("span", { class: "bar", "aria-hidden": "true" }, filled);
}

function table(heads, rows) {
  const numbers = heads.map((head) => head.startsWith("#"));
  const cell = (kind, child, i) => make(kind, numbers[i] ? { class: "number" } : {}, child);
  return make(
    "table", {},
    make("thead", {}, make("tr", {}, ...heads.map((head, i) => cell("th", head.replace("#", ""), i)))),
    make("tbody", {}, ...rows.map((row) => make("tr", {}, ...row.map((child, i) => cell("td", child, i))))),
  );
}

// ---------------------------------------------------------------- panels

const label = (member) => member.instance + (member.ranks > 1 ? ` rank ${member.rank}` : "");
const sum = (members, field) => members.reduce((total, member) => total + member[field], 0);
const used = (members) => sum(members, "total_blocks") - sum(members, "free_blocks");

function showSummary(shot) {
  const newest = shot.points.at(-1);
  const made = newest ? newest.generated_per_s : 0;
  const [running, waiting] = [sum(shot.members, "running"), sum(shot.members, "waiting")];
  const serves = shot.model ? `${shot.member_count === 1 ? "serves" : "serve"} ${shot.model}` : "are there";
  say("model", shot.model);
  say("summary", shot.member_count
    ? `${plural(shot.member_count, "member")} ${serves}, up ${duration(shot.uptime_s)}. ` +
      `${plural(running, "request runs", "requests run")} and ${plural(waiting, "waits", "wait")}. ` +
      `${percent(used(shot.members), sum(shot.members, "total_blocks"))} of the KV blocks are in use.`
    : `Nobody serves yet: the server is ${shot.state}.`);
  const tiles = [
    ["tokens made per second", rate(made), "made"],
    ["requests running", whole(running), "running"],
    ["requests waiting", whole(waiting), "waiting"],
    ["answers under way here", whole(shot.streams), "streams"],
    ["answers in time", percent(shot.attainment.good, shot.attainment.requests), "good"],
    ["state", shot.state, "state"],
  ];
  byId("tiles").replaceChildren(...tiles.map(([text, value, id]) =>
    make("div", {}, make("b", { id: `tile-${id}` }, value), make("span", {}, text))));
}

function showAttainment(slo) {
  say("slo-says", slo.requests
    ? `Of the ${plural(slo.requests, "request")} that ended in the last ${slo.window_s} seconds, ` +
      `${whole(slo.good)} met both objectives and ${whole(slo.failed)} failed.`
    : `No request ended in the last ${slo.window_s} seconds.`);
  const rows = [
    [`first token in ${slo.ttft_s} s`, slo.ttft],
    [`tokens every ${slo.tpot_s} s or less`, slo.tpot],
    ["both", slo.good],
  ];
  byId("slo").replaceChildren(...rows.map(([text, count]) => {
    const share = slo.requests ? count / slo.requests : 0;
    const kind = share >= 0.95 ? "high" : share >= 0.8 ? "mid" : "low";
    return make("div", { class: "meter" },
      make("span", {}, text), bar(share, kind), make("span", {}, percent(count, slo.requests)));
  }));
}

function showRates(points) {
  const top = Math.max(1, ...points.map((p) => Math.max(p.prompt_per_s, p.generated_per_s)));
  const newest = points.at(-1);
  say("rate-says", newest
    ? `Per second: ${rate(newest.generated_per_s)} made (solid), ${rate(newest.prompt_per_s)} of prompts ` +
      `taken in (dashed). The last ${duration(points[0].age_s)}, at most ${rate(top)}.`
    : "The first figures come after ten seconds.");
  const [width, height, left, foot] = [560, 180, 46, 20];
  const x = (age) => width - 4 - ((width - left - 4) * Math.min(age, 600)) / 600;
  const y = (value) => height - foot - ((height - foot - 8) * value) / top;
  const line = (field) => points.map((p) => `${x(p.age_s).toFixed(1)},${y(p[field]).toFixed(1)}`).join(" ");
  const parts = [];
  for (const part of [0, 0.5, 1]) {
    parts.push(draw("line", { class: "grid", x1: left, x2: width, y1: y(top * part), y2: y(top * part) }));
    parts.push(draw("text", { x: left - 6, y: y(top * part) + 4, "text-anchor": "end" }, rate(top * part)));
  }
  for (const [age, text, anchor] of [[600, "10 min ago", "start"], [300, "5 min", "middle"], [0, "now", "end"]])
    parts.push(draw("text", { x: x(age), y: height - 4, "text-anchor": anchor }, text));
  parts.push(draw("polyline", { class: "taken", points: line("prompt_per_s") }));
  parts.push(draw("polyline", { class: "made", points: line("generated_per_s") }));
  byId("rate").replaceChildren(
    draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-labelledby": "rate-says" }, ...parts));
}

const PER_COLUMN = 12;

function showTopology(shot) {
  const columns = ROLES
    .map((role) => [role, shot.members.filter((member) => member.role === role)])
    .filter(([, members]) => members.length);
  const said = columns.map(([role, members]) => `${members.length} ${role}`).join(", ");
  const moving = shot.flows.filter((flow) => flow.bytes_per_s > 0);
  const now = moving.reduce((total, flow) => total + flow.bytes_per_s, 0);
  const all = shot.flows.reduce((total, flow) => total + flow.bytes, 0);
  say("map-says", !shot.member_count ? "" : `${said}. ` + (shot.flow_count
    ? `KV between members: ${bytes(all)} in ${plural(sum(shot.flows, "runs"), "run")} so far, ` +
      `${bytes(now)} per second now. A line is as thick as what moves along it.`
    : "No KV has moved between members."));
  const [step, wide, high] = [210, 150, 46];
  const rows = Math.max(1, ...columns.map(([, members]) => Math.min(members.length, PER_COLUMN + 1)));
  const [width, height] = [Math.max(1, columns.length) * step - (step - wide) + 8, rows * (high + 12) + 26];
  const [places, nodes] = [new Map(), []];
  columns.forEach(([role, members], c) => {
    const left = 4 + c * step;
    nodes.push(draw("text", { x: left, y: 14 }, role));
    members.slice(0, PER_COLUMN).forEach((member, r) => {
      const top = 24 + r * (high + 12);
      places.set(member.id, [left, top + high / 2]);
      const busy = member.role === "cache"
        ? `${percent(member.stored_bytes, member.capacity_bytes)} of ${bytes(member.capacity_bytes)}`
        : `${member.running} run, ${member.waiting} wait`;
      nodes.push(draw("g", {},
        draw("title", {}, `${label(member)}, ${role}${member.draining ? ", draining" : ""}`),
        draw("rect", { class: `node ${role}${member.draining ? " draining" : ""}`, x: left, y: top, width: wide, height: high, rx: 7 }),
        draw("text", { class: "name", x: left + 10, y: top + 19 }, cut(label(member), 19)),
        draw("text", { x: left + 10, y: top + 36 }, busy)));
    });
    if (members.length > PER_COLUMN)
      nodes.push(draw("text", { x: left, y: 24 + PER_COLUMN * (high + 12) + 16 }, `and ${members.length - PER_COLUMN} more`));
  });
  const peak = Math.max(1, ...shot.flows.map((flow) => flow.bytes_per_s));
  const lines = shot.flows.filter((flow) => places.has(flow.source) && places.has(flow.target)).map((flow) => {
    const [[x1, y1], [x2, y2]] = [places.get(flow.source), places.get(flow.target)];
    const right = x2 >= x1;
    const [from, to] = right ? [x1 + wide, x2] : [x1, x2 + wide];
    const bend = x1 === x2 ? 40 : (to - from) / 2;
    const end = x1 === x2 ? from : to;
    return draw("path", {
      class: flow.bytes_per_s > 0 ? "flow moving" : "flow",
      d: `M${from},${y1} C${from + bend},${y1} ${x1 === x2 ? end + bend : end - bend},${y2} ${end},${y2}`,
      "stroke-width": (1 + 6 * Math.sqrt(flow.bytes_per_s / peak)).toFixed(1),
    });
  });
  const picture = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-labelledby": "map-says" }, ...lines, ...nodes);
  [picture.style.minWidth, picture.style.maxWidth] = [`${Math.min(width, 420)}px`, `${width * 1.3}px`];
  byId("map").replaceChildren(picture);
  const names = new Map(shot.members.map((member) => [member.id, label(member)]));
  byId("flows").replaceChildren(shot.flows.length
    ? table(["from", "to", "#runs", "#bytes", "#per second"], shot.flows.map((flow) => [
        names.get(flow.source) ?? flow.source, names.get(flow.target) ?? flow.target,
        whole(flow.runs), bytes(flow.bytes), bytes(flow.bytes_per_s)]))
    : make("p", { class: "says" }, "Nothing has moved."));
}

function showPools(shot) {
  const shown = shot.members.length < shot.member_count ? ` The first ${shot.members.length} are shown.` : "";
  const tokens = sum(shot.members, "waiting_tokens");
  say("pools-says", (tokens ? `${plural(tokens, "prompt token")} still to be computed.` : "No prompt waits to be computed.") + shown);
  const order = (member) => ROLES.indexOf(member.role);
  const rows = [...shot.members].sort((a, b) => order(a) - order(b)).map((member) => {
    const cache = member.role === "cache";
    const [part, of] = cache
      ? [member.stored_bytes, member.capacity_bytes]
      : [member.total_blocks - member.free_blocks, member.total_blocks];
    return [
      label(member),
      make("span", {}, make("i", { class: `key ${member.role}`, "aria-hidden": "true" }), member.role),
      member.address || "–",
      whole(member.running), whole(member.waiting),
      make("span", {}, bar(of ? part / of : 0, "plain"), cache ? `${bytes(part)} of ${bytes(of)}` : `${whole(part)} of ${whole(of)} blocks`),
      member.prefill_rate ? `${rate(member.prefill_rate)} tok/s` : "–",
      member.step_s ? `${(1000 * member.step_s).toFixed(1)} ms` : "–",
      member.draining ? "draining" : "serving",
    ];
  });
  byId("pools").replaceChildren(
    table(["member", "role", "address", "#run", "#wait", "KV held", "#prefill", "#step", "state"], rows));
}

// From dark blue through yellow to red; a cell at the mean (1) is a quarter of the way.
const STOPS = [[0, [29, 42, 68]], [0.25, [63, 111, 181]], [0.6, [243, 193, 75]], [1, [209, 57, 43]]];

function colour(share) {
  const at = Math.min(1, share / 4);
  const i = STOPS.findIndex(([stop], n) => n > 0 && at <= stop);
  const [[from, a], [to, b]] = [STOPS[i - 1], STOPS[i]];
  return a.map((value, n) => value + ((b[n] - value) * (at - from)) / (to - from));
}

function showExperts(heat) {
  byId("heat").hidden = byId("scale").hidden = !heat;
  if (!heat) {
    say("heat-says", "Nobody counts which experts tokens use. Start the server with --count-experts to see it here.");
    return;
  }
  const cells = Uint8Array.from(atob(heat.cells), (letter) => letter.charCodeAt(0));
  const [width, height] = [heat.experts, heat.layers.length];
  const worst = heat.balance.reduce((best, value, n) => (value > heat.balance[best] ? n : best), 0);
  const hottest = cells.subarray(worst * width, (worst + 1) * width);
  const expert = hottest.indexOf(Math.max(...hottest));
  say("heat-says", heat.choices
    ? `${height} MoE layers from top to bottom, ${width} experts from left to right, ${whole(heat.choices)} choices counted. ` +
      `Most loaded: expert ${expert} of layer ${heat.layers[worst]}, ${heat.balance[worst].toFixed(2)} times the mean of its layer.`
    : `${height} MoE layers of ${width} experts; no token has been computed yet.`);
  const canvas = byId("heat");
  if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
  canvas.style.height = `${Math.min(480, Math.max(60, 14 * height))}px`;
  const image = new ImageData(width, height);
  cells.forEach((cell, n) => image.data.set([...colour(cell * heat.unit), 255], 4 * n));
  canvas.getContext("2d").putImageData(image, 0, 0);
}

function showCounts(counts) {
  const rows = Object.entries(counts).map(([name, value]) => [name.replaceAll("_", " "), whole(value)]);
  byId("counts").replaceChildren(table(["what", "#total"], rows));
}

function show(shot) {
  byId("main").hidden = false;
  showSummary(shot);
  showAttainment(shot.attainment);
  showRates(shot.points);
  showTopology(shot);
  showPools(shot);
  showExperts(shot.experts);
  showCounts(shot.counts);
}

// ---------------------------------------------------------------- the stream

function linked(state, text) {
  byId("dot").className = state;
  say("link", text);
}

// fetch, not EventSource, which cannot send a key.
async function follow() {
  const silence = new AbortController();
  let timer = setTimeout(() => silence.abort(), SILENT_MS);
  const key = sessionStorage.getItem(KEY);
  try {
    const answer = await fetch("/dashboard/events", {
      headers: key ? { authorization: `Bearer ${key}` } : {},
      signal: silence.signal,
    });
    if (answer.status === 401) return "key";
    if (!answer.ok) return `the server answers ${answer.status}`;
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return "the stream ended";
      clearTimeout(timer);
      timer = setTimeout(() => silence.abort(), SILENT_MS);
      text += value;
      for (let end; (end = text.indexOf("\n\n")) >= 0; text = text.slice(end + 2)) {
        const data = text.slice(0, end).split("\n").filter((line) => line.startsWith("data: "));
        if (!data.length) continue;
        show(JSON.parse(data.map((line) => line.slice(6)).join("\n")));
        linked("live", "live");
        failures = 0;
      }
    }
  } catch (error) {
    return error instanceof TypeError || error.name === "AbortError" ? "the server does not answer" : String(error);
  } finally {
    clearTimeout(timer);
    silence.abort();
  }
}

let failures = 0;

async function watch() {
  for (;;) {
    const why = await follow();
    if (why === "key") {
      linked("lost", "a key is needed");
      byId("ask").hidden = false;
      await new Promise((answered) => byId("ask").addEventListener("submit", answered, { once: true }));
      failures = 0;
      continue;
    }
    const wait = RETRY_MS[Math.min(failures++, RETRY_MS.length - 1)];
    linked("lost", `${why}: trying again`);
    await new Promise((passed) => setTimeout(passed, wait));
  }
}

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, byId("key").value);
  byId("key").value = "";
  byId("ask").hidden = true;
});
watch();
