// Starts the page once the server has said what it is built from.

import * as api from './api.js';
import {$, message} from './dom.js';
import {startClip} from './clip.js';
import {buildForm} from './form.js';
import {startGallery} from './gallery.js';
import {startJob} from './job.js';
import {startLoras} from './loras.js';
import {showModels} from './models.js';
import {startNotify} from './notify.js';
import {startPlan} from './plan.js';
import {state} from './state.js';
import {startStream} from './stream.js';
import {startSubmit} from './submit.js';

try {
  state.about = await api.about();
  $('leave').hidden = !state.about.signed_in;
  buildForm();
  startClip();
  showModels();
  startLoras();
  startPlan();
  startSubmit();
  startJob();
  startGallery();
  startNotify();
  startStream();
} catch (error) {
  $('plan').replaceChildren(message(`The page cannot start. ${error.message}`, 'bad'));
}
