"""How the page looks: one stylesheet, system fonts, nothing from elsewhere."""

EMPTY_STAGE = '<p class="note">Describe a scene and press Generate.</p>'

CSS = """
.gradio-container > .main, .gradio-container .wrap.sidebar-parent { max-width: none; }
.gradio-container main.contain, .gradio-container .app { width: 100%; max-width: 1320px; margin: 0 auto; }
footer { display: none !important; }
.generating, .pending { border-color: transparent !important; opacity: 1 !important; animation: none !important; }
.block:has(> .html-container), .html-container { padding: 0 !important; border: 0 !important; overflow: visible; }
#top .prose { display: flex; align-items: baseline; gap: 1rem; padding: .25rem 0 0; }
#top h1 { font-size: 1.35rem; font-weight: 650; letter-spacing: -.02em; margin: 0; }
.state { color: var(--body-text-color-subdued); font-size: .875rem; }
.dot { display: inline-block; width: .5rem; height: .5rem; border-radius: 50%; margin-right: .5rem; }
.dot.on { background: #16a34a; } .dot.off { background: #d97706; }
.stage { position: relative; display: grid; place-items: center; background: #000; border-radius: 12px; overflow: hidden;
  height: min(52vh, 540px); }
.stage video, .stage img { position: absolute; inset: 0; height: 100%; width: 100%; object-fit: contain; margin: 0; }
.stage img.preview { filter: blur(1px) saturate(1.05); }
.stage .note { color: #a8a29e; padding: 2rem; text-align: center; max-width: 40ch; margin: 0; }
#actions { justify-content: flex-start; } #actions button { flex: 0 1 auto; min-width: 0; padding-inline: 1rem; }
.progress { display: grid; grid-template-columns: auto 1fr auto; gap: .25rem .75rem; align-items: baseline;
  min-height: 2.25rem; }
.progress span { color: var(--body-text-color-subdued); font-size: .875rem; }
.progress em { font-style: normal; font-variant-numeric: tabular-nums; }
.bar { grid-column: 1 / -1; height: 4px; border-radius: 2px; background: var(--border-color-primary); overflow: hidden; }
.bar i { display: block; height: 100%; background: var(--color-accent); transition: width .6s linear; }
.details .prompt { font-size: 1.05rem; line-height: 1.5; margin: 0 0 .75rem; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.details .negative { font-size: .8125rem; color: var(--body-text-color-subdued); max-height: 4.5em; overflow: auto; }
.details dl { display: flex; flex-wrap: wrap; gap: .75rem 2rem; margin: 0 0 .75rem; }
.details dt { font-size: .75rem; color: var(--body-text-color-subdued); }
.details dd { margin: 0; font-variant-numeric: tabular-nums; }
.fine { font-size: .8125rem; color: var(--body-text-color-subdued); margin: 0; }
.fine code { font-size: .75rem; }
.fine a { margin-left: .75rem; color: var(--body-text-color); text-decoration: underline; }
.message { margin: 0; font-size: .875rem; color: var(--body-text-color-subdued); }
.message.bad { color: #b91c1c; } .dark .message.bad { color: #f87171; }
.message.good::before { content: ""; display: inline-block; width: .5rem; height: .5rem; border-radius: 50%;
  background: #16a34a; margin-right: .5rem; }
.upload { display: block; text-align: center; cursor: pointer; font-size: var(--button-small-text-size);
  padding: var(--button-small-padding); border-radius: var(--button-small-radius);
  background: var(--button-secondary-background-fill); }
.upload:hover, .upload:focus-within { background: var(--button-secondary-background-fill-hover); }
.upload input { position: absolute; opacity: 0; width: 1px; height: 1px; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(148px, 1fr)); gap: .875rem; }
.card { text-align: left; background: none; border: 0; padding: 0; cursor: pointer; color: inherit; font: inherit;
  min-width: 0; }
.card .frame { position: relative; display: grid; place-items: center; aspect-ratio: 16 / 10; background: #000;
  border-radius: 8px; overflow: hidden; outline: 2px solid transparent; outline-offset: 2px; }
.card.chosen .frame, .card:focus-visible .frame { outline-color: var(--color-accent); }
.card img { width: 100%; height: 100%; object-fit: cover; margin: 0; }
.card .caption { display: block; margin-top: .4rem; font-size: .8125rem; line-height: 1.35; height: 2.7em;
  overflow: hidden; color: var(--body-text-color-subdued); }
.card.chosen .caption { color: var(--body-text-color); }
.badge { font-size: .75rem; color: #e7e5e4; } .badge.failed { color: #a8a29e; }
.card .line { position: absolute; left: 0; bottom: 0; height: 3px; background: var(--color-accent); }
"""

CARD_CLICKS = """
element.addEventListener('click', event => {
  const card = event.target.closest('[data-id]');
  if (card) trigger('click', {id: card.dataset.id});
});
"""

RESTORE = '<label class="upload">Settings from a video<input type="file" accept=".mp4,.mkv,video/*"></label>'

RESTORE_CLICKS = """
element.addEventListener('change', async event => {
  const file = event.target.files && event.target.files[0];
  if (!file) return;
  event.target.value = '';
  const answer = await fetch('/page/settings', {method: 'POST', body: file});
  const told = answer.ok ? await answer.json() : {error: 'This file cannot be read.'};
  trigger('click', told);
});
"""
