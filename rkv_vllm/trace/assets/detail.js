// The token at hand: its text, its position, who keeps it, how it scored; and a map of all heads.

const mapCells = [];

function visible(text) {
  return text.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥") || "∅";
}

function viewName() {
  if (view.layer < 0) return "heads";
  return view.head < 0 ? `heads of layer ${view.layer}` : `layer ${view.layer}, head ${view.head}`;
}

function keptLine(token, first, end) {
  if (token >= numTokens - 1) return "sampled last, never cached";
  if (token >= cachedLen(view.moment)) return "not cached yet";
  let kept = 0;
  for (let pair = first; pair < end; pair++) kept += keeps(pair, token, view.moment);
  if (end - first === 1) return kept ? "yes" : "no, evicted";
  return `${number(kept)} of ${number(end - first)} (${percent(kept / (end - first))})`;
}

function evictionLine(token, first, end) {
  const { earliest, latest, kept } = evictionSpan(token, first, end);
  if (earliest === null) return token < numTokens - 1 ? "by none, kept to the end" : "";
  if (end - first === 1) return `by compaction ${latest}`;
  const when = earliest === latest ? `by compaction ${latest}` : `by compactions ${earliest} to ${latest}`;
  return kept > 0 ? `${when}; ${number(kept)} keep it to the end` : when;
}

function rankLines(token, first, end) {
  if (trace.lastRank === null) return [["score", "this method has none"]];
  const lines = [];
  const { moment } = view;
  if (moment >= 1 && moment <= numSteps) {
    const now = share(trace.meanRank[(moment - 1) * numTokens + token]);
    lines.push(["score rank now", now === null ? "not judged" : `${percent(now)}, mean of all heads`]);
  }
  const last = meanLastRank(token, first, end);
  const suffix = end - first > 1 ? ", mean" : "";
  lines.push(["last score rank", last === null ? "never judged" : `${percent(last)}${suffix}`]);
  return lines;
}

function paintDetail() {
  const { token } = view;
  const box = $("token");
  $("detail").classList.toggle("filled", token >= 0);
  $("map-figure").hidden = token < 0;
  if (token < 0) {
    box.replaceChildren(element("p", "Point at a token, click it, or press t and use the arrow keys.", "hint"));
    return;
  }
  const { text, part, parts } = pieceOf(token);
  const [first, end] = headRange(view.layer, view.head);
  const rows = [
    ["position", `${number(token)}, ${token < trace.promptLen ? "prompt" : "output"}`],
    [end - first === 1 ? "kept" : "kept by", keptLine(token, first, end)],
    ["evicted", evictionLine(token, first, end)],
    ...rankLines(token, first, end),
  ];
  if (parts > 1) rows.splice(1, 0, ["part", `${part + 1} of ${parts} of this character`]);
  const list = element("dl");
  for (const [name, value] of rows) {
    if (value) list.append(element("dt", name), element("dd", value));
  }
  box.replaceChildren(element("div", visible(text), "word"), list);
  paintMap();
}

const SVG = "http://www.w3.org/2000/svg";
function svg(name, attributes, text = "") {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text) made.textContent = text;
  return made;
}

/** One cell per layer (across) and KV head (down); a click shows that head. */
function buildMap() {
  const { numLayers, numHeads } = trace;
  const size = Math.min(300 / numLayers, 14);
  const left = 34;
  const height = numHeads * size;
  const picture = svg("svg", {
    viewBox: `0 0 340 ${height + 18}`,
    role: "img",
    "aria-label": "Which layer and KV head keeps the token; the lists Layer and KV head choose one",
  });
  for (let layer = 0; layer < numLayers; layer++) {
    for (let head = 0; head < numHeads; head++) {
      const cell = svg("rect", {
        x: left + layer * size + 0.5,
        y: head * size + 0.5,
        width: size - 1,
        height: size - 1,
        rx: 1,
      });
      cell.append(svg("title", {}, `layer ${layer}, KV head ${head}`));
      cell.addEventListener("click", () => show({ layer, head }));
      mapCells.push(cell);
      picture.append(cell);
    }
  }
  picture.append(svg("rect", { id: "map-view", class: "view" }));
  picture.append(svg("text", { x: left, y: height + 13 }, "layer 0"));
  if (numLayers * size > 90) {
    const end = { x: left + numLayers * size, y: height + 13, "text-anchor": "end" };
    picture.append(svg("text", end, String(numLayers - 1)));
  }
  picture.append(svg("text", { x: 0, y: height / 2 + 4 }, "head"));
  picture.dataset.size = size;
  picture.dataset.left = left;
  $("map").append(picture);
}

function paintMap() {
  const { token, moment } = view;
  const isCached = token < cachedLen(moment);
  for (const [pair, cell] of mapCells.entries()) {
    cell.setAttribute("class", isCached && keeps(pair, token, moment) ? "kept" : "");
  }
  const { size, left } = $("map").firstChild.dataset;
  const [first, end] = view.layer < 0 ? [0, 0] : headRange(view.layer, view.head);
  const frame = $("map-view");
  frame.setAttribute("x", Number(left) + view.layer * size);
  frame.setAttribute("y", (first % trace.numHeads) * size);
  frame.setAttribute("width", end > first ? size : 0);
  frame.setAttribute("height", (end - first) * size);
  $("map-caption").textContent = isCached
    ? "Filled: this layer's KV head keeps the token. Click one to see its text."
    : "The token is not in the cache.";
}
