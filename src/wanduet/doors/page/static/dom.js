// Builds elements. Text is always set as text, so what users wrote is never read as HTML.

export const $ = id => document.getElementById(id);

export function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === 'class') node.className = value;
    else if (name.startsWith('on')) node.addEventListener(name.slice(2), value);
    else if (name === 'width') node.style.width = value; // a property of its style: the policy forbids the attribute
    else node.setAttribute(name, value === true ? '' : value);
  }
  node.append(...children.filter(child => child !== null && child !== undefined && child !== ''));
  return node;
}

export const button = (text, onclick, properties = {}) => el('button', {type: 'button', onclick, ...properties}, text);

// Replaces the children only if `key` differs from the last call's: what plays goes on, and focus stays.
export function render(node, key, build) {
  if (node.renderedKey === key) return;
  node.renderedKey = key;
  const place = controls(node).indexOf(document.activeElement);
  node.replaceChildren(...[build()].flat().filter(Boolean));
  if (place >= 0) controls(node)[place]?.focus();
}

const controls = node => [...node.querySelectorAll('button, input, a')];

export function message(text, kind = '') {
  return el('p', {class: `message ${kind}`}, text);
}

export function say(text, kind = '') {
  $('message').replaceChildren(...(text ? [message(text, kind)] : []));
  if (text) bring($('message'));
}

export const calm = () => matchMedia('(prefers-reduced-motion: reduce)').matches;

// Scrolls to an element that is not in view.
export const bring = node => node.scrollIntoView({block: 'nearest', behavior: calm() ? 'auto' : 'smooth'});

export function announce(text) {
  $('announce').textContent = text;
}

export function duration(seconds) {
  if (seconds < 60) return `${Math.max(1, Math.round(seconds))} s`;
  const whole = Math.round(seconds), minutes = Math.floor(whole / 60);
  if (minutes < 60) return `${minutes} min ${whole % 60} s`;
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours} h ${minutes % 60} min` : `${Math.round(minutes / 60 / 24)} days`;
}

export function playsFor(frames, fps) {
  if (!(frames > 0) || !(fps > 0)) return '';
  return Number(frames) === 1 ? '1 frame' : `${(frames / fps).toFixed(1)} s`;
}
