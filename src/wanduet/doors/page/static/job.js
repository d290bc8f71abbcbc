// The chosen job: its preview or video, progress, actions and settings; or several videos side by side.

import * as api from './api.js';
import {$, announce, button, duration, el, render, say} from './dom.js';
import {setForm} from './form.js';
import {ahead, emit, on, shownJob, state, take} from './state.js';
import {cancelled, inWords, repeat} from './submit.js';

let announced = '';

export function startJob() {
  on('videos', show);
  show();
}

function show() {
  const compared = state.compared.map(id => state.videos.get(id)).filter(Boolean);
  const job = compared.length > 1 ? null : shownJob();
  if (compared.length > 1) showCompared(compared);
  else showStage(job);
  render($('progress'), JSON.stringify(job && [job.id, job.status, job.phase, job.progress, job.seconds_left, ahead(job)]),
    () => (job ? [progress(job)] : []));
  render($('actions'), JSON.stringify(job && [job.id, job.title]), () => (job ? actions(job) : []));
  render($('details'), JSON.stringify(job && [job.id, job.rows, job.title, job.warnings]), () => (job ? details(job) : []));
  document.title = `${job?.status === 'in_progress' ? `${job.progress} % · ` : ''}wanduet`;
  const state_of_it = job ? `${job.id} ${job.title}` : '';
  if (state_of_it !== announced && job) announce(`${job.title}: ${job.prompt}`);
  announced = state_of_it;
}

function showStage(job) {
  if (!job) {
    render($('stage'), 'empty', () => emptyStage());
    return;
  }
  render($('stage'), `${job.id} ${job.title}`, () => {
    const many = job.videos > 1 ? ' many' : '';
    return el('div', {class: `stage${many}`}, ...inside(job));
  });
  if (job.status === 'in_progress' && job.preview) showPreview(job);
}

function inside(job) {
  if (job.status === 'completed') return Array.from({length: job.videos}, (_, index) => player(job, index));
  if (job.error) {
    const text = job.error.code === 'cancelled' ? 'Stopped before it was done.' : job.error.message;
    return [el('p', {class: 'note'}, text)];
  }
  return [el('p', {class: 'note'}, job.status === 'queued' ? job.waits_for || 'Waiting for its turn' : 'Taking shape')];
}

function player(job, index, id = index ? null : 'player') {
  const video = el('video', {id, src: api.content(job.id, 'video', index), poster: api.content(job.id, 'thumbnail', index),
    controls: true, autoplay: true, loop: true, playsinline: true, 'aria-label': job.prompt});
  video.muted = true;
  return video;
}

// Replaces the preview once the next one is loaded, unless another job is shown by then.
function showPreview(job) {
  const stage = $('stage').firstChild;
  if (stage.preview === job.preview) return;
  stage.preview = job.preview;
  const image = el('img', {class: 'preview', alt: 'Preview'});
  image.addEventListener('load', () => {
    if (stage.preview === job.preview) stage.replaceChildren(image, el('span', {class: 'tag'}, 'Preview'));
  });
  image.src = api.preview(job.id, job.preview);
}

function emptyStage() {
  const examples = state.about.examples.map(text => button(text, () => setForm({prompt: text})));
  return el('div', {class: 'stage empty'}, el('div', {class: 'note'},
    el('p', {}, 'Describe a scene and press Generate, or start with one of these.'), el('div', {class: 'examples'}, ...examples)));
}

function showCompared(jobs) {
  render($('stage'), `compare ${jobs.map(job => job.id)}`, () => {
    const videos = jobs.map(job => player(job, 0, null));
    const together = () => { for (const video of videos) { video.currentTime = 0; video.play().catch(() => {}); } };
    const figures = jobs.map((job, index) => el('figure', {}, videos[index],
      el('figcaption', {}, differences(jobs, job), ' ', button('Show', () => emit('choose', job.id), {class: 'plain'}))));
    return [el('div', {class: 'compare'}, ...figures),
      el('p', {class: 'buttons'}, button('Play together', together), button('Close', () => { state.compared = []; emit('videos'); }))];
  });
}

// What of a job's settings is not the same in all that are compared.
function differences(jobs, job) {
  const value = (one, label) => one.rows.find(([name]) => name === label)?.[1];
  const labels = [...new Set(jobs.flatMap(one => one.rows.map(([name]) => name)))];
  const words = labels.filter(label => jobs.some(one => value(one, label) !== value(job, label)))
    .map(label => `${label} ${value(job, label) ?? '–'}`);
  if (jobs.some(one => one.prompt !== job.prompt)) words.unshift(job.prompt);
  return words.join(' · ') || job.prompt;
}

function progress(job) {
  if (job.status === 'in_progress') {
    const bar = el('div', {class: 'bar', role: 'progressbar', 'aria-label': job.phase, 'aria-valuemin': 0,
      'aria-valuemax': 100, 'aria-valuenow': job.progress}, el('i', {width: `${job.progress}%`}));
    const left = job.seconds_left ? `about ${duration(job.seconds_left)} left` : '';
    return el('div', {class: 'progress'}, el('b', {}, job.phase), el('span', {}, left), el('em', {}, `${job.progress} %`), bar);
  }
  let note = '';
  if (job.status === 'completed' && job.took) note = `made in ${duration(job.took)}`;
  if (job.status === 'queued') {
    const count = ahead(job);
    const before = count ? `${count} of your videos ${count === 1 ? 'is' : 'are'} before it; ` : '';
    note = `${before}you can close this page, it stays in the queue`;
  }
  return el('div', {class: 'progress'}, el('b', {}, job.title), el('span', {}, note));
}

function actions(job) {
  const open = !job.finished;
  return [
    open ? button('Cancel', attempt(async () => take([await cancelled(job)]))) : null,
    job.error ? button('Try again', () => repeat(job, false)) : null,
    button(open ? 'Cancel, try a new seed' : 'Same with a new seed', () => repeat(state.videos.get(job.id) || job, true)),
    button('Use these settings', attempt(() => reuse(job))),
    button('Delete', () => remove([job]), {class: 'plain'}),
  ];
}

const attempt = work => async () => {
  try {
    await work();
  } catch (error) {
    say(inWords(error), 'bad');
  }
};

async function reuse(job) {
  const before = state.edits;
  const {form} = await api.find(job.id);
  if (before === state.edits) setForm({...state.about.defaults, ...form});
}

export async function remove(jobs) {
  const question = jobs.length === 1 ? 'Delete this video?' : `Delete ${jobs.length} videos?`;
  if (!confirm(question)) return;
  await attempt(async () => {
    for (const {id} of jobs) {
      await api.remove(id).catch(error => { if (error.status !== 404) throw error; });
      take([], [id]);
    }
  })();
}

function details(job) {
  const rows = job.rows.map(([name, value]) => el('div', {}, el('dt', {}, name), el('dd', {}, value)));
  const without = job.settings.negative_prompt;
  const made = new Date(1000 * job.created_at).toLocaleString('en-GB', {dateStyle: 'medium', timeStyle: 'short'});
  return el('div', {class: 'details'},
    el('p', {class: 'prompt'}, job.prompt),
    ...[...job.notes, ...job.warnings].map(text => el('p', {class: 'message note'}, text)),
    el('dl', {}, ...rows),
    without ? el('p', {class: 'negative'}, el('b', {}, 'Without: '), without) : null,
    el('p', {class: 'fine'}, ...downloads(job), `${job.model} · ${made} · `, el('code', {}, job.id)));
}

export function downloads(job) {
  if (job.status !== 'completed') return [];
  return Array.from({length: job.videos}, (_, index) => el('a', {
    href: api.content(job.id, 'video', index), download: `${job.id}${index ? `-${index + 1}` : ''}.mp4`,
  }, job.videos === 1 ? 'Download the MP4' : `Download MP4 ${index + 1}`));
}
