"use strict";
// What the page knows: the trace as page.py wrote it, the moment and the heads that are shown.
// Moments: 0 is before any compaction, k is right after compaction k, the last one is the end of the
// text. Everything else on the page is computed from here and drawn by the other scripts.

const $ = (id) => document.getElementById(id);
const trace = JSON.parse($("data").textContent);
const numTokens = trace.pieces.length;
const numSteps = trace.steps.length;
const lastMoment = numSteps + 1;
// View: layer and head are indices, or -1 for all of them.
const view = { moment: 0, layer: -1, head: -1, token: -1, pinned: false };

/** One array of numbers: base64 of deflated little-endian bytes. */
async function inflate(packed) {
  if (packed === null) return null;
  const bytes = Uint8Array.from(atob(packed.data), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const buffer = await new Response(stream).arrayBuffer();
  return packed.bytes === 2 ? new Uint16Array(buffer) : new Uint8Array(buffer);
}

/** Tokens of text that were cached at a moment; the last token of all never is. */
function cachedLen(moment) {
  if (moment > numSteps) return trace.cachedLen;
  return trace.steps[Math.max(moment, 1) - 1].logical_len;
}

/** Tokens that every head had let go of at a moment. */
function evictedLen(moment) {
  return trace.steps.slice(0, moment).reduce((sum, step) => sum + step.num_evicted, 0);
}

/** First and last index of the flattened (layer, head) pairs that a view shows. */
function headRange(layer, head) {
  if (layer < 0) return [0, trace.numLayers * trace.numHeads];
  const first = layer * trace.numHeads;
  return head < 0 ? [first, first + trace.numHeads] : [first + head, first + head + 1];
}

/** Whether a head keeps a token at a moment; both are in the cache's text. */
const keeps = (pair, token, moment) => trace.evictedAt[pair * numTokens + token] >= moment;

/** Of the heads that are shown, how many keep each token. */
function keptCounts() {
  const counts = new Uint16Array(numTokens);
  const [first, end] = headRange(view.layer, view.head);
  const { evictedAt } = trace;
  const { moment } = view;
  for (let pair = first; pair < end; pair++) {
    const row = pair * numTokens;
    for (let i = 0; i < numTokens; i++) counts[i] += evictedAt[row + i] >= moment;
  }
  return counts;
}

/**
 * Colour, 0 for no head to 8 for all of them. Steps widen with the count: late in a long text few
 * heads keep a token, and one or five of them make a difference.
 */
function level(count, total) {
  if (count === 0) return 0;
  return count === total ? 8 : 1 + Math.floor(7 * Math.sqrt((count - 1) / (total - 1)));
}

/** A stored rank as a share, 0 for the worst and 1 for the best; null when there is none. */
const share = (stored) => (stored === 0 ? null : (stored - 1) / trace.rankLevels);

/** Mean of the last ranks of the heads [first, end) that ever judged a token; null without any. */
function meanLastRank(token, first, end) {
  let sum = 0;
  let count = 0;
  for (let pair = first; pair < end; pair++) {
    const stored = trace.lastRank[pair * numTokens + token];
    if (stored > 0) {
      sum += share(stored);
      count += 1;
    }
  }
  return count === 0 ? null : sum / count;
}

/** First and last compaction, counted from 1, by which one of the heads lets go; null for none. */
function evictionSpan(token, first, end) {
  let earliest = Infinity;
  let latest = -1;
  let kept = 0;
  for (let pair = first; pair < end; pair++) {
    const at = trace.evictedAt[pair * numTokens + token];
    if (at >= numSteps) kept += 1;
    else {
      earliest = Math.min(earliest, at + 1);
      latest = Math.max(latest, at + 1);
    }
  }
  return { earliest: latest < 0 ? null : earliest, latest: latest < 0 ? null : latest, kept };
}

/** An element with text, never markup: tokens can say anything. */
function element(name, text = "", className = "") {
  const made = document.createElement(name);
  if (text !== "") made.textContent = text;
  if (className) made.className = className;
  return made;
}

const number = (value) => value.toLocaleString("en-US");
const percent = (value) => `${Math.round(value * 100)} %`;
