// Tokens of text (logical) and tokens in the cache (physical) as the text grows, and where we are.

const CHART = { width: 340, height: 150, left: 40, right: 6, top: 10, bottom: 22 };

function chartScale() {
  const { width, height, left, right, top, bottom } = CHART;
  const most = Math.max(trace.cachedLen, 1);
  return {
    x: (tokens) => left + (tokens / most) * (width - left - right),
    y: (tokens) => height - bottom - (tokens / most) * (height - top - bottom),
  };
}

function physicalPath(scale) {
  const points = [[0, 0]];
  let evicted = 0;
  for (const step of trace.steps) {
    points.push([step.logical_len, step.logical_len - evicted]);
    evicted += step.num_evicted;
    points.push([step.logical_len, step.logical_len - evicted]);
  }
  points.push([trace.cachedLen, trace.cachedLen - evicted]);
  return points.map(([x, y]) => `${scale.x(x).toFixed(1)},${scale.y(y).toFixed(1)}`).join(" L");
}

function buildChart() {
  const { width, height, left, right, bottom } = CHART;
  const scale = chartScale();
  const last = trace.counts.physical_len;
  const picture = svg("svg", {
    viewBox: `0 0 ${width} ${height}`,
    role: "img",
    "aria-label": `The text grows to ${trace.cachedLen} cached tokens, the cache ends with ${last}`,
  });
  const floor = scale.y(0);
  for (const tokens of [0, Math.round(trace.cachedLen / 2), trace.cachedLen]) {
    const y = scale.y(tokens);
    picture.append(svg("line", { class: "axis", x1: left, x2: width - right, y1: y, y2: y }));
    const label = { x: left - 6, y: y + 4, "text-anchor": "end" };
    picture.append(svg("text", label, number(tokens)));
  }
  const path = physicalPath(scale);
  picture.append(svg("path", { class: "area", d: `M${path} L${scale.x(trace.cachedLen)},${floor} Z` }));
  const line = { class: "logical", x1: scale.x(0), y1: floor };
  picture.append(svg("line", { ...line, x2: scale.x(trace.cachedLen), y2: scale.y(trace.cachedLen) }));
  picture.append(svg("path", { class: "physical", d: `M${path}` }));
  picture.append(svg("line", { id: "now", class: "now", y1: CHART.top, y2: floor }));
  picture.append(svg("circle", { id: "now-dot", class: "dot", r: 3.2 }));
  const x = scale.x(trace.cachedLen * 0.57);
  picture.append(svg("text", { class: "logical-label", x: x - 8, y: scale.y(trace.cachedLen * 0.66), "text-anchor": "end" }, "text (logical)"));
  picture.append(svg("text", { class: "physical-label", x: width - right - 4, y: floor - 5, "text-anchor": "end" }, "cache (physical)"));
  picture.append(svg("text", { x: width - right, y: height - bottom + 15, "text-anchor": "end" }, "tokens of text"));
  picture.addEventListener("click", (event) => {
    const box = picture.getBoundingClientRect();
    const inside = ((event.clientX - box.left) / box.width) * width - left;
    const tokens = (inside / (width - left - right)) * trace.cachedLen;
    show({ moment: trace.steps.filter((step) => step.logical_len <= tokens).length });
  });
  $("chart").append(picture);
}

function paintChart() {
  const scale = chartScale();
  const cached = cachedLen(view.moment);
  const x = scale.x(cached);
  for (const key of ["x1", "x2"]) $("now").setAttribute(key, x);
  $("now-dot").setAttribute("cx", x);
  $("now-dot").setAttribute("cy", scale.y(cached - evictedLen(view.moment)));
}
