// The live plan. One question at a time: while one is out, the newest form waits, so an answer is never an older form's.

import * as api from './api.js';
import {$, button, el, message, playsFor, render} from './dom.js';
import {prompts, setForm} from './form.js';
import {on, state} from './state.js';

const PAUSE_MS = 120; // of typing, before the server is asked
const RETRY_MS = 3000;
const NOTES_MS = 1000; // of rest: half a prompt needs no note, and the form must not move while somebody types
let changes = 0, running = false, timer = null, notesTimer = null;

export function startPlan() {
  on('form online', ask);
  ask();
}

function ask() {
  changes += 1;
  clearTimeout(notesTimer);
  $('plan').classList.add('waiting');
  $('plan').setAttribute('aria-busy', 'true');
  if (!$('plan').firstChild) $('plan').append(message('Computing the plan'));
  clearTimeout(timer);
  timer = setTimeout(run, PAUSE_MS);
}

async function run() {
  if (running) return;
  running = true;
  let wait = null;
  try {
    for (let asked = -1; asked !== changes;) {
      asked = changes;
      const form = structuredClone(state.form);
      const plan = await api.plan(form);
      if (asked === changes) show(plan, form);
    }
  } catch (error) {
    show({kind: 'unknown', text: `The plan is not known. ${error.message}`, notes: []}, state.form);
    wait = error.status ? RETRY_MS : null; // without an answer, the stream tells when the server is back
  } finally {
    running = false;
  }
  if (wait) timer = setTimeout(ask, wait);
}

function show(plan, form) {
  const box = $('plan');
  box.classList.remove('waiting');
  box.removeAttribute('aria-busy');
  const line = settingsLine(form), count = prompts().length;
  if (count > 1 && ['good', 'slow'].includes(plan.kind)) plan.text += ` for each of the ${count} prompts`;
  render(box, JSON.stringify([plan, line]), () => [
    message(plan.text, plan.kind),
    fixes(plan),
    el('p', {class: 'fine'}, line),
    plan.work ? el('p', {class: 'fine'}, `${plan.work[0].toUpperCase()}${plan.work.slice(1)}`) : null,
    plan.memory?.length ? el('ul', {class: 'memory'}, ...plan.memory.map(row)) : null,
  ]);
  clearTimeout(notesTimer);
  const notes = plan.notes || [];
  const showNotes = () => render($('notes'), JSON.stringify(notes), () => notes.map(text => message(text, 'note')));
  if (notes.length) notesTimer = setTimeout(showNotes, NOTES_MS);
  else showNotes();
}

export function fixes(plan) {
  if (!plan.fixes?.length) return null;
  return el('p', {class: 'fixes'}, ...plan.fixes.map(({text, set}) => button(text, () => setForm(set))));
}

function row({name, text, share, fits}) {
  const bar = el('b', {'aria-hidden': true}, el('i', {width: `${Math.round(100 * share)}%`}));
  return el('li', {class: fits ? '' : 'bad'}, el('span', {}, name), el('span', {}, fits ? text : `${text}: too much`), bar);
}

// The form in one line, for when only the presets are visible.
function settingsLine(form) {
  const clip = state.about.files.map(name => form[name]).find(Boolean);
  return [
    String(form.size || '').replace('x', ' × '),
    playsFor(form.num_frames, form.fps),
    form.timesteps ? `timesteps ${form.timesteps}` : `${form.num_inference_steps} steps`,
    clip ? `starts from ${clip.name}` : '',
    form.seed === '' || form.seed === null ? 'a new seed' : `seed ${form.seed}`,
    form.num_videos_per_prompt > 1 ? `${form.num_videos_per_prompt} videos` : '',
    ...(form.loras || []).map(({name, strength}) => `${name} ${strength}`),
  ].filter(Boolean).join(' · ');
}
