// All videos as cards: search, favourites, and what is done with several at once.

import * as api from './api.js';
import {$, button, el, render, say} from './dom.js';
import {downloads, remove} from './job.js';
import {ahead, choose, emit, newestFirst, on, state, store, stored, take} from './state.js';

const FAVOURITES = 'wanduet-favourites';
const favourites = new Set(stored(FAVOURITES, []));
const selected = new Set();
const cards = new Map(); // elements by the jobs' ids
let query = '', onlyFavourites = false, selecting = false;

export function startGallery() {
  buildTools();
  on('videos', show);
  on('choose', choose);
  $('older').addEventListener('click', showOlder);
  show();
}

function buildTools() {
  const search = el('input', {type: 'search', placeholder: 'Search', 'aria-label': 'Search videos',
    oninput: () => { query = search.value.trim().toLowerCase(); show(); }});
  const toggle = (text, change) => {
    const node = button(text, () => { node.setAttribute('aria-pressed', change()); show(); }, {'aria-pressed': false});
    return node;
  };
  $('tools').append(search,
    toggle('Favourites', () => (onlyFavourites = !onlyFavourites)),
    toggle('Select', () => { selecting = !selecting; selected.clear(); return selecting; }),
    el('span', {id: 'selection'}));
}

async function showOlder() {
  $('older').disabled = true;
  try {
    const {videos, more, last} = await api.older(state.last);
    Object.assign(state, {more, last: last ?? state.last});
    take(videos);
  } catch (error) {
    say(error.message, 'bad');
  } finally {
    $('older').disabled = false;
  }
}

const matches = job => (!onlyFavourites || favourites.has(job.id))
  && (!query || `${job.prompt} seed ${job.settings.seed} ${job.title} ${job.id}`.toLowerCase().includes(query));

function show() {
  const jobs = newestFirst(), visible = jobs.filter(matches);
  for (const [id, card] of cards) if (!state.videos.has(id)) { card.remove(); cards.delete(id); selected.delete(id); }
  visible.forEach((job, index) => {
    if (!cards.has(job.id)) cards.set(job.id, el('li', {class: 'card'}));
    const card = cards.get(job.id);
    if ($('cards').children[index] !== card) $('cards').insertBefore(card, $('cards').children[index] || null);
    fill(card, job);
  });
  while ($('cards').children.length > visible.length) $('cards').lastChild.remove();
  $('none').textContent = jobs.length ? (visible.length ? '' : 'No video matches.') : 'Your videos will be here, with everything that made them.';
  $('older').hidden = !state.more;
  $('tools').hidden = !jobs.length;
  showSelection();
}

function fill(card, job) {
  const chosen = state.compared.length ? state.compared.includes(job.id) : job.id === state.chosen;
  card.classList.toggle('chosen', chosen);
  const place = job.status === 'queued' ? ahead(job) : 0;
  const facts = [job.title, job.progress, place, favourites.has(job.id), selecting && selected.has(job.id), selecting];
  render(card, JSON.stringify(facts), () => [picture(job, place), star(job), selecting ? checkbox(job) : null]);
  card.querySelector('.pick').setAttribute('aria-current', chosen);
}

function picture(job, place) {
  const count = job.settings.num_videos_per_prompt || 1;
  const about = [count > 1 ? `${count} videos` : '', job.length, `seed ${job.settings.seed}`].filter(Boolean).join(' · ');
  const done = job.status === 'completed';
  const badge = place ? `Waiting, number ${place + 1}` : job.title;
  return el('button', {type: 'button', class: 'pick', 'data-id': job.id, title: job.prompt, onclick: () => pick(job)},
    el('span', {class: 'frame'},
      done ? el('img', {loading: 'lazy', src: api.content(job.id, 'thumbnail'), alt: ''}) : el('span', {class: `badge ${job.status}`}, badge),
      job.status === 'in_progress' ? el('i', {class: 'line', width: `${job.progress}%`}) : null),
    el('span', {class: 'caption'}, job.prompt), el('span', {class: 'about'}, about));
}

function pick(job) {
  choose(job.id);
  const calm = matchMedia('(prefers-reduced-motion: reduce)').matches;
  $('result').scrollIntoView({block: 'nearest', behavior: calm ? 'auto' : 'smooth'});
}

function star(job) {
  const is = favourites.has(job.id);
  return button(is ? '★' : '☆', () => {
    if (is) favourites.delete(job.id);
    else favourites.add(job.id);
    store(FAVOURITES, [...favourites]);
    show();
    cards.get(job.id)?.querySelector('.star')?.focus();
  }, {class: 'star', 'aria-pressed': is, 'aria-label': `Favourite: ${job.prompt}`});
}

function checkbox(job) {
  const input = el('input', {type: 'checkbox', class: 'check', 'aria-label': `Select: ${job.prompt}`, onchange: () => {
    if (input.checked) selected.add(job.id);
    else selected.delete(job.id);
    showSelection();
  }});
  input.checked = selected.has(job.id);
  return input;
}

function showSelection() {
  render($('selection'), JSON.stringify([selecting, [...selected].map(id => [id, state.videos.get(id)?.status])]), () => {
    if (!selecting) return [];
    const jobs = newestFirst().filter(job => selected.has(job.id));
    const done = jobs.filter(job => job.status === 'completed');
    return [
      button('All', () => { newestFirst().filter(matches).forEach(job => selected.add(job.id)); show(); }),
      button('Compare', () => compare(done), {disabled: done.length < 2 || done.length > 6}),
      button('Download', () => download(done), {disabled: !done.length}),
      button('Delete', () => remove(jobs), {disabled: !jobs.length}),
      el('span', {class: 'fine', role: 'status'}, `${jobs.length} selected`),
    ];
  });
}

function compare(jobs) {
  state.choices += 1;
  state.compared = jobs.map(job => job.id);
  emit('videos');
  $('result').scrollIntoView({block: 'nearest'});
}

// One download after the other: a browser drops clicks that come at once.
async function download(jobs) {
  for (const link of jobs.flatMap(downloads)) {
    document.body.append(link);
    link.click();
    link.remove();
    await new Promise(resolve => setTimeout(resolve, 300));
  }
}
