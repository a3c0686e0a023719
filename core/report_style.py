"""The look of report.html: light and dark, on a screen and on paper."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --ink: #1f2937; --paper: #ffffff; --soft: #f3f4f6; --line: #d1d5db;
  --faint: #6b7280; --mark: #2563eb; --good: #15803d; --bad: #b91c1c; --c0: #2563eb; --c1: #db2777;
  --c2: #059669; --c3: #d97706; --c4: #7c3aed; --c5: #0891b2; --c6: #dc2626; --c7: #4d7c0f }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e5e7eb; --paper: #111827; --soft: #1f2937; --line: #4b5563; --faint: #9ca3af;
    --mark: #60a5fa; --good: #4ade80; --bad: #f87171; --c0: #60a5fa; --c1: #f472b6; --c2: #34d399;
    --c3: #fbbf24; --c4: #a78bfa; --c5: #22d3ee; --c6: #f87171; --c7: #a3e635 } }
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  margin: 2rem auto 4rem; max-width: 68rem; padding: 0 1.2rem }
h1 { font-size: 1.7rem; margin: 0 0 .1rem; overflow-wrap: anywhere }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; padding-bottom: .25rem; border-bottom: 2px solid var(--line) }
h3 { font-size: 1rem; margin: 1.4rem 0 .2rem }
.lead { color: var(--faint); margin: 0 }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: .8rem;
  margin: 1.3rem 0 1rem }
.card { background: var(--soft); border-radius: .6rem; padding: .7rem 1rem }
.card b { display: block; font-size: 1.5rem; line-height: 1.3; font-variant-numeric: tabular-nums }
.card small { color: var(--faint) }
.card.good { border-left: .3rem solid var(--good) }
.card.good b { color: var(--good) }
.card.bad { border-left: .3rem solid var(--bad) }
.card.bad b { color: var(--bad) }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100% }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top;
  font-variant-numeric: tabular-nums }
th { color: var(--faint); font-weight: 600 }
th:first-child, td:first-child { text-align: left; overflow-wrap: anywhere }
td.text { text-align: left; overflow-wrap: anywhere; width: 70% }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(18rem, 1fr)); gap: .6rem 1.6rem }
figure { margin: .8rem 0; min-width: 0 }
figure.wide { grid-column: 1 / -1 }
figcaption { font-weight: 600 }
svg { width: 100%; height: auto; display: block }
svg text { font: 11.5px system-ui, sans-serif; fill: var(--ink) }
polyline { fill: none; stroke-width: 2 }
.plot { fill: var(--soft) }
.grid { stroke: var(--line); stroke-width: .7 }
.before { fill: var(--line); background: var(--line) }
.gone { fill: none; stroke: var(--ink); stroke-opacity: .4; stroke-dasharray: 4 3; border: 1px dashed var(--line) }
.after { fill: var(--mark); background: var(--mark) }
polyline.c0 { stroke: var(--c0) } circle.c0 { fill: var(--c0) } i.c0 { background: var(--c0) }
polyline.c1 { stroke: var(--c1) } circle.c1 { fill: var(--c1) } i.c1 { background: var(--c1) }
polyline.c2 { stroke: var(--c2) } circle.c2 { fill: var(--c2) } i.c2 { background: var(--c2) }
polyline.c3 { stroke: var(--c3) } circle.c3 { fill: var(--c3) } i.c3 { background: var(--c3) }
polyline.c4 { stroke: var(--c4) } circle.c4 { fill: var(--c4) } i.c4 { background: var(--c4) }
polyline.c5 { stroke: var(--c5) } circle.c5 { fill: var(--c5) } i.c5 { background: var(--c5) }
polyline.c6 { stroke: var(--c6) } circle.c6 { fill: var(--c6) } i.c6 { background: var(--c6) }
polyline.c7 { stroke: var(--c7) } circle.c7 { fill: var(--c7) } i.c7 { background: var(--c7) }
.legend span { margin-right: 1.2rem; font-size: .85rem; white-space: nowrap }
.legend i { display: inline-block; width: .8em; height: .8em; margin-right: .4em; border-radius: 2px }
pre { background: var(--soft); padding: .8rem; border-radius: .5rem; white-space: pre-wrap;
  overflow-wrap: anywhere; margin: .4rem 0 }
details { margin: .6rem 0 }
summary { cursor: pointer }
@media print { body { margin: 0; max-width: none } figure, tr { break-inside: avoid } }
"""
