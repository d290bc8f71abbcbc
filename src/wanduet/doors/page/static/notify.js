// A sound and a notification when a video is done, if the visitor has asked for them.

import {$} from './dom.js';
import {on, state, store, stored} from './state.js';

const KEY = 'wanduet-notify';
let wanted = stored(KEY, false), audio = null;

export function startNotify() {
  show();
  // Browsers allow sound only after a click or a key.
  for (const kind of ['click', 'keydown']) document.addEventListener(kind, () => { if (wanted) audio ||= new AudioContext(); });
  $('notify').addEventListener('click', async () => {
    wanted = !wanted;
    store(KEY, wanted);
    show();
    if (!wanted) return;
    if ('Notification' in window && Notification.permission === 'default') await Notification.requestPermission();
  });
  on('ended', video => { if (wanted) tell(video); });
}

function show() {
  $('notify').setAttribute('aria-pressed', wanted);
  $('notify').textContent = wanted ? 'Notifying' : 'Notify me';
}

function tell(video) {
  if (video.error?.code === 'cancelled') return;
  beep();
  if (!('Notification' in window) || Notification.permission !== 'granted' || !document.hidden) return;
  const notification = new Notification(`${video.title}: ${state.about.model}`, {body: video.prompt, tag: video.id});
  notification.onclick = () => window.focus();
}

function beep() {
  if (!audio) return;
  const tone = audio.createOscillator(), volume = audio.createGain(), now = audio.currentTime;
  tone.frequency.value = 660;
  volume.gain.setValueAtTime(0.08, now);
  volume.gain.exponentialRampToValueAtTime(0.001, now + 0.5);
  tone.connect(volume).connect(audio.destination);
  tone.start(now);
  tone.stop(now + 0.5);
}
