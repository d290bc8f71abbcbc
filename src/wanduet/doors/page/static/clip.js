// A video that is dropped or chosen: an offer to use its settings or its pictures, then the form's input video.
// The file stays in the browser until it is submitted.

import * as api from './api.js';
import {$, button, el, message, render, say} from './dom.js';
import {field, needing, setForm, showForm} from './form.js';
import {on, state} from './state.js';

let offer = null; // what was dropped and waits for a decision: {name, form, note, source, error}
let error = '';
let reads = 0;
const name = () => state.about.files[0];

export function startClip() {
  const panel = el('div', {id: 'clip-panel'});
  $('clip').append(panel, ...needing(name()).map(needed => field(needed)));
  on('form', show);
  showForm(); // with the fields that need a file
  show();
  const isFile = event => event.dataTransfer && [...event.dataTransfer.types].includes('Files');
  // The whole page accepts a drop: outside of a target, a browser would leave the page to open the file.
  document.addEventListener('dragover', event => {
    if (!isFile(event)) return;
    event.preventDefault();
    document.body.classList.add('dropping');
  });
  document.addEventListener('dragleave', event => {
    if (!event.relatedTarget) document.body.classList.remove('dropping');
  });
  document.addEventListener('drop', event => {
    if (!isFile(event)) return;
    event.preventDefault();
    document.body.classList.remove('dropping');
    read(event.dataTransfer.files[0]);
  });
}

// The visitor's own files of a form, by field; throws if one is not in this browser any more.
export function chosenFiles(form) {
  const found = {};
  for (const file of state.about.files) {
    const hash = form[file]?.source?.sha256;
    if (!hash) continue;
    if (!state.files.has(hash)) throw new Error('Choose the input video again.');
    found[file] = state.files.get(hash).file;
  }
  return found;
}

async function read(file) {
  if (!file) return;
  const number = ++reads;
  document.body.classList.add('reading');
  const answer = await api.read(file);
  if (number !== reads) return; // another one was dropped since
  document.body.classList.remove('reading');
  const hash = answer.source?.sha256;
  if (hash && !state.files.has(hash)) state.files.set(hash, {file, url: URL.createObjectURL(file)});
  const usable = answer.form || answer.source;
  offer = usable ? {...answer, name: file.name} : null;
  error = usable ? '' : answer.error;
  show();
  $('clip-panel').querySelector('.uses button')?.focus();
}

async function use(what) {
  const {source, form, note, name: file} = offer;
  offer = null;
  if (what === 'settings') {
    const files = Object.fromEntries(state.about.files.map(each => [each, null]));
    setForm({...state.about.defaults, ...form, ...files});
    say(`These are the settings of ${file}. ${note || ''}`.trim());
    return;
  }
  setForm({[name()]: {name: file, source}});
  const before = state.edits;
  const {set} = await api.follow(state.form).catch(() => ({set: {}})); // then the plan says what is wrong
  if (before === state.edits) setForm(set); // the visitor has changed nothing since
}

function remove() {
  if (offer) offer = null;
  else setForm({[name()]: null});
  show();
}

function show() {
  const clip = state.form[name()];
  render($('clip-panel'), JSON.stringify([offer, clip, error]), () => {
    if (offer) return panel(offer, el('b', {}, offer.name), offer.source ? about(offer.source) : offer.error, uses());
    if (clip) return panel(clip, ['Starts from the pictures of ', el('b', {}, clip.name)], about(clip.source));
    return [invitation(), error ? message(error, 'bad') : null];
  });
}

function invitation() {
  const input = el('input', {type: 'file', accept: 'video/*,.mkv', onchange: () => { read(input.files[0]); input.value = ''; }});
  return el('p', {class: 'fine upload'}, 'Drop a video on this page, or ', el('label', {}, 'choose one', input),
    ', to start from its pictures or to use its settings.');
}

function uses() {
  return el('p', {class: 'uses'},
    offer.source ? button('Start from its pictures', () => use('start')) : null,
    offer.form ? button('Use its settings', () => use('settings')) : null);
}

function panel({source}, title, text, buttons = null) {
  const kept = state.files.get(source?.sha256);
  const picture = kept ? el('video', {src: kept.url, muted: true, autoplay: true, loop: true, playsinline: true, 'aria-hidden': true}) : null;
  if (picture) picture.muted = true;
  picture?.addEventListener('error', () => picture.remove());
  return el('div', {class: 'clip', role: 'group', 'aria-label': 'Input video'}, picture,
    el('div', {}, el('p', {}, ...[title].flat()), text ? el('p', {class: 'fine'}, text) : null),
    button('×', remove, {class: 'leave', 'aria-label': 'Remove', title: 'Remove'}), buttons);
}

const about = source => (source ? `${source.width} × ${source.height} · ${source.seconds.toFixed(1)} s` : '');
