// The text: one span per token, coloured by how many of the shown heads keep it.

const spans = [];
const classes = [];

function pieceOf(token) {
  const piece = trace.pieces[token];
  const [text, part, parts] = typeof piece === "string" ? [piece, 0, 1] : piece;
  return { text, part, parts };
}

function buildText() {
  const parents = [document.createDocumentFragment(), document.createDocumentFragment()];
  for (let i = 0; i < numTokens; i++) {
    const { text, part, parts } = pieceOf(i);
    const span = element("span");
    span.dataset.i = i;
    if (part > 0) {
      // The character stands at its first token; the others show that they belong to it.
      span.append(element("span", `·${part + 1}`, "mark"));
    } else if (text.includes("\n")) {
      for (const [j, line] of text.split("\n").entries()) {
        if (j > 0) span.append(element("span", "↵", "mark"), "\n");
        span.append(line);
      }
    } else if (text === "") {
      span.append(element("span", "∅", "mark"));
    } else {
      span.textContent = text;
    }
    spans.push(span);
    classes.push("");
    parents[i < trace.promptLen ? 0 : 1].append(span);
  }
  $("prompt").append(parents[0]);
  $("output").append(parents[1]);
}

function paintText() {
  const counts = keptCounts();
  const [first, end] = headRange(view.layer, view.head);
  const cached = cachedLen(view.moment);
  for (let i = 0; i < numTokens; i++) {
    const wanted = i < cached ? `k${level(counts[i], end - first)}` : "kf";
    if (classes[i] !== wanted) {
      // Only what changes is touched: thousands of spans, few of which change their colour.
      spans[i].className = wanted;
      classes[i] = wanted;
    }
  }
  if (view.token >= 0) spans[view.token].classList.add("chosen");
}

function tokenAt(target) {
  const span = target instanceof Element ? target.closest("[data-i]") : null;
  return span === null ? -1 : Number(span.dataset.i);
}

function choose(token, pinned) {
  if (view.token >= 0) spans[view.token].classList.remove("chosen");
  view.token = token;
  view.pinned = pinned && token >= 0;
  if (token >= 0) spans[token].classList.add("chosen");
  paintDetail();
}

/** The nearest token in the line above (-1) or below (+1). */
function tokenInNextLine(token, direction) {
  const from = spans[token].getClientRects()[0];
  if (!from) return token;
  let best = token;
  let bestTop = null;
  let bestGap = Infinity;
  for (let i = token + direction; i >= 0 && i < numTokens; i += direction) {
    const rect = spans[i].getClientRects()[0];
    if (!rect || Math.abs(rect.top - from.top) < 4) continue;
    bestTop ??= rect.top;
    if (Math.abs(rect.top - bestTop) >= 4) break;
    const gap = Math.abs(rect.left - from.left);
    if (gap < bestGap) [best, bestGap] = [i, gap];
  }
  return best;
}

function moveToken(key) {
  const { token } = view;
  const start = token < 0 ? 0 : token;
  const targets = {
    ArrowLeft: () => Math.max(start - 1, 0),
    ArrowRight: () => (token < 0 ? 0 : Math.min(start + 1, numTokens - 1)),
    ArrowUp: () => tokenInNextLine(start, -1),
    ArrowDown: () => tokenInNextLine(start, 1),
    Home: () => 0,
    End: () => numTokens - 1,
  };
  if (!(key in targets)) return false;
  const target = targets[key]();
  choose(target, true);
  // The sticky bar would cover a token that the browser brings to the very top.
  const top = spans[target].getClientRects()[0]?.top ?? 0;
  const low = window.innerHeight * (window.innerWidth > 900 ? 0.9 : 0.5);
  if (top < $("bar").offsetHeight + 20 || top > low) spans[target].scrollIntoView({ block: "center" });
  return true;
}

function listenToText() {
  const text = $("text");
  text.addEventListener("mouseover", (event) => {
    const token = tokenAt(event.target);
    if (token >= 0 && !view.pinned) choose(token, false);
  });
  text.addEventListener("click", (event) => {
    const token = tokenAt(event.target);
    if (token >= 0) choose(view.pinned && token === view.token ? -1 : token, true);
  });
  text.addEventListener("focus", () => {
    if (view.token < 0 && text.matches(":focus-visible")) choose(0, true);
  });
  text.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey || !moveToken(event.key)) return;
    event.preventDefault();
    event.stopPropagation();
  });
}
