// What the page knows. Jobs are kept by their ids; only the visitor's clicks write which one is chosen, so no slow
// answer undoes a newer choice.

export const state = {
  about: null,
  form: {},
  files: new Map(), // the visitor's own videos by their hashes: {file, url}
  videos: new Map(),
  chosen: null,
  choices: 0, // how often the visitor has chosen
  edits: 0, // how often the form was changed
  more: false, // whether there are videos older than `last`, which the page has not asked for
  last: null,
  ready: false,
  reason: null,
  compared: [],
};

const listeners = {};

export function on(names, listener) {
  for (const name of names.split(' ')) (listeners[name] ||= []).push(listener);
}

export function emit(name, detail) {
  for (const listener of listeners[name] || []) listener(detail);
}

export function stored(key, fallback) {
  try {
    return JSON.parse(localStorage.getItem(key)) ?? fallback;
  } catch {
    return fallback;
  }
}

export function store(key, value) {
  try {
    localStorage.setItem(key, JSON.stringify(value));
  } catch { /* storage may be forbidden or full */ }
}

export const newestFirst = () => [...state.videos.values()].sort((a, b) => (a.id < b.id ? 1 : -1));
export const shownJob = () => state.videos.get(state.chosen) || null;
export const ahead = job => [...state.videos.values()].filter(other => !other.finished && other.id < job.id).length;

export function choose(id) {
  state.choices += 1;
  state.chosen = id;
  state.compared = [];
  emit('videos');
}

// Chooses what an action has made, unless the visitor has chosen something since `before`.
export function chooseUnlessChanged(id, before) {
  if (state.choices === before) choose(id);
}

const gone = new Set();

export function take(videos, deleted = []) {
  const ended = [];
  for (const video of videos) {
    if (gone.has(video.id)) continue;
    const known = state.videos.get(video.id);
    if (known && known.finished && !video.finished) continue; // an older picture of it: a job ends once
    if (known && !known.finished && video.finished) ended.push(video);
    state.videos.set(video.id, video);
  }
  for (const id of deleted) drop(id);
  if (!shownJob()) state.chosen = newestFirst()[0]?.id ?? null;
  emit('videos');
  for (const video of ended) emit('ended', video);
}

// The newest videos as a stream begins. `before`: the ids that were known when the last stream ended; what is as new as
// these videos and not among them was deleted meanwhile.
export function takeNewest({videos, more, last}, before) {
  const names = new Set(videos.map(video => video.id));
  const missing = before.filter(id => id >= (more ? last : '') && !names.has(id));
  const newest = newestFirst()[0]?.id;
  if (!newest || (more && newest < last)) Object.assign(state, {more, last}); // older ones are asked for from there
  take(videos, missing);
}

export function drop(id) {
  gone.add(id);
  state.videos.delete(id);
  state.compared = state.compared.filter(other => other !== id);
}
