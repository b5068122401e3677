// The header, the bar with slider, lists and legend, the keys, and the start of it all.

let timer = null;

/** Change what is shown and draw it. */
function show(changes) {
  Object.assign(view, changes);
  view.moment = Math.min(Math.max(view.moment, 0), lastMoment);
  if (view.layer < 0) view.head = -1;
  $("slider").value = view.moment;
  $("slider").setAttribute("aria-valuetext", momentName());
  $("layer").value = view.layer;
  $("head").value = view.head;
  $("head").disabled = view.layer < 0;
  $("previous").disabled = view.moment === 0;
  $("next").disabled = view.moment === lastMoment;
  paintText();
  paintMoment();
  paintLegend();
  paintChart();
  paintDetail();
}

function momentName() {
  if (view.moment === 0) return "before any compaction";
  if (view.moment === lastMoment) return "end of the text";
  return `after compaction ${view.moment} of ${numSteps}`;
}

function paintMoment() {
  const cached = cachedLen(view.moment);
  const evicted = evictedLen(view.moment);
  const parts = [element("strong", momentName())];
  const fact = (value, text) => parts.push(" · ", element("b", number(value)), ` ${text}`);
  fact(cached, "tokens of text");
  fact(cached - evicted, "in the cache of each head");
  const step = trace.steps[view.moment - 1];
  if (step) {
    fact(step.num_evicted, "evicted just now");
    fact(step.freed_blocks, step.freed_blocks === 1 ? "block freed" : "blocks freed");
  }
  $("moment").replaceChildren(...parts);
}

function paintLegend() {
  const [first, end] = headRange(view.layer, view.head);
  const total = end - first;
  const ranges = new Map();
  for (let count = 0; count <= total; count++) {
    const found = level(count, total);
    const [lowest] = ranges.get(found) ?? [count];
    ranges.set(found, [lowest, count]);
  }
  const items = [element("li", total === 1 ? "This head" : "Kept by", "label")];
  for (const [found, [lowest, highest]] of ranges) {
    let text = lowest === highest ? String(lowest) : `${lowest}–${highest}`;
    if (total === 1) text = highest === 0 ? "evicted" : "keeps";
    else if (highest === 0) text = "none";
    else if (lowest === total) text = `all ${total}`;
    items.push(element("li", text, `k${found}`));
  }
  items.push(element("li", "not cached yet", "kf"));
  $("legend").replaceChildren(...items);
}

function fillHeader() {
  const { counts, options, versions } = trace;
  $("model").textContent = trace.model;
  document.title = `KV cache trace: ${trace.model}`;
  for (const [name, value] of Object.entries(options)) {
    const item = element("span", `${name.replaceAll("_", " ")} `);
    item.append(element("b", String(value)));
    $("options").append(item);
  }
  const tiles = [
    ["compactions", number(counts.compactions)],
    ["tokens evicted per head", number(counts.evicted_tokens)],
    ["blocks freed", number(counts.freed_blocks)],
    ["text, prompt + output", `${number(counts.prompt_tokens)} + ${number(counts.output_tokens)}`],
    ["cache at the end", `${number(counts.physical_len)} of ${number(counts.logical_len)}`],
  ];
  for (const [name, value] of tiles) {
    const tile = element("div");
    tile.append(element("dt", name), element("dd", value));
    $("counts").append(tile);
  }
  $("versions").textContent = Object.entries(versions).map(([name, value]) => `${name} ${value}`).join(" · ");
  const endings = { length: "The text ended at the token limit.", stop: "The model ended the text." };
  $("ending").textContent = endings[trace.finishReason] ?? `The text ended: ${trace.finishReason}.`;
}

function explain() {
  const pairs = trace.numLayers * trace.numHeads;
  $("reading").textContent =
    `Every KV head of every layer keeps its own tokens: ${trace.numLayers} layers × ` +
    `${trace.numHeads} KV heads = ${pairs}. A compaction judges the cached tokens and leaves each ` +
    `head ${number(Number(trace.options.budget))}, always with the newest ${trace.window}.`;
  $("resolution").textContent =
    trace.lastRank === null
      ? "Evictions are exact. This method has no scores."
      : "Evictions are exact. A score is shown as its rank among the tokens its head judged at that " +
        `compaction: 0 % is the worst, 100 % the best, rounded to ${trace.rankLevels + 1} steps. ` +
        "“Last” is the compaction that evicted the token, or the last one that judged it.";
}

function fillControls() {
  $("slider").max = lastMoment;
  // More ticks than this run together.
  if (lastMoment <= 60) {
    for (let moment = 0; moment <= lastMoment; moment++) {
      const tick = element("i");
      tick.style.left = `${(moment / lastMoment) * 100}%`;
      $("ticks").append(tick);
    }
  }
  for (const [id, count] of [["layer", trace.numLayers], ["head", trace.numHeads]]) {
    $(id).append(new Option("all", -1));
    for (let i = 0; i < count; i++) $(id).append(new Option(i, i));
    $(id).addEventListener("change", () => show({ [id]: Number($(id).value) }));
  }
  $("slider").addEventListener("input", () => show({ moment: Number($("slider").value) }));
  $("previous").addEventListener("click", () => show({ moment: view.moment - 1 }));
  $("next").addEventListener("click", () => show({ moment: view.moment + 1 }));
  $("play").addEventListener("click", togglePlay);
}

function togglePlay() {
  const stop = () => {
    clearInterval(timer);
    timer = null;
    $("play").textContent = "▶";
    $("play").setAttribute("aria-label", "Play");
  };
  if (timer !== null) return stop();
  if (view.moment === lastMoment) show({ moment: 0 });
  $("play").textContent = "❚❚";
  $("play").setAttribute("aria-label", "Stop");
  timer = setInterval(() => {
    show({ moment: view.moment + 1 });
    if (view.moment === lastMoment) stop();
  }, Math.max(120, Math.min(900, 12000 / lastMoment)));
}

/** The next index in -1 (all), 0, ..., count - 1, round and round. */
const turn = (index, count, step) => ((index + 1 + step + count + 1) % (count + 1)) - 1;

const KEYS = {
  ",": () => show({ moment: view.moment - 1 }),
  ".": () => show({ moment: view.moment + 1 }),
  ArrowLeft: () => show({ moment: view.moment - 1 }),
  ArrowRight: () => show({ moment: view.moment + 1 }),
  l: () => show({ layer: turn(view.layer, trace.numLayers, 1) }),
  L: () => show({ layer: turn(view.layer, trace.numLayers, -1) }),
  h: () => show({ layer: Math.max(view.layer, 0), head: turn(view.head, trace.numHeads, 1) }),
  H: () => show({ layer: Math.max(view.layer, 0), head: turn(view.head, trace.numHeads, -1) }),
  a: () => show({ layer: -1 }),
  t: () => $("text").focus(),
  s: () => $("slider").focus(),
  p: togglePlay,
  Escape: () => choose(-1, false),
  "?": () => ($("help").open = !$("help").open),
};

function listenToKeys() {
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const { target, key } = event;
    const isList = target instanceof HTMLSelectElement;
    const isSlider = target === $("slider");
    // Lists take letters and arrows, the slider takes arrows.
    if (isList || (isSlider && key.startsWith("Arrow"))) return;
    if (!Object.hasOwn(KEYS, key)) return;
    event.preventDefault();
    KEYS[key]();
    if (key === "?" && $("help").open) $("help").scrollIntoView({ block: "nearest" });
  });
}

async function start() {
  if (typeof DecompressionStream === "undefined") {
    $("notice").textContent = "This browser lacks DecompressionStream; open the page in one of 2023 or later.";
    $("notice").hidden = false;
    return;
  }
  fillHeader();
  explain();
  for (const name of ["evictedAt", "lastRank", "meanRank"]) trace[name] = await inflate(trace[name]);
  buildText();
  buildMap();
  buildChart();
  fillControls();
  listenToText();
  listenToKeys();
  new ResizeObserver(() => {
    document.documentElement.style.setProperty("--bar-height", `${$("bar").offsetHeight}px`);
  }).observe($("bar"));
  show({});
  document.documentElement.dataset.ready = "yes";
}

start();
