// Sends what is in the form, or a job again.

import * as api from './api.js';
import {$, message, say} from './dom.js';
import {chosenFiles} from './clip.js';
import {prompts} from './form.js';
import {fixes} from './plan.js';
import {chooseUnlessChanged, on, state, take} from './state.js';

let sending = false;

export function startSubmit() {
  $('form').addEventListener('submit', event => { event.preventDefault(); submit(); });
  $('form').addEventListener('keydown', event => { // Enter in a setting only ends its input
    if (event.key === 'Enter' && event.target.matches('input')) event.preventDefault();
  });
  document.addEventListener('keydown', event => {
    if (event.key !== 'Enter' || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    submit();
  });
  on('form', () => { if ($('message').querySelector('.bad')) say(''); }); // it was about the form before this change
}

async function submit() {
  if (sending) return;
  sending = true;
  const before = state.choices, wanted = prompts(), form = structuredClone(state.form);
  $('generate').setAttribute('aria-disabled', 'true');
  let made = 0;
  try {
    for (const prompt of wanted) {
      const id = await send({...form, prompt});
      if (!id) break;
      made += 1;
      await show(id, before, made === 1);
    }
    if (wanted.length > 1 && made === wanted.length) say(`${made} videos are in the queue.`);
  } catch (error) {
    const count = made ? `${made} of ${wanted.length} videos are in the queue. ` : '';
    say(count + inWords(error), 'bad');
  } finally {
    sending = false;
    $('generate').removeAttribute('aria-disabled');
    document.body.classList.remove('sending');
  }
}

// Returns the new job's id; null if the form was refused.
async function send(form) {
  const {fields, refused} = await api.fields(form);
  if (refused) {
    const hints = fixes(refused);
    $('message').replaceChildren(message(refused.text, 'bad'), ...(hints ? [hints] : []));
    return null;
  }
  say('');
  const stored = state.about.files.map(name => form[name]?.job).find(Boolean);
  if (stored) return (await api.again(stored, fields)).id;
  const files = chosenFiles(form);
  if (Object.keys(files).length) document.body.classList.add('sending');
  return (await api.create(fields, files)).id;
}

// Submits a job's request again, with its seed or with a new one.
export async function repeat(job, newSeed) {
  const before = state.choices;
  try {
    const settings = Object.entries(job.settings).filter(([name, value]) =>
      value !== null && !state.about.files.includes(name) && !(newSeed && name === 'seed'));
    const fields = {...Object.fromEntries(settings), prompt: job.prompt};
    if (newSeed && !job.finished) take([{...job, ...await cancelled(job)}]);
    const made = job.has_input ? await api.again(job.id, fields) : await api.create(fields);
    say('');
    await show(made.id, before, true);
  } catch (error) {
    say(inWords(error), 'bad');
  }
}

export async function cancelled(job) {
  await api.cancel(job.id);
  return (await api.find(job.id)).video;
}

async function show(id, before, isFirst) {
  const {video} = await api.find(id);
  take(state.videos.has(id) ? [] : [video]);
  if (isFirst) chooseUnlessChanged(id, before);
}

// The API's message, with its field named as on the page.
export function inWords({message: text, param}) {
  const field = state.about.fields[param];
  if (!field) return text;
  const words = text.split(' is not allowed: ').at(-1);
  return `${field.name}: ${words.startsWith(`${param}: `) ? words.slice(param.length + 2) : words}`;
}
