"""A page looked at in a headless Chromium, as people see it: light and dark, narrow and wide.

What is there to be seen is asked for by a script that is put into a copy of the page, whose policy lets none run.
"""

import html
import json
import os
import re
import shutil
import subprocess
import tempfile
import urllib.parse
from typing import Any, Dict, List, Optional, Sequence

PROGRAM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
POLICY = re.compile('<meta http-equiv="Content-Security-Policy"[^>]*>')
#: axe-core, where somebody has installed it (npm install axe-core, in tests/ or above it, or for all).
AXE = [os.path.join(place, 'node_modules', 'axe-core', 'axe.min.js')
       for place in (os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
                     os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))), '/usr/local/lib', '/usr/lib')]

LOOK = r'''
<script>
window.met = [];
window.onerror = function (text) { met.push('error: ' + text); };
window.alert = function (text) { met.push('alert: ' + text); };
</script>
'''

ASK = r'''
<script>
function numbers(text) { return (text.match(/[\d.]+/g) || []).map(Number); }
function light(rgb) {
  var part = rgb.slice(0, 3).map(function (one) {
    one = one / 255;
    return one <= 0.03928 ? one / 12.92 : Math.pow((one + 0.055) / 1.055, 2.4);
  });
  return 0.2126 * part[0] + 0.7152 * part[1] + 0.0722 * part[2];
}
function behind(node) {
  for (; node; node = node.parentElement) {
    var rgb = numbers(getComputedStyle(node).backgroundColor);
    if (rgb.length === 3 || rgb[3] > 0) { return rgb; }
  }
  return [255, 255, 255];
}
function worst() {
  var walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = {ratio: 99, text: ''}, count = 0;
  while (walker.nextNode()) {
    var node = walker.currentNode, element = node.parentElement;
    if (++count > 3000 && count % 50) { continue; }
    if (!node.textContent.trim() || /SCRIPT|STYLE/.test(element.tagName)) { continue; }
    var a = light(numbers(getComputedStyle(element).color)), b = light(behind(element));
    var ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < found.ratio) { found = {ratio: ratio, text: node.textContent.slice(0, 40)}; }
  }
  return found;
}
function tell(axe) {
  var page = document.documentElement;
  var facts = {inner: innerWidth, scroll: page.scrollWidth, met: met, contrast: worst(), axe: axe,
    dark: matchMedia('(prefers-color-scheme: dark)').matches, shown: document.body.innerText,
    images: document.images.length, title: document.title};
  var place = parent.document.createElement('pre');
  place.className = 'told';
  place.textContent = encodeURIComponent(JSON.stringify(facts));
  parent.document.body.appendChild(place);
}
if (window.axe) {
  axe.run().then(function (found) {
    tell(found.violations.map(function (one) { return one.id + ': ' + one.help + ' ' + one.nodes[0].html.slice(0, 200); }));
  }, function (error) { tell(['axe: ' + error]); });
} else { tell(null); }
</script>
'''


def axe() -> Optional[str]:
    return next((path for path in AXE if os.path.exists(path)), None)


def started(arguments: Any, page: str, widths: Sequence[int], height: int) -> Any:
    """The browser has shown that page at each of these widths: in frames, as its windows can't be as narrow as a telephone."""
    frames = ''.join('<iframe srcdoc="%s" style="border:0;display:block" width="%d" height="%d"></iframe>' % (
        html.escape(page), width, height) for width in widths)
    with tempfile.TemporaryDirectory() as home:
        path = os.path.join(home, 'page.html')
        with open(path, 'w', encoding='utf-8') as file:
            file.write('<!DOCTYPE html><body style="margin:0">' + frames)
        return subprocess.run(
            [PROGRAM, '--headless', '--no-sandbox', '--disable-gpu', '--hide-scrollbars', '--disable-dev-shm-usage',
             '--user-data-dir=' + os.path.join(home, 'profile'), '--enable-logging=stderr', '--v=0', '--no-first-run',
             '--disable-extensions', '--disable-background-networking',
             '--window-size=%d,%d' % (max([500] + list(widths)), height)] + arguments + ['file://' + path],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=dict(os.environ, HOME=home), check=True, timeout=240)


def problem() -> str:
    """Why no page can be looked at here, "" if it can: there is no browser, or it shows not even a page of one word."""
    if PROGRAM is None:
        return 'no Chromium is installed'
    try:
        done = started(['--dump-dom'], '<p>word</p>', [500], 500)
    except (OSError, subprocess.SubprocessError) as error:
        return 'Chromium does not run here: %s' % str(error)[-300:]
    return '' if b'word' in done.stdout else 'Chromium shows nothing here: %r' % done.stderr[-300:]


def scheme(is_dark: bool) -> str:
    return '--blink-settings=preferredColorScheme=%d' % (0 if is_dark else 1)


def look(page: str, widths: Sequence[int], is_dark: bool, with_axe: bool = True) -> List[Dict[str, Any]]:
    """What there is to be seen at each width: `scroll` and `inner` widths, what was `met` (errors and alerts), the worst
    `contrast`, what `axe` has against it (None where it is not installed), the text that is `shown`."""
    path = axe() if with_axe else None
    copy = POLICY.sub('', page).replace('<head>', '<head>' + LOOK, 1)
    with open(path or os.devnull, encoding='utf-8') as file:
        copy = copy.replace('</body>', '<script>%s</script>%s</body>' % (file.read(), ASK), 1)
    done = started(['--virtual-time-budget=60000', '--dump-dom', scheme(is_dark)], copy, widths, 1200)
    told = [json.loads(urllib.parse.unquote(one))
            for one in re.findall('<pre class="told">([^<]*)</pre>', done.stdout.decode('utf-8'))]
    assert len(told) == len(widths), done.stderr
    met = re.findall(r'CONSOLE.*', done.stderr.decode('utf-8', 'replace'))
    return [dict(one, met=one['met'] + met) for one in sorted(told, key=lambda one: one['inner'])]


def picture(page: str, path: str, width: int, height: int, is_dark: bool = False) -> None:
    """A picture of the top of the page, as PNG."""
    started(['--screenshot=' + path, scheme(is_dark)], page, [width], height)
