"""Headless Chromium over its DevTools protocol, through a pipe: no driver and no websocket library."""

import base64
import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from itertools import count

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars")
LAUNCH = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
)
"""Chromium reads commands from descriptor 3 and answers on 4."""
LAYOUT = r"""
(() => {
  const name = e => (e.closest("section") || {id: "page"}).id + ": " + (e.textContent || e.tagName).trim().slice(0, 60);
  const wide = [...document.querySelectorAll("main *, header *, footer *")].filter(e =>
    !e.closest(".scroll") && !e.closest("svg") && e.getBoundingClientRect().right > innerWidth + 1);
  const clipped = [], touching = [];
  for (const svg of document.querySelectorAll("svg.chart")) {
    const frame = svg.getBoundingClientRect(), boxes = [];
    if (!frame.width) continue;  // in a closed table
    for (const text of svg.querySelectorAll("text")) {
      const box = text.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / frame.width;
      const [x, y, w, h] = [box.left - frame.left, box.top - frame.top, box.width, box.height].map(v => v * scale);
      if (x < -0.5 || y < -0.5 || x + w > svg.viewBox.baseVal.width + 0.5 || y + h > svg.viewBox.baseVal.height + 0.5)
        clipped.push(name(text));
      for (const [other, a, b, c, d] of boxes)
        if (x < a + c - 1 && a < x + w - 1 && y < b + d - 3 && b < y + h - 3) touching.push(other + " | " + name(text));
      boxes.push([name(text), x, y, w, h]);
    }
  }
  const light = rgb => rgb.slice(0, 3)
    .map(v => v / 255 <= 0.03928 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const parts = colour => colour.match(/[\d.]+/g).map(Number);
  const behind = e => {
    for (; e; e = e.parentElement) {
      const colour = parts(getComputedStyle(e).backgroundColor);
      if (colour.length < 4 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const faint = [...document.querySelectorAll("main *")].filter(e => {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.checkVisibility() || e.closest(".field, .part, title, desc")) return false;
    const style = getComputedStyle(e), colour = e.closest("svg") ? style.fill : style.color;
    const [a, b] = [light(parts(colour)), light(behind(e))].sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05) < 4.5;
  });
  return {
    width: document.documentElement.scrollWidth, inner: innerWidth,
    wide: wide.map(name), clipped, touching, faint: faint.map(name),
  };
})()
"""
"""What does not fit: elements beyond the window outside their own scroll box, text of charts cut or on other text, and
text of less contrast than 4.5 : 1 (WCAG 2.1, 1.4.3)."""


@contextmanager
def chromium(profile):
    """A browser with one blank page; profile: a folder for its files."""
    to_read, to_write = os.pipe()
    from_read, from_write = os.pipe()
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "--remote-debugging-pipe"]
    launch = [sys.executable, "-S", "-c", LAUNCH, str(to_read), str(from_write), *command]
    process = subprocess.Popen(
        launch, pass_fds=(to_read, from_write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(to_read)
    os.close(from_write)
    try:
        yield Page(to_write, from_read)
    finally:
        process.terminate()
        process.wait(20)
        os.close(to_write)
        os.close(from_read)


class Page:
    """One tab. complaints: what the console, the network and the content policy said since it was opened."""

    def __init__(self, commands, answers):
        self._commands, self._answers, self._numbers, self._session = commands, answers, count(1), None
        self.complaints, self._loaded, self._buffer = [], False, b""
        target = self._send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Log", "Runtime", "Network"):
            self._send(f"{domain}.enable")

    def show(self, path, width, dark, media="screen"):
        """Loads a file at this window width (CSS pixels), scripts switched off, in light or dark. media: or "print"."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._send("Emulation.setEmulatedMedia", media=media, features=[scheme])
        self._send(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        self._send("Emulation.setScriptExecutionDisabled", value=True)
        self._loaded = False
        self._send("Page.navigate", url=path.resolve().as_uri())
        while not self._loaded:
            self._receive()

    def evaluate(self, expression):
        answer = self._send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def screenshot(self, selector, path):
        """The whole element as PNG, however far down the page."""
        box = self.evaluate(
            f"(() => {{ const b = document.querySelector({json.dumps(selector)}).getBoundingClientRect();"
            " return [scrollY + b.top, b.height]; })()"
        )
        width = self.evaluate("innerWidth")
        clip = {"x": 0, "y": box[0], "width": width, "height": max(1, box[1]), "scale": 1}
        shot = self._send("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(shot["data"]))

    def _send(self, method, **parameters):
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer)
                return answer["result"]

    def _receive(self):
        while b"\0" not in self._buffer:
            more = os.read(self._answers, 1 << 16)
            assert more, "the browser ended"
            self._buffer += more
        text, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(text)
        parameters = message.get("params", {})
        match message.get("method"):
            case "Page.loadEventFired":
                self._loaded = True
            case "Log.entryAdded":
                self.complaints.append(parameters["entry"]["text"])
            case "Runtime.consoleAPICalled" | "Runtime.exceptionThrown" | "Network.loadingFailed":
                self.complaints.append(json.dumps(parameters))
            case "Network.requestWillBeSent":
                if not parameters["request"]["url"].startswith("file:"):
                    self.complaints.append(parameters["request"]["url"])
        return message
