// Calls of the server: its own API, and the page's routes. A refusal is an error with the API's message and field.

export class Refused extends Error {
  constructor(status, {message, param, code} = {}) {
    super(message || `The server answers with an error (${status}).`);
    Object.assign(this, {status, param, code});
  }
}

const AWAY = 'The server does not answer.';

async function call(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch (error) {
    if (error.name === 'AbortError') throw error;
    throw new Refused(0, {message: AWAY});
  }
  if (answer.status === 401) location.assign('/login');
  const body = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Refused(answer.status, typeof body.error === 'string' ? {message: body.error} : body.error);
  return body;
}

const json = body => ({method: 'POST', headers: {'Content-Type': 'application/json'}, body: JSON.stringify(body)});
const video = id => `/v1/videos/${encodeURIComponent(id)}`;

export const about = () => call('/page/about');
export const model = () => call('/page/model');
export const startFetch = form => call(`/page/model/fetch?form=${encodeURIComponent(form)}`, {method: 'POST'});
export const stopFetch = () => call('/page/model/stop', {method: 'POST'});
export const takeMiniature = () => call('/page/model/miniature', {method: 'POST'});
export const plan = form => call('/page/plan', json(form));
export const fields = form => call('/page/fields', json(form));
export const follow = form => call('/page/follow', json(form));
export const loras = () => call('/v1/loras');
export const find = id => call(`/page/videos/${encodeURIComponent(id)}`);
export const older = after => call(`/page/videos?after=${encodeURIComponent(after)}`);
export const again = (id, fields) => call(`/page/videos/${encodeURIComponent(id)}/again`, json(fields));
export const cancel = id => call(`${video(id)}/cancel`, {method: 'POST'});
export const remove = id => call(video(id), {method: 'DELETE'});
export const content = (id, variant, index = 0) => `${video(id)}/content?variant=${variant}${index ? `&index=${index}` : ''}`;
export const preview = (id, version) => `${video(id)}/preview?v=${version}`;

// `files`: by field, a file that the visitor chose.
export function create(fields, files = {}) {
  if (!Object.keys(files).length) return call('/v1/videos', json(fields));
  const body = new FormData();
  for (const [name, value] of Object.entries(fields)) body.append(name, typeof value === 'object' ? JSON.stringify(value) : value);
  for (const [name, file] of Object.entries(files)) body.append(name, file, file.name);
  return call('/v1/videos', {method: 'POST', body});
}

// What a video can be used for; a video that can be used for nothing has an `error` alone.
export async function read(file) {
  try {
    return await call('/page/settings', {method: 'POST', body: file});
  } catch (error) {
    if (error.status === 413) return {error: 'This file is too large.'};
    return {error: error.status >= 429 ? `${error.message} Try again later.` : error.message};
  }
}
