"""The page's stylesheet: system fonts, nothing from other hosts."""

CSS = """
.gradio-container > .main, .gradio-container .wrap.sidebar-parent { max-width: none; }
.gradio-container main.contain, .gradio-container .app { width: 100%; max-width: 1360px; margin: 0 auto; }
footer { display: none !important; }
.generating, .pending { border-color: transparent !important; opacity: 1 !important; animation: none !important; }
.block:has(> .html-container), .html-container { padding: 0 !important; border: 0 !important; overflow: visible;
  background: none !important; }
.gradio-container { --quiet: #78716c; } .gradio-container.dark, .dark .gradio-container { --quiet: #a8a29e; }
#desk { align-items: flex-start; gap: 1.75rem; }
#form, #result { gap: .875rem; }

#top .prose { display: flex; align-items: baseline; gap: 1rem; padding: .25rem 0 0; }
#top h1 { font-size: 1.35rem; font-weight: 650; letter-spacing: -.02em; margin: 0; }
#top form { margin-left: auto; }
#top form button { color: var(--quiet); font-size: .875rem; text-decoration: underline; }
h2 { font-size: 1.05rem !important; font-weight: 650 !important; margin: 1rem 0 0 !important; }
.state { color: var(--quiet); font-size: .875rem; }
.dot { display: inline-block; width: .5rem; height: .5rem; border-radius: 50%; margin-right: .5rem; }
.dot.on { background: #16a34a; } .dot.off { background: #d97706; }

#presets, #presets .form { gap: .5rem; border: 0; background: none; box-shadow: none; overflow: visible; }
#presets fieldset { display: grid; grid-template-columns: 4.25rem 1fr; align-items: center; flex: 1 1 100% !important;
  border: 0 !important; padding: 0; background: none; box-shadow: none; overflow: visible; }
#presets fieldset > span { margin: 0; }
#presets .wrap:not(.hide) { display: flex; gap: 0; flex-wrap: nowrap; background: var(--input-background-fill);
  border-radius: 8px; padding: 3px; }
#presets label { flex: 1 1 auto; justify-content: center; border: 0; box-shadow: none; background: none; cursor: pointer;
  padding: .3rem .5rem; border-radius: 6px; color: var(--quiet); }
#presets label span { margin: 0; font-size: .8125rem; white-space: nowrap; }
#presets label input { position: absolute; opacity: 0; pointer-events: none; }
#presets label.selected { background: var(--background-fill-primary); color: var(--body-text-color);
  box-shadow: 0 1px 2px rgb(0 0 0 / .18); }
#presets label:focus-within { outline: 2px solid var(--color-accent); }
.dark #presets label.selected { background: #57534e; }
.dark input[type=range] { --neutral-200: #57534e; }

#plan { margin-top: -.25rem; }
.memory { list-style: none; margin: .375rem 0 0 !important; padding: 0 !important; font-size: .8125rem;
  color: var(--quiet); font-variant-numeric: tabular-nums; }
.memory li { display: grid; grid-template-columns: 1fr auto; gap: .125rem 1rem; margin: 0 0 .25rem !important; }
.memory b { grid-column: 1 / -1; height: 3px; border-radius: 2px; background: var(--border-color-primary); }
.memory i { display: block; height: 100%; min-width: 3px; border-radius: 2px; background: #16a34a; }
.message.bad ~ .memory i { background: #dc2626; }
.message { margin: 0; font-size: .875rem; color: var(--quiet); }
.message.good { color: var(--body-text-color); }
.message.bad { color: #b91c1c; } .dark .message.bad { color: #f87171; }
.message.good::before { content: ""; display: inline-block; width: .5rem; height: .5rem; border-radius: 50%;
  background: #16a34a; margin-right: .5rem; }

.stage { position: relative; display: grid; place-items: center; background: #000; border-radius: 12px; overflow: hidden;
  height: min(54vh, 560px); }
.stage.empty { background: var(--background-fill-secondary); border: 1px dashed var(--border-color-primary); }
.stage video, .stage img { position: absolute; inset: 0; height: 100%; width: 100%; object-fit: contain; margin: 0; }
.stage.many { grid-template-columns: 1fr 1fr; gap: 2px; grid-auto-rows: minmax(0, 1fr); }
.stage.many video { position: static; min-height: 0; }
.stage img.preview { filter: blur(1px) saturate(1.05); }
.stage .tag { position: absolute; top: .75rem; left: .75rem; padding: .125rem .5rem; border-radius: 4px;
  font-size: .75rem; color: #e7e5e4; background: rgb(0 0 0 / .55); }
.stage .note { color: #a8a29e; padding: 1.5rem; text-align: center; max-width: 46ch; margin: 0; }
.stage.empty .note { color: var(--quiet); }
.examples { display: grid; gap: .5rem; margin-top: 1rem; }
.examples button { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: .5rem .75rem;
  background: var(--background-fill-primary); color: var(--body-text-color); font: inherit; font-size: .875rem;
  cursor: pointer; }
.examples button:hover, .examples button:focus-visible { border-color: var(--color-accent); }

#actions { justify-content: flex-start; gap: .5rem; }
#actions button { flex: 0 1 auto; min-width: 0; width: auto; padding-inline: .875rem; white-space: nowrap; }
#actions button:last-child { margin-left: auto; background: none; color: var(--quiet); }
#actions button:last-child:hover { color: #dc2626; }
.progress { display: grid; grid-template-columns: auto 1fr auto; gap: .25rem .75rem; align-items: baseline; }
.progress span { color: var(--quiet); font-size: .875rem; }
.progress em { font-style: normal; font-variant-numeric: tabular-nums; }
.bar { grid-column: 1 / -1; height: 4px; border-radius: 2px; background: var(--border-color-primary); overflow: hidden; }
.bar i { display: block; height: 100%; background: var(--color-accent); transition: width .6s linear; }
.details .prompt { font-size: 1.05rem; line-height: 1.5; margin: 0 0 .75rem; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.details .negative { font-size: .8125rem; color: var(--quiet); max-height: 4.5em; overflow: auto; margin: 0 0 .75rem; }
.details dl { display: flex; flex-wrap: wrap; gap: .75rem 2rem; margin: 0 0 .75rem; }
.details dt { font-size: .75rem; color: var(--quiet); }
.details dd { margin: 0; font-variant-numeric: tabular-nums; }
.fine { font-size: .8125rem; color: var(--quiet); margin: 0; overflow-wrap: anywhere; }
.fine code { font-size: .75rem; color: inherit; background: none; padding: 0; border: 0; }
.fine a { margin: 0 1rem 0 0; padding: 0; color: var(--body-text-color); text-decoration: underline; }
.upload label { position: relative; color: var(--body-text-color); text-decoration: underline; cursor: pointer; }
.upload label:focus-within { outline: 2px solid var(--color-accent); border-radius: 2px; }
.upload input { position: absolute; opacity: 0; width: 1px; height: 1px; }

.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(148px, 1fr)); gap: 1rem .875rem;
  align-items: start; }
.card { display: block; text-align: left; background: none; border: 0; padding: 0; cursor: pointer; color: inherit;
  font: inherit; min-width: 0; }
.card .frame { position: relative; display: grid; place-items: center; aspect-ratio: 16 / 10; background: #000;
  border-radius: 8px; overflow: hidden; outline: 2px solid transparent; outline-offset: 2px; }
.card.chosen .frame, .card:focus-visible .frame { outline-color: var(--color-accent); }
.card img { position: absolute; inset: 0; width: 100%; height: 100%; object-fit: contain; margin: 0; }
.card .caption { display: -webkit-box; -webkit-line-clamp: 2; -webkit-box-orient: vertical; overflow: hidden;
  margin-top: .4rem; font-size: .8125rem; line-height: 1.35; overflow-wrap: anywhere; }
.card .about { display: block; font-size: .75rem; color: var(--quiet); overflow: hidden; white-space: nowrap;
  text-overflow: ellipsis; }
.badge { font-size: .75rem; color: #e7e5e4; } .badge.failed { color: #a8a29e; }
.card .line { position: absolute; left: 0; bottom: 0; height: 3px; background: var(--color-accent); }
.older { display: block; margin: 1.25rem auto 0; padding: .375rem 1rem; border-radius: 8px; font-size: .875rem;
  background: var(--button-secondary-background-fill); cursor: pointer; }

.clip { display: grid; grid-template-columns: auto 1fr auto; gap: .75rem; align-items: start; font-size: .875rem;
  padding: .5rem; border: 1px solid var(--border-color-primary); border-radius: 8px; }
.clip video { grid-column: 1; width: 7rem; height: 4.375rem; object-fit: contain; background: #000; border-radius: 4px;
  margin: 0; }
.clip div { grid-column: 2; min-width: 0; overflow-wrap: anywhere; } .clip p { margin: 0 0 .25rem; }
.clip .uses { grid-column: 1 / -1; display: flex; flex-wrap: wrap; gap: .375rem; margin: 0; }
.clip button { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: .25rem .625rem; margin: 0;
  font-size: .8125rem; font-weight: 400; background: var(--button-secondary-background-fill);
  color: var(--body-text-color); cursor: pointer; }
.clip button:hover, .clip button:focus-visible { border-color: var(--color-accent); }
.clip .leave { grid-column: 3; grid-row: 1; border-color: transparent; padding: 0 .375rem; background: none;
  font-size: 1.125rem; line-height: 1.25; color: var(--quiet); }

body.dropping::after, body.reading::after, body.sending::after { content: "Drop a video to start from it, or to use its
 settings"; position: fixed; inset: 0; z-index: 9999; display: grid; place-items: center; font-size: 1.25rem; color: #fff;
  background: rgb(28 25 23 / .72); }
body.reading::after { content: "Reading the video"; } body.sending::after { content: "Sending the video"; }
body.offline::before { content: "The server does not answer. This page goes on by itself when it is back."; position: fixed;
  inset: 0 0 auto; z-index: 9999; padding: .5rem 1rem; text-align: center; font-size: .875rem; color: #fff;
  background: #b45309; }
body.offline .toast-wrap { display: none; }

@media (max-width: 640px) {
  .stage { height: min(46vh, 92vw); } .details dl { gap: .5rem 1.25rem; }
}
"""
