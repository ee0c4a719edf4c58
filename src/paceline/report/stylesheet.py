"""The page's style sheet: one column on a phone, two where there is room; light and dark."""

from __future__ import annotations

from string import Template

from paceline.report.theme import DARK, LIGHT


def _variables(colours: dict[str, str]) -> str:
    return " ".join(f"--{token}: {colour};" for token, colour in colours.items())


CSS = Template("""
:root {
  color-scheme: light dark;
  $light
  --wash: #f5f7f9; --bad: #a4262c; --bad-wash: #fdf1f1; --good: #1a6b45; --good-wash: #ecf6f0;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", Arial, sans-serif;
  --mono: ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, "Liberation Mono", monospace;
}
@media (prefers-color-scheme: dark) {
  :root {
    $dark
    --wash: #1c2026; --bad: #ff9c96; --bad-wash: #2c1b1c; --good: #7fd6a8; --good-wash: #16261e;
  }
}
*, *::before, *::after { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 var(--sans); }
main { max-width: 1120px; margin: 0 auto; padding: clamp(20px, 4vw, 56px) clamp(16px, 4vw, 40px) 72px; }
h1, h2, h3 { line-height: 1.2; letter-spacing: -0.012em; text-wrap: balance; }
h1 { font-size: clamp(1.8rem, 1.2rem + 2.4vw, 2.7rem); font-weight: 680; margin: 0;
  overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; font-weight: 650; margin: 0 0 4px; }
h3 { font-size: 1rem; font-weight: 620; margin: 0 0 8px; }
p { margin: 0 0 12px; max-width: 68ch; }
.kicker { color: var(--muted); font-size: .875rem; margin: 0 0 6px; display: flex; flex-wrap: wrap;
  gap: 4px 12px; align-items: center; }
.status { font-weight: 600; font-size: .8125rem; padding: 1px 10px; border-radius: 99px;
  background: var(--wash); color: var(--ink); }
.status.good { background: var(--good-wash); color: var(--good); }
.status.bad { background: var(--bad-wash); color: var(--bad); }
.lead { font-size: clamp(1.1rem, 1rem + .6vw, 1.375rem); line-height: 1.4; margin: 18px 0 10px;
  max-width: 46em; text-wrap: balance; }
.why, .note { color: var(--muted); text-wrap: pretty; }
.remark, figcaption { color: var(--muted); font-size: .875rem; line-height: 1.5; margin: 8px 0 0;
  max-width: 72ch; }
section { margin-top: 56px; }
section > .note { margin-bottom: 20px; }
.error { margin: 24px 0 0; padding: 14px 18px; border-left: 4px solid var(--bad);
  background: var(--bad-wash); }
.error h2 { color: var(--bad); font-size: 1.05rem; }
pre { font: .875rem/1.55 var(--mono); white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; }
.error pre { margin-top: 6px; }

.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(158px, 1fr)); gap: 26px 28px;
  margin: 36px 0 0; padding: 0; }
.numbers div { border-top: 2px solid var(--grid); padding-top: 10px; min-width: 0; }
.numbers div.first { border-top-color: var(--computation); }
.numbers dt { color: var(--muted); font-size: .8438rem; overflow-wrap: anywhere; }
.numbers dd { margin: 0; }
.numbers .value { font-size: 1.5rem; font-weight: 640; letter-spacing: -0.015em; line-height: 1.3;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.numbers .aside { color: var(--muted); font-size: .8438rem; line-height: 1.4; }

.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 430px), 1fr));
  gap: 36px 44px; }
figure { margin: 16px 0 0; min-width: 0; container-type: inline-size; }
figure svg { display: block; width: 100%; height: auto; }
figure.one svg { max-width: 860px; }
figure .narrow { display: none; }
@container (max-width: 430px) {
  figure .narrow { display: block; }
  figure .wide { display: none; }
}

.table { overflow-x: auto; margin: 22px 0 0; }
table { border-collapse: collapse; width: 100%; font-size: .9063rem; line-height: 1.4; }
th, td { padding: 8px 20px 8px 0; text-align: left; vertical-align: baseline;
  border-bottom: 1px solid var(--grid); }
th:last-child, td:last-child { padding-right: 0; }
thead th { color: var(--muted); font-weight: 500; font-size: .8125rem; vertical-align: bottom; }
tbody th { font-weight: 500; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
tbody .n { white-space: nowrap; }
tr.chosen th, tr.chosen td { font-weight: 650; }
td .aside { display: block; color: var(--muted); font-size: .8125rem; font-weight: 400;
  white-space: nowrap; }
table.plain { width: auto; }
table.plain th, table.plain td { padding-right: 44px; }
table.plain th:last-child, table.plain td:last-child { padding-right: 0; }
details { margin-top: 14px; }
summary { cursor: pointer; color: var(--muted); font-size: .9063rem; }
summary:focus-visible { outline: 2px solid var(--computation); outline-offset: 3px; }

.facts { display: grid; grid-template-columns: minmax(110px, max-content) minmax(0, 1fr); gap: 8px 28px;
  margin: 16px 0 0;
  font-size: .9375rem; }
.facts dt { color: var(--muted); }
.facts dd { margin: 0; overflow-wrap: anywhere; }
.facts code { font: .875rem/1.5 var(--mono); }
.after { margin-top: 28px; }
.showcase { margin-top: 20px; }
.showcase pre { background: var(--wash); padding: 16px 18px; border-radius: 6px; max-height: 30em;
  overflow: auto; }
.messages { list-style: none; padding: 0; margin: 16px 0 0; font-size: .9375rem; }
.messages li { padding: 8px 0 8px 14px; border-left: 3px solid var(--grid); margin-bottom: 6px;
  white-space: pre-wrap;
  overflow-wrap: anywhere; }
.messages li.warning { border-left-color: var(--communication); }
.messages b { font-weight: 620; }
footer { margin-top: 64px; padding-top: 14px; border-top: 1px solid var(--grid); color: var(--muted);
  font-size: .8438rem; }

@media (max-width: 640px) {
  section { margin-top: 44px; }
  .numbers { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 20px 20px; }
  .numbers .value { font-size: 1.25rem; }
  .facts { grid-template-columns: 1fr; gap: 0; }
  .facts dd { margin-bottom: 12px; }
  table.plain { width: 100%; font-size: .875rem; }
  table.plain th, table.plain td { padding-right: 14px; }
  table.stack thead { position: absolute; width: 1px; height: 1px; overflow: hidden;
    clip-path: inset(50%); }
  table.stack, table.stack tbody, table.stack tr, table.stack th, table.stack td { display: block; }
  table.stack tr { padding: 10px 0; border-bottom: 1px solid var(--grid); }
  table.stack th, table.stack td { border: 0; padding: 2px 0; text-align: left; }
  table.stack td { display: flex; justify-content: space-between; gap: 16px; font-weight: 400; }
  table.stack td::before { content: attr(data-label); color: var(--muted); flex: none; }
  table.stack tbody th { font-weight: 620; }
  table.stack td .aside { display: inline; white-space: normal; }
}
@media print {
  main { max-width: none; padding: 0; }
  section, figure, tr { break-inside: avoid; }
  .showcase pre { max-height: none; }
}
""").substitute(light=_variables(LIGHT), dark=_variables(DARK))
