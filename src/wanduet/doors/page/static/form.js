// The form, built from the server's description of a request's fields.

import {$, el} from './dom.js';
import {emit, state, store, stored} from './state.js';

const controls = {}; // by field: {box, show(value)}
const key = () => `wanduet-form-${state.about.model}`;
const isSet = value => value !== undefined && value !== null && value !== '';

export function buildForm() {
  const {about} = state;
  const remembered = stored(key(), {});
  const known = Object.keys(about.fields).filter(name => !about.files.includes(name) && name in remembered);
  state.form = {...about.defaults, ...Object.fromEntries(known.map(name => [name, remembered[name]]))};
  buildPrompt();
  for (const row of about.rows) $('rows').append(el('div', {class: 'row'}, ...row.map(name => field(name))));
  for (const preset of about.presets) $('presets').append(presetRow(preset));
  $('reset').addEventListener('click', () => setForm({...about.defaults, prompt: state.form.prompt, ...filesOf(state.form)}));
  for (const line of advice()) $('advice').append(el('li', {}, line));
  showForm();
}

export const filesOf = form => Object.fromEntries(state.about.files.map(name => [name, form[name] ?? null]));

// Fields that need a file, for the panel that shows it.
export const needing = file => Object.keys(state.about.fields).filter(name => state.about.fields[name].needs === file);

export function setForm(values) {
  Object.assign(state.form, values);
  showForm();
  changed();
}

export function prompts() {
  const lines = $('batch').checked ? state.form.prompt.split('\n') : [state.form.prompt];
  const found = lines.map(line => line.trim()).filter(Boolean);
  return found.length ? found : [''];
}

function changed() {
  state.edits += 1;
  store(key(), Object.fromEntries(Object.entries(state.form).filter(([name]) => !state.about.files.includes(name))));
  showDependencies();
  emit('form');
}

function edit(name, value) {
  state.form[name] = value;
  changed();
}

export function showForm() {
  for (const [name, control] of Object.entries(controls)) control.show(state.form[name]);
  showDependencies();
}

function showDependencies() {
  const {fields, presets} = state.about;
  for (const [name, control] of Object.entries(controls)) {
    const by = Object.keys(fields).find(other => fields[other].replaces.includes(name) && isSet(state.form[other]));
    control.box.classList.toggle('replaced', Boolean(by));
    if (fields[name].needs) control.box.hidden = !state.form[fields[name].needs];
  }
  for (const {label, field, values} of presets)
    for (const [name, value] of Object.entries(values))
      document.getElementById(`preset-${label}-${name}`).checked = String(state.form[field]) === String(value);
  const count = prompts().length;
  $('generate').textContent = count > 1 ? `Generate ${count} videos` : 'Generate';
}

function buildPrompt() {
  const {about} = state, box = $('prompt');
  box.maxLength = about.fields.prompt.longest;
  box.placeholder = about.examples[0];
  box.addEventListener('input', () => edit('prompt', box.value));
  $('batch').addEventListener('change', () => { box.rows = $('batch').checked ? 8 : 4; changed(); });
  controls.prompt = {box: box.parentElement, show: value => { if (box.value !== value) box.value = value || ''; }};
}

function presetRow({label, field, values}) {
  const choices = Object.entries(values).map(([name, value]) => {
    const price = field === 'speed' ? speedWords(value) : '';
    const input = el('input', {type: 'radio', name: `preset-${label}`, id: `preset-${label}-${name}`, value: name,
      onchange: () => setForm({[field]: value})});
    return el('label', {title: price}, input, el('span', {}, name));
  });
  return el('fieldset', {}, el('legend', {}, label), el('div', {class: 'choices'}, ...choices));
}

const speedWords = speed => [speed, state.about.speeds[speed]].filter(Boolean).join(': ');

// Returns the labelled control of a field, with its hint.
export function field(name) {
  const about = state.about.fields[name], id = `field-${name}`;
  const common = {id, 'aria-describedby': `${id}-hint`};
  const {nodes, show} = (kinds[about.kind] || kinds.short)(name, about, common);
  const hint = el('span', {class: 'hint', id: `${id}-hint`, role: 'tooltip'}, about.help);
  const box = el('div', {class: `field ${about.kind}`}, el('label', {for: id}, about.label), ...nodes, hint);
  controls[name] = {box, show};
  return box;
}

const kinds = {
  choice(name, about, common) {
    const options = about.choices.map(value => el('option', {value}, name === 'speed' ? speedWords(value) : value));
    const input = el('select', {...common, onchange: () => edit(name, input.value)}, ...options);
    return {nodes: [input], show: value => { input.value = value; }};
  },
  switch(name, about, common) {
    const input = el('input', {...common, type: 'checkbox', onchange: () => edit(name, input.checked)});
    return {nodes: [input], show: value => { input.checked = Boolean(value); }};
  },
  text(name, about, common) {
    const kind = about.lines > 1 ? ['textarea', {rows: about.lines}] : ['input', {type: 'text'}];
    const input = el(kind[0], {...kind[1], ...common, placeholder: about.placeholder, oninput: () => edit(name, input.value)});
    return {nodes: [input], show: value => { if (input.value !== value) input.value = value ?? ''; }};
  },
  short(name, about, common) {
    const input = el('input', {...common, type: 'text', maxlength: about.longest, placeholder: about.placeholder,
      autocomplete: 'off', oninput: () => edit(name, input.value)});
    return {nodes: [input], show: value => { if (input.value !== String(value)) input.value = value ?? ''; }};
  },
  size(name, about, common) {
    const list = el('datalist', {id: 'sizes'}, ...about.choices.map(value => el('option', {value})));
    const {nodes, show} = kinds.short(name, about, {...common, list: 'sizes'});
    return {nodes: [...nodes, list], show};
  },
  number(name, {min, max, step}, common) {
    const take = from => { edit(name, from.value === '' ? '' : Number(from.value)); show(state.form[name], from); };
    const input = el('input', {...common, type: 'number', min, max, step: 'any', oninput: () => take(input)});
    const slider = el('input', {type: 'range', min, max, step, tabindex: -1, 'aria-hidden': true, oninput: () => take(slider)});
    const show = (value, from) => {
      if (from !== input) input.value = value;
      if (from !== slider) slider.value = value;
    };
    return {nodes: [el('div', {class: 'pair'}, slider, input)], show};
  },
};

function advice() {
  if (state.about.is_miniature)
    return [`Name a colour, a shape, what it does, and a background of another colour: “${state.about.examples[0]}”.`,
      'Shapes: circle, square, triangle, star, heart. They move, spin, bounce, grow or shrink.',
      'It also knows a few scenes: sunrise over the sea, fireworks over a city, a rocket flying to the stars.'];
  return ['Begin with the subject and what it does, then the place, the light and the camera.',
    'Two to four sentences work best. Name colours, materials, weather and time of day.',
    'Say how the camera moves: static shot, slow pan, close-up, seen from above.',
    'What must not be seen belongs into the negative prompt under “All settings”.'];
}

