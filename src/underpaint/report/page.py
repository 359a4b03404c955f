"""The shell of every page: one file that holds its style, its script and its pictures, and asks nobody for anything."""

import base64
import hashlib
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

from PIL import Image

from underpaint.files import replacing

PICTURE_BYTES = 2_400_000  # all pictures together; base64 makes 3.2 MB of them, so that the page stays under 5 MB


def page(title: str, body: str) -> str:
    """A whole page around what it shows."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # the browser itself keeps the promise that no request leaves the page
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        f"style-src 'unsafe-inline'; script-src 'sha256-{digest}'\">\n"
        f'<link rel="icon" href="data:,">\n<title>{title}</title>\n<style>{STYLE}</style>\n'
        f"</head>\n<body>\n<main>\n{body}\n</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def write_page(path: Path, text: str) -> Path:
    """Write a page under a temporary name, then put it in place."""
    # a file name that is not UTF-8 was read with lone surrogates, which no file can hold
    with replacing(path) as temporary:
        temporary.write_bytes(text.encode("utf-8", errors="backslashreplace"))
    return path


def table_row(name: str, cells: Sequence[str], kind: str = "") -> str:
    """One row, headed by its name."""
    values = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
    return f'<tr{f" class={kind!r}" if kind else ""}><th scope="row">{escape(name)}</th>{values}</tr>'.replace("'", '"')


def picture_address(path: Path, limit: int) -> tuple[str, int, int]:
    """A picture as a data address of at most `limit` bytes before base64, its width and its height."""
    content = path.read_bytes()
    with Image.open(io.BytesIO(content)) as opened:
        picture = opened.convert("RGB")
    width, height, kind = *picture.size, "png"
    while len(content) > limit:
        buffer = io.BytesIO()
        picture.save(buffer, format="WEBP", quality=85)
        content, kind = buffer.getvalue(), "webp"
        picture = picture.resize((max(1, picture.width * 3 // 4), max(1, picture.height * 3 // 4)))
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}", width, height


def plots(drawn: Sequence[str]) -> str:
    """Plots two abreast where there is room."""
    return f'<div class="plots large">{"".join(f"<div>{plot}</div>" for plot in drawn)}</div>' if drawn else ""


STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #1b1d21; --quiet: #5a6068; --line: #d5d9de;
  --raised: #f4f6f8; --good: #00694c; --bad: #a33f00; --focus: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --page: #15171a; --text: #e6e8ea; --quiet: #a3abb4;
  --line: #3a4047; --raised: #1f2327; --good: #38c796; --bad: #ff9a57; --focus: #56b4e9;
  --blue: #45a3e0; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .6rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .5rem; padding-top: .6rem; border-top: 1px solid var(--line); }
p { margin: .4rem 0; max-width: 46rem; }
.kind, .note, figcaption { color: var(--quiet); font-size: .9rem; }
.kind { margin: 0; }
.facts { display: flex; flex-wrap: wrap; gap: .3rem 1.6rem; margin: 0 0 1.2rem; }
.facts dt { color: var(--quiet); font-size: .8rem; }
.facts dd { margin: 0; overflow-wrap: anywhere; }
.facts div { min-width: 0; }
.verdict { background: var(--raised); border-left: 6px solid var(--bad); border-radius: 4px;
  padding: .7rem 1rem; }
.verdict.learning { border-left-color: var(--good); }
.verdict p { max-width: none; overflow-wrap: anywhere; }
.word { color: var(--bad); font-size: 1.15rem; margin-right: .4em; }
.learning .word { color: var(--good); }
.plots { display: grid; gap: 1rem 1.5rem; margin: .8rem 0; }
.plots.large { grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); }
.plots.large > div { max-width: 34rem; }
.plots.small { grid-template-columns: repeat(auto-fill, minmax(min(100%, 14rem), 1fr)); margin: 0; }
.plots.small > div { max-width: 19rem; }
.plot { display: block; width: 100%; height: auto; stroke-linejoin: round; stroke-linecap: butt; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .8rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
th[scope=row], thead th:first-child { text-align: left; font-weight: 400; white-space: normal; }
table.wide { font-size: .9rem; }
.wide th, .wide td { padding-right: .6rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
thead th { vertical-align: bottom; white-space: normal; }
.own th, .gain th, .gain td { font-weight: 700; }
.floor { color: var(--quiet); }
.facts-table th, .facts-table td { text-align: left; vertical-align: top; white-space: normal;
  overflow-wrap: anywhere; }
.facts-table th[scope=row] { color: var(--quiet); overflow-wrap: normal; }
code, pre { font-family: ui-monospace, monospace; font-size: .88em; overflow-wrap: anywhere; }
pre { background: var(--raised); border-radius: 4px; padding: .8rem 1rem; max-height: 32rem; overflow: auto; }
ul { padding-left: 1.2rem; max-width: 46rem; }
.files { overflow-wrap: anywhere; }
summary { cursor: pointer; padding: .3rem 0; }
:focus-visible { outline: 3px solid var(--focus); outline-offset: 2px; }
figure { margin: .6rem 0; }
.frame { display: none; }
.frame.shown { display: block; }
.frame img { display: block; max-width: 100%; height: auto; }
.slider:not([hidden]) { display: flex; flex-wrap: wrap; align-items: center; gap: .3rem .8rem; }
.slider input { flex: 1 1 12rem; max-width: 28rem; accent-color: var(--focus); min-height: 1.8rem; }
.slider output { min-width: 8rem; }
@media (max-width: 30rem) {
  table { font-size: .87rem; }
  th, td { padding-right: .5rem; }
}
@media print {
  :root { color-scheme: light; --page: #fff; --text: #000; --quiet: #444; --line: #bbb; --raised: #f4f4f4;
    --good: #00694c; --bad: #a33f00; --blue: #0072b2; }
  body { font-size: 10.5pt; }
  main { max-width: none; padding: 0; }
  .slider, .slider:not([hidden]) { display: none; }
  .plots.large { grid-template-columns: 1fr 1fr; }
  .plots.small { grid-template-columns: 1fr 1fr; }
  .plots > div, .verdict, .frame, table, tr { break-inside: avoid; }
  h2 { break-after: avoid; }
  .scroll, pre { overflow: visible; max-height: none; }
  pre { white-space: pre-wrap; }
  .frame img { min-width: 0 !important; }
  details::details-content { content-visibility: visible; display: block; }
}
"""

SCRIPT = """
(function () {
  var section = document.getElementById('pictures');
  var slider = section && section.querySelector('.slider');
  if (slider) {
    var input = slider.querySelector('input'), output = slider.querySelector('output');
    var frames = section.querySelectorAll('.frame');
    slider.hidden = false;
    var show = function () {
      frames.forEach(function (frame, index) {
        frame.classList.toggle('shown', index === Number(input.value));
      });
      var label = frames[Number(input.value)].dataset.label;
      output.textContent = label;
      input.setAttribute('aria-valuetext', label);
    };
    input.addEventListener('input', show);
    show();
  }
  var opened = [];
  window.addEventListener('beforeprint', function () {
    opened = Array.from(document.querySelectorAll('details:not([open])'));
    opened.forEach(function (details) { details.open = true; });
  });
  window.addEventListener('afterprint', function () {
    opened.forEach(function (details) { details.open = false; });
  });
})();
"""
