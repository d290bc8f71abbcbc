// The LoRA of the server that the next videos use, each with its strength. Nothing of it is shown if the server has none.

import * as api from './api.js';
import {$, button, el, render, say} from './dom.js';
import {setForm} from './form.js';
import {on, state} from './state.js';

const STRONGEST = 2; // of the slider; the number beside it takes what the server takes
let files = [], isLoaded = false;

export async function startLoras() {
  on('form', show);
  files = (await api.loras().catch(() => ({data: []}))).data;
  isLoaded = true;
  dropUnknown();
  show();
}

const chosen = () => state.form.loras || [];
const set = loras => setForm({loras});

// Removes from the form what the server does not have, and says so. Before the list has come, everything may be there.
export function dropUnknown() {
  const has = ({name}) => !isLoaded || files.some(file => file.name === name);
  const gone = chosen().filter(lora => !has(lora)).map(({name}) => name);
  if (!gone.length) return;
  set(chosen().filter(has));
  say(`This server does not have the LoRA ${gone.join(', ')} any more.`);
}

function show() {
  $('loras').hidden = !files.length && !chosen().length;
  $('no-loras').hidden = !$('loras').hidden;
  render($('loras'), JSON.stringify([files, chosen().map(({name}) => name)]), () => [
    el('span', {class: 'title', id: 'loras-title'}, 'LoRA'), el('div', {}, ...chosen().map(row), choice())]);
  for (const [index, {strength}] of chosen().entries())
    for (const input of $('loras').querySelectorAll(`[data-index="${index}"]`))
      if (input !== document.activeElement || input.type === 'range') input.value = strength;
}

function row({name}, index) {
  const file = files.find(one => one.name === name);
  const common = {'data-index': index, 'aria-label': `Strength of ${name}`};
  const take = input => {
    if (input.value !== '') set(chosen().map((lora, place) => (place === index ? {...lora, strength: Number(input.value)} : lora)));
  };
  const slider = el('input', {...common, type: 'range', min: 0, max: STRONGEST, step: 0.05, tabindex: -1, 'aria-hidden': true,
    oninput: () => take(slider)});
  const number = el('input', {...common, type: 'number', min: -10, max: 10, step: 'any', oninput: () => take(number)});
  return el('div', {class: 'lora field'},
    el('span', {class: 'name', title: facts(file)}, name),
    el('div', {class: 'pair'}, slider, number),
    button('×', () => set(chosen().filter((_, place) => place !== index)), {class: 'leave', 'aria-label': `Remove ${name}`, title: 'Remove'}),
    file?.fits === false ? el('span', {class: 'message bad'}, `It does not fit: ${file.problem}.`) : null);
}

function choice() {
  const options = files.filter(({name}) => !chosen().some(lora => lora.name === name))
    .map(file => el('option', {value: file.name, disabled: !file.fits, title: facts(file)},
      file.fits ? file.name : `${file.name} (does not fit: ${file.problem})`));
  if (!options.length) return null;
  if (options.every(option => option.disabled)) options.unshift(el('option', {value: ''}, 'No other fits'));
  const select = el('select', {'aria-labelledby': 'loras-title'}, ...options);
  return el('div', {class: 'field add'}, select, button('Add', () => add(select.value), {disabled: !select.value}));
}

// A few-step LoRA is trained for its own steps: they are set, too.
function add(name) {
  const few = Object.entries(files.find(file => file.name === name)?.few_step || {})
    .filter(([field]) => field in state.about.fields)
    .map(([field, value]) => [field, Array.isArray(value) ? value.join(',') : value]);
  setForm({...Object.fromEntries(few), loras: [...chosen(), {name, strength: 1}]});
  [...$('loras').querySelectorAll('[type=number]')].at(-1).focus();
}

function facts(file) {
  if (!file) return '';
  const rank = file.rank ? `rank ${[...new Set(file.rank)].join(' to ')}` : '';
  return [file.kinds.join(', '), rank, file.few_step ? `few steps: ${file.few_step.name}` : ''].filter(Boolean).join(' · ');
}
