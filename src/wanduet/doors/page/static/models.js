// Which model the server runs, and how another one is started in its place.

import {$, el} from './dom.js';
import {state} from './state.js';

export function showModels() {
  const {model, models: {served, others}} = state.about;
  $('model').firstElementChild.append(': ', el('b', {}, short(model)));
  $('model').append(
    el('p', {class: 'fine'}, `${served} by default. A server runs one model. Whoever runs this one can start another in its place:`),
    el('ul', {}, ...others.map(({name, about, command}) =>
      el('li', {}, el('b', {}, short(name)), el('span', {class: 'fine'}, about), el('code', {}, command)))),
    el('p', {class: 'fine', id: 'no-loras'}, 'LoRA files in the folder of ', el('code', {}, '--lora-dir'),
      ' are offered here, with a strength each. Those for few steps (CausVid, LightX2V) set their steps, too.'));
}

const short = name => name.split('/').at(-1).replace(/-Diffusers$/, '');
