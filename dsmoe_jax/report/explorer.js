"use strict";
// Draws the data; every number in it was computed before.  Texts go in by textContent only.
const data = JSON.parse(document.getElementById("data").textContent);
// The experts beside the text are those of one run; so is the expert that is picked.
const state = { layer: 0, passage: 0, rank: 0, run: 0, expert: null };
const at = (id) => document.getElementById(id);
const K = Math.max(...data.runs.flatMap((run) => run.routing.map((p) => p.ids[0][0].length)));
const layers = Math.max(...data.runs.map((run) => run.layers));
// Steps of the golden angle: neighbours differ, and a next expert never repeats a hue.
const hue = (expert) => ((expert * 137.508) % 360).toFixed(1);
/** A run that has fewer layers than another stays at its last one. */
const layerOf = (run) => Math.min(state.layer, run.layers - 1);

function element(tag, text, attributes = {}) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

const visible = (token) => token.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "␣");

/** The experts of a token in this layer, largest gate first, without unassigned ones. */
function chosen(run, i) {
  const layer = layerOf(run), routing = run.routing[state.passage];
  const ids = routing.ids[layer][i], gates = routing.gates[layer][i];
  return ids.map((id, k) => ({ id, gate: gates[k] })).filter((c) => c.id < run.experts).sort((a, b) => b.gate - a.gate);
}

function drawText(run, number) {
  const box = at("texts").children[number].querySelector(".text");
  const picked = state.expert !== null && number === state.run;
  box.replaceChildren();
  box.classList.toggle("picked", picked);
  data.passages[state.passage].tokens.forEach((token, i) => {
    const experts = chosen(run, i);
    const shown = experts[state.rank];
    const span = element("span", token, { "data-i": i });
    if (shown === undefined) span.className = "none";
    const of = picked && experts.some((c) => c.id === state.expert);
    if (of) span.classList.add("of");
    const coloured = of ? state.expert : shown && shown.id;
    if (coloured !== undefined) span.style.setProperty("--h", hue(coloured));
    box.append(span);
  });
}

function drawExperts(run) {
  at("experts-of").textContent = data.runs.length > 1 ? `Experts of ${run.name}` : "Experts";
  at("experts").replaceChildren(...run.load[layerOf(run)].map((load, expert) => {
    const button = element("button", String(expert), {
      type: "button", "data-expert": expert, "aria-pressed": String(expert === state.expert),
      title: `expert ${expert}: ${load.toFixed(2)} times an even load`,
    });
    button.style.setProperty("--h", hue(expert));
    button.style.setProperty("--w", `${Math.min(load / 3, 1) * 100}%`);
    return button;
  }));
}

function bars(rows, most) {
  const box = element("div", undefined, { class: "bars" });
  for (const [name, value, shown, colour] of rows) {
    const bar = element("i");
    bar.style.width = `${Math.min(value / most, 1) * 100}%`;
    if (colour !== undefined) bar.style.setProperty("--h", colour);
    const cell = element("div");
    cell.append(bar);
    box.append(element("span", name), cell, element("span", shown));
  }
  return box;
}

function drawExpert(run) {
  const box = at("expert"), e = state.expert, layer = layerOf(run);
  box.replaceChildren();
  if (e === null) return;
  box.style.setProperty("--h", hue(e));
  const domains = run.load_by_domain[layer][e];
  const most = Math.max(...domains, 1);
  box.append(element("h3", `Expert ${e}, layer ${layer + 1}: ${run.load[layer][e].toFixed(2)} times an even load`));
  box.append(element("p", "By domain, relative to an even load of the domain:", { class: "hint" }));
  box.append(bars(data.domains.map((name, g) => [name, domains[g], domains[g].toFixed(2), hue(e)]), most));
  const favourites = run.favourites[layer][e];
  box.append(element("h3", "Tokens that it gets most of"));
  if (favourites.length === 0) box.append(element("p", `None of those that occur ${data.min_count} times or more.`, { class: "hint" }));
  const chips = element("div", undefined, { class: "chips" });
  for (const [token, share] of favourites) {
    const chip = element("span", `${visible(token)} `);
    chip.append(element("small", `${Math.round(share * 100)}%`));
    chips.append(chip);
  }
  box.append(chips, element("h3", "Largest gates, in context"));
  const uses = run.uses[layer][e];
  if (uses.length === 0) box.append(element("p", "No token went to it.", { class: "hint" }));
  for (const [before, token, after, gate, domain] of uses) {
    const line = element("div", undefined, { class: "use" });
    line.append(before, element("b", token), after, element("small", `  ${gate} in ${data.domains[domain]}`));
    box.append(line);
  }
}

function draw() {
  at("layer-name").textContent = `${state.layer + 1} of ${layers}`;
  data.runs.forEach(drawText);
  drawExperts(data.runs[state.run]);
  drawExpert(data.runs[state.run]);
}

function showTip(run, span, x, y) {
  const passage = data.passages[state.passage], i = Number(span.dataset.i);
  const tip = at("tip"), experts = chosen(run, i);
  const head = element("div");
  head.append(element("b", visible(passage.tokens[i])), ` at position ${passage.positions[i]}`);
  const sum = experts.reduce((total, c) => total + c.gate, 0);
  const most = Math.max(...experts.map((c) => c.gate), 1e-9);
  const rows = experts.map((c) => [`expert ${c.id}`, c.gate, c.gate.toFixed(3), hue(c.id)]);
  const last = experts.length ? `gates sum to ${sum.toFixed(3)}` : "no expert computed it";
  tip.replaceChildren(head, bars(rows, most), element("div", last, { class: "hint" }));
  tip.hidden = false;
  const width = tip.offsetWidth, height = tip.offsetHeight;
  tip.style.left = `${Math.max(4, Math.min(x + 12, innerWidth - width - 4))}px`;
  tip.style.top = `${y + 18 + height > innerHeight ? Math.max(4, y - height - 12) : y + 18}px`;
}

function pick(number, expert) {
  const again = state.run === number && state.expert === expert;
  state.run = number;
  state.expert = again ? null : expert;
  draw();
}

/** The text of a run: what it does under the pointer, and at a click. */
function addText(run, number) {
  const pane = element("div"), box = element("div", undefined, { class: "text", ...(number ? {} : { id: "text" }) });
  if (data.runs.length > 1) pane.append(element("h2", run.name));
  pane.append(box);
  at("texts").append(pane);
  box.addEventListener("pointermove", (event) => {
    const span = event.target.closest("span");
    if (span) showTip(run, span, event.clientX, event.clientY); else at("tip").hidden = true;
  });
  box.addEventListener("pointerleave", () => { at("tip").hidden = true; });
  box.addEventListener("click", (event) => {
    const span = event.target.closest("span");
    const shown = span && chosen(run, Number(span.dataset.i))[state.rank];
    if (shown) pick(number, shown.id);
  });
}

at("layer").max = layers;
at("about").textContent = `${data.tokens.toLocaleString("en")} held-out tokens were routed through `
  + data.runs.map((run) => `${run.layers} MoE layers of ${run.experts} experts${data.runs.length > 1 ? ` (${run.name})` : ""}`).join(" and ")
  + ". Each colour is an expert; the same number in another layer is another expert.";
at("texts").classList.toggle("several", data.runs.length > 1);
data.runs.forEach(addText);
data.passages.forEach((p, i) => at("passage").append(element("option", p.name, { value: i })));
for (let rank = 0; rank < K; rank++) at("rank").append(element("option", rank === 0 ? "by the largest gate" : `by gate ${rank + 1}`, { value: rank }));
at("layer").addEventListener("input", (event) => { state.layer = event.target.value - 1; draw(); });
at("passage").addEventListener("change", (event) => { state.passage = Number(event.target.value); draw(); });
at("rank").addEventListener("change", (event) => { state.rank = Number(event.target.value); draw(); });
at("experts").addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  pick(state.run, Number(button.dataset.expert));
  at("experts").querySelector(`[data-expert="${button.dataset.expert}"]`).focus();
});
draw();
