"""The page's own JavaScript: clicks inside its HTML, dropping a video, and reconnecting after the server restarts.

Each script runs once, when the HTML component that it belongs to is rendered; `element` is that component.
"""

import json
from collections.abc import Mapping

from wanduet.doors.page.forms import FORM_FIELDS

CARD_CLICKS = """
element.addEventListener('click', event => {
  const target = event.target.closest('[data-id], [data-older]');
  if (!target) return;
  if (target.dataset.id) scrollTo({top: 0, behavior: 'smooth'});
  trigger('click', target.dataset.id ? {id: target.dataset.id} : {older: true});
});
"""

EXAMPLE_CLICKS = """
element.addEventListener('click', event => {
  const example = event.target.closest('[data-prompt]');
  if (example) trigger('click', {prompt: example.dataset.prompt});
});
"""

# The whole page accepts a dropped video: outside of a drop target, a browser would leave the page to open it. Files
# stay in the browser, by their hashes, until one is submitted.
CLIP = """
const files = window.wanduetFiles = window.wanduetFiles || new Map();
const read = async file => {
  if (!file) return;
  document.body.classList.add('reading');
  let reply = {error: 'This file cannot be read.'};
  try {
    const answer = await fetch('/page/settings', {method: 'POST', body: file});
    if (answer.ok || answer.status === 400) reply = await answer.json();
    else if (answer.status === 413) reply = {error: 'This file is too large.'};
    else if (answer.status >= 429) reply = {error: (await answer.json()).error.message + ' Try again later.'};
  } catch (error) {
    reply = {error: 'The server does not answer.'};
  }
  document.body.classList.remove('reading');
  const hash = reply.source && reply.source.sha256;
  if (hash && !files.has(hash)) files.set(hash, {file, url: URL.createObjectURL(file)});
  trigger('click', {read: {...reply, name: file.name}});
};
const show = () => element.querySelectorAll('video[data-clip]:not([src])').forEach(video => {
  const kept = files.get(video.dataset.clip);
  if (!kept) return video.remove();
  video.onerror = () => video.remove();
  video.src = kept.url;
});
new MutationObserver(show).observe(element, {childList: true, subtree: true});
element.addEventListener('click', event => {
  const button = event.target.closest('[data-use]');
  if (button) trigger('click', {use: button.dataset.use});
});
element.addEventListener('change', event => {
  read(event.target.files && event.target.files[0]);
  event.target.value = '';
});
"""
DROP = """
const isFile = event => event.dataTransfer && [...event.dataTransfer.types].includes('Files');
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
"""

# Gradio's connection breaks with its server. Reloading the page once the server is back loses nothing: the browser
# stores the form, and the disk every job.
PULSE_SECONDS = 2
PULSE = f"""
document.addEventListener('keydown', event => {{
  if (event.key !== 'Enter' || !(event.ctrlKey || event.metaKey)) return;
  const button = document.querySelector('#generate');
  if (button) button.click();
}});
let started = null;
const pulse = async () => {{
  try {{
    const answer = await fetch('/page/pulse', {{signal: AbortSignal.timeout(10000)}});
    if (answer.status === 401) return location.assign('/login');
    if (!answer.ok) throw new Error(answer.status);
    const reply = await answer.json();
    if (started !== null && started !== reply.started) return location.reload();
    started = reply.started;
    document.body.classList.remove('offline');
  }} catch (error) {{
    document.body.classList.add('offline');
  }}
  const percent = document.querySelector('.progress em');
  document.title = (percent ? percent.textContent + ' · ' : '') + 'wanduet';
  setTimeout(pulse, {PULSE_SECONDS * 1000});
}};
pulse();
"""

# Handlers that run only in the browser. The form is written only after it was read, since the components' initial
# values would overwrite the stored ones. If storage is forbidden, nothing is stored.
REMEMBER = """(...form) => {{
  if (!window.wanduetRecalled) return;
  const named = Object.fromEntries({names}.map((name, i) => [name, form[i]]));
  try {{ localStorage.setItem({key}, JSON.stringify(named)); }} catch (error) {{ }}
}}"""
RECALL = """() => {{ try {{ return localStorage.getItem({key}); }} catch (error) {{ return null; }} }}"""
RECALLED = "() => {{ window.wanduetRecalled = true; }}"
SEND = """async outgoing => {
  if (!outgoing) return '';
  const {fields, files} = JSON.parse(outgoing);
  const body = new FormData();
  Object.entries(fields).forEach(([name, value]) => body.append(name, value));
  for (const [name, hash] of Object.entries(files)) {
    const kept = window.wanduetFiles && window.wanduetFiles.get(hash);
    if (!kept) return JSON.stringify({message: 'Choose the video again.', param: name});
    body.append(name, kept.file, kept.file.name);
  }
  document.body.classList.add('sending');
  try {
    const answer = await fetch('/v1/videos', {method: 'POST', body});
    const reply = await answer.json();
    return JSON.stringify(answer.ok ? {id: reply.id} : {message: reply.error.message, param: reply.error.param});
  } catch (error) {
    return JSON.stringify({message: 'The video could not be sent: the server does not answer, or the file changed.'});
  } finally {
    document.body.classList.remove('sending');
  }
}"""
PRESET = "label => ({values})[label]"  # without the server: a click on Generate may follow at once
FORGET_REFUSAL = "text => (text || '').includes('message bad') ? '' : text"  # it was about the form before this change
CONFIRM = "() => [confirm('Delete this video?'), null]"


def preset_script(values: Mapping[str, str | int]) -> str:
    """Return a script that converts a preset's label to its value."""
    return PRESET.format(values=json.dumps(values))


def storage_script(script: str, model: str) -> str:
    """Return one of the scripts above for a model: each model has its own stored form."""
    return script.format(key=json.dumps(f"wanduet-form-{model}"), names=json.dumps(list(FORM_FIELDS)))
