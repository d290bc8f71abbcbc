// The page's one connection for news: the server's state and every change of a job.

import * as api from './api.js';
import {$} from './dom.js';
import {emit, newestFirst, on, state, take, takeNewest} from './state.js';

const GRACE_MS = 1500; // a stream that ends is opened again at once; only a longer absence is worth a word
const RETRY_MS = 2000;
let away = null, started = null, known = null;

export function startStream() {
  on('videos server', showServer);
  connect();
}

function connect() {
  const source = new EventSource('/page/events');
  let isFirst = true;
  source.addEventListener('open', () => { isFirst = true; online(); });
  source.addEventListener('server', event => takeServer(JSON.parse(event.data)));
  source.addEventListener('videos', event => {
    const news = JSON.parse(event.data);
    if (isFirst) takeNewest(news, known || []);
    else take(news.videos, news.deleted);
    isFirst = false;
    known = null;
  });
  source.addEventListener('error', event => {
    if (event.data) { // the server's own event: the key was revoked
      source.close();
      location.assign('/login');
      return;
    }
    known ||= [...state.videos.keys()];
    away ||= setTimeout(offline, GRACE_MS);
    if (source.readyState === EventSource.CLOSED) reconnect();
  });
}

// A refused stream is not opened again by the browser: ask why, which also leads to the login.
async function reconnect() {
  await api.about().catch(() => {});
  setTimeout(connect, RETRY_MS);
}

async function takeServer(now) {
  Object.assign(state, {ready: now.ready, reason: now.reason});
  emit('server');
  if (started !== null && started !== now.started) { // another run: with the same model, the page goes on
    const about = await api.about().catch(() => null);
    if (about && JSON.stringify(about) !== JSON.stringify(state.about)) location.reload();
  }
  started = now.started;
}

function offline() {
  document.body.classList.add('offline');
  $('offline').hidden = false;
}

function online() {
  clearTimeout(away);
  const wasAway = away !== null;
  away = null;
  document.body.classList.remove('offline');
  $('offline').hidden = true;
  if (wasAway) emit('online');
}

function showServer() {
  const jobs = newestFirst();
  const counts = [['in_progress', 'running'], ['queued', 'waiting']].map(([status, word]) => {
    const count = jobs.filter(job => job.status === status).length;
    return count ? ` · ${count} ${word}` : '';
  });
  const words = state.ready ? 'ready' : state.reason || 'starting, or no worker runs';
  $('server').textContent = `${state.about.model} · ${words}${counts.join('')}`;
  document.querySelector('.dot').className = `dot ${state.ready ? 'on' : 'off'}`;
}
