// The page while the model is not on the server's machine: it fetches the model, or takes the miniature.

import * as api from './api.js';
import {$, button, duration, el, render} from './dom.js';

const LOOK_MS = 1000;
const MEASURED_MS = 20_000; // the speed is that of the last seconds
let samples = []; // [time in ms, bytes] of a download that runs
let picked = null; // one of the model's forms
let leaving = false;

async function look(ask = api.model) {
  try {
    show(await ask());
  } catch (error) {
    if (error.status === 404) location.reload(); // the server with a model has taken its place
    else if (error.status) $('error').textContent = error.message;
    else if (leaving) about('Starting …'); // one server ends, the next begins
    else $('error').textContent = error.message;
  }
}

function show(model) {
  const form = model.forms.find(({name}) => name === (model.running ? model.form : picked ?? model.form));
  const begun = form.bytes > 0, here = form.total === null ? size(form.bytes) : `${size(form.bytes)} of ${size(form.total)}`;
  leaving = model.done || leaving;
  $('error').textContent = model.error || '';
  $('miniature').hidden = !model.miniature;
  if (model.done) about('Starting …');
  else if (model.running) about(`Fetching ${model.model}. You can close this page meanwhile.`);
  else about(`${model.model} is not on this machine yet.${begun ? ` ${here} are here already.` : ''}`);
  showForms(model, form);
  render($('progress'), JSON.stringify([model.running, form]), () => (model.running ? progress(form, here) : []));
  const fetching = begun ? 'Resume the download' : `Fetch ${model.name}`;
  const rest = form.total === null ? '' : ` (${size(form.total - form.bytes)})`;
  render($('choices'), JSON.stringify([model.running, model.done, model.miniature, form.name, begun]), () => (leaving ? [] : [
    model.running ? button('Stop', () => look(api.stopFetch))
      : button(fetching + rest, () => look(() => api.startFetch(form.name)), {class: 'primary'}),
    model.miniature ? button('Try the miniature', () => { leaving = true; look(api.takeMiniature); }) : null,
  ]));
}

// Which files to fetch, if there is a choice.
function showForms(model, chosen) {
  $('forms').hidden = model.forms.length < 2 || model.running || leaving;
  render($('forms'), JSON.stringify([model.forms, chosen.name]), () => [
    el('legend', {}, 'All are the same model. Fewer bits need less disk and change small details of a video.'),
    ...[...model.forms].sort((one, other) => one.total - other.total).map(({name, about: words, total}) => {
      const input = el('input', {type: 'radio', name: 'form', value: name, checked: name === chosen.name,
        onchange: () => { picked = name; show(model); }});
      return el('label', {}, input, el('b', {}, size(total)), el('span', {}, words));
    })]);
}

function progress({bytes, total}, here) {
  const now = performance.now();
  samples = [...samples.filter(([time, before]) => now - time < MEASURED_MS && before <= bytes), [now, bytes]];
  const [time, before] = samples[0], speed = (bytes - before) / (now - time); // bytes a ms
  const percent = total ? Math.floor(100 * bytes / total) : 0;
  const left = bytes === total ? 'checking the files' : speed > 0 && total ? `about ${duration((total - bytes) / speed / 1000)} left` : '';
  return el('div', {class: 'progress'}, el('b', {}, here), el('span', {}, left), el('em', {}, total ? `${percent} %` : ''),
    el('div', {class: 'bar', role: 'progressbar', 'aria-label': 'Fetched', 'aria-valuemin': 0, 'aria-valuemax': 100,
      'aria-valuenow': percent}, el('i', {width: `${percent}%`})));
}

// Only changes are written: a screen reader reads each aloud.
function about(text) {
  if ($('about').textContent !== text) $('about').textContent = text;
}

const size = bytes => (bytes < 1e9 ? `${Math.round(bytes / 1e6)} MB` : `${(bytes / 1e9).toFixed(bytes < 1e10 ? 1 : 0)} GB`);

for (;;) {
  await look();
  await new Promise(resolve => setTimeout(resolve, LOOK_MS));
}
