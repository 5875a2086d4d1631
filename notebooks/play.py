"""
Drive a model of the toy world with the arrow keys, in a browser on this machine:

    python notebooks/play.py                            the model that comes along, drive.pt
    python notebooks/play.py out/tiny-drive/last.pt     yours, by train.py --data drive
    python notebooks/play.py --gif driving.gif          no browser: a ride by a plan, as a GIF

There is no map. The model draws each frame from the last ones and the key that is held. The page
asks for one frame at a time. It asks for none without a key for two seconds, while it is hidden,
and when it is closed: then nothing is computed.
"""

import argparse
import re
import sys
import threading
from collections import deque
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import vdm

KEYS = vdm.Drive.KEYS                                       # left, straight, right, stop: "LSRX"
PLAN = "SSSSSRRRRSSSLLLLLXXXSSSRRLLRRLLS"                  # the ride of --gif

class Ride:
    """An endless video. go(key) makes its next frame, as the key commands."""

    def __init__(self, model, config, steps, seed=0):
        n = max(n for n, odds in enumerate(config.context) if odds > 0)            # frames given
        shape = (1, config.frames, config.channels, *config.size)
        stop = torch.from_numpy(vdm.Drive.ACTIONS[[KEYS.index("X")] * config.frames])[None]
        start = vdm.generate(model, shape, vdm.karras_sigmas(20), seed=seed, action=stop)
        self.keys = deque("X" * n, maxlen=n + 1)          # which key led to each frame of a window
        self.video = vdm.rollout(model, sys.maxsize, (1, n + 1, *shape[2:]),      # one of them new
                                 vdm.karras_sigmas(steps), n, start[:, -n:], seed, tell=self.tell)
        self.last = next(self.video)[:, -1:]                                      # (1, 1, 3, H, W)

    def tell(self, context, mask, start):
        """What rollout tells the model of a window: the given frames, and the key of each frame."""
        action = torch.from_numpy(vdm.Drive.ACTIONS[[KEYS.index(key) for key in self.keys]])
        return dict(context=context, mask=mask, action=action[None])              # (1, n + 1, 6)

    def go(self, key):
        """The next frame, uint8 (H, W, 3), and the command seen in it, or "?" if it is none."""
        self.keys.append(key)
        pair = torch.cat([self.last, next(self.video)], dim=1)                    # (1, 2, 3, H, W)
        self.last = pair[:, 1:]
        seen = vdm.Drive(2, pair.shape[3:]).check(pair)["commands"].item()
        return vdm.to_uint8(pair[0, 1]), (KEYS + "?")[seen]

class Server(ThreadingHTTPServer):
    """Serves one ride, to this machine alone. start(seed) begins a ride."""

    def __init__(self, start, port):
        super().__init__(("127.0.0.1", port), Handler)
        self.start = start
        self.rides = 0
        self.lock = threading.Lock()

    def frame(self, key):
        """The next frame as go returns it; with key N it is the first one of a new ride."""
        with self.lock:
            if key == "N" or self.rides == 0:
                self.ride = self.start(self.rides)
                self.rides += 1
            return self.ride.go(key.replace("N", "X"))

class Handler(BaseHTTPRequestHandler):
    """Answers GET / with the page, and POST /L, /S, /R, /X and /N with pixels."""
    protocol_version = "HTTP/1.1"                                # one connection for all frames
    disable_nagle_algorithm = True                               # small answers leave at once

    def do_GET(self):
        host = self.headers.get("Host")                          # the name by which we were asked
        asks = self.headers.get("Origin", f"http://{host}")      # the site whose page asks
        port = self.server.server_port
        if host not in (f"127.0.0.1:{port}", f"localhost:{port}") or asks != f"http://{host}":
            return self.send_error(403)
        if (self.command, self.path) == ("GET", "/"):
            body = PAGE.encode()
            headers = {"Content-Type": "text/html; charset=utf-8"}
        elif self.command == "POST" and re.fullmatch(f"/[{KEYS}N]", self.path):
            pixels, seen = self.server.frame(self.path[1])
            body = np.pad(pixels, ((0, 0), (0, 0), (0, 1)), constant_values=255).tobytes()   # RGBA
            headers = {"Seen": seen, "Width": pixels.shape[1]}
        else:
            return self.send_error(404)
        with suppress(ConnectionError):                          # the page may have been closed
            self.send_response(200)
            for name, value in {**headers, "Content-Length": len(body)}.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(body)

    do_POST = do_GET                               # browsers tell the Origin of every foreign POST

    def log_message(self, *_):
        """Print nothing: it would be a line per frame."""

def with_keys(pixels, key):
    """A frame (H, W, 3) above the four keys, of which the pressed one is lit."""
    k = pixels.shape[1] // 4 - 1
    up = 2 * np.abs(np.arange(k) - k // 2) <= np.arange(k)[:, None]              # a triangle (k, k)
    row = np.zeros((k + 1, pixels.shape[1], 3), np.uint8)
    for i, (name, turn) in enumerate(zip("LSXR", (1, 0, 2, 3))):
        color = (255, 215, 0) if name == key else (90, 90, 90)
        row[1:, i * (k + 1) + 1:(i + 1) * (k + 1)] = np.rot90(up, turn)[..., None] * color
    return np.vstack([pixels, row])

def main(argv=None):
    p = vdm.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("checkpoint", nargs="?", default=Path(__file__).with_name("drive.pt"))
    p.add_argument("--steps", type=int, default=2, help="noise levels visited for a frame (2)")
    p.add_argument("--port", type=int, default=8000, help="of the page (8000; 0: any)")
    p.add_argument("--gif", type=Path, help="write a ride by a plan instead")
    o = p.parse_args(argv)
    vdm.limit("steps", "1 to 1000", 1, 1000, o)
    torch.set_num_threads(1)                           # leaves a core to the browser
    model, config = vdm.load(o.checkpoint)
    vdm.need(config.actions == (4, 2) and config.give == "concat" and sum(config.context[1:]) > 0,
             f"{o.checkpoint} cannot be driven: train.py --data drive makes a model that can")
    if o.gif:
        ride = Ride(model, config, o.steps)
        frames = np.stack([with_keys(ride.go(key)[0], key) for key in PLAN])
        return print("wrote", vdm.write_video(o.gif, vdm.from_uint8(frames), scale=4))
    try:
        server = Server(lambda seed: Ride(model, config, o.steps, seed), o.port)
    except OSError as e:
        raise ValueError(f"port {o.port} is not to be had: name another (--port)") from e
    with server:
        print(f"open http://127.0.0.1:{server.server_port} in a browser; Ctrl-C ends", flush=True)
        with suppress(KeyboardInterrupt):
            server.serve_forever()

PAGE = """<!DOCTYPE html><meta charset="utf-8"><title>Drive</title>
<style>
  body { background: #111; color: #bbb; font: 16px sans-serif; text-align: center }
  canvas { width: 512px; max-width: 90vmin; image-rendering: pixelated }
  b { display: inline-block; width: 2em; line-height: 2em; margin: 4px; border: 1px solid #555 }
  b.on { background: gold; color: black }
</style>
<canvas></canvas>
<div><b id="L">&larr;</b><b id="S">&uarr;</b><b id="X">&darr;</b><b id="R">&rarr;</b></div>
<p id="text">&nbsp;</p><p>Arrow keys: left, straight on, stop, right. N: a new ride</p>
<script>
const KEYS = {ArrowLeft: "L", ArrowUp: "S", ArrowDown: "X", ArrowRight: "R", n: "N"}
const find = name => document.querySelector(name), now = () => performance.now()
let held = [], tapped = "N"         // keys that are down, the newest first; the last one pressed
let until = 0, asking = false       // the page asks for frames until then, in milliseconds
let times, obeyed
async function drive(time) {
  until = Math.max(until, now() + time)
  if (asking) return
  asking = true
  while (now() < until && !document.hidden) {
    const start = now(), key = tapped || held[0] || "X"
    tapped = ""
    if (held.length) until = start + 2000
    for (const b of document.querySelectorAll("b")) b.className = b.id == key ? "on" : ""
    try {
      const answer = await fetch("/" + key, {method: "POST"}), canvas = find("canvas")
      const pixels = new Uint8ClampedArray(await answer.arrayBuffer())
      const image = new ImageData(pixels, answer.headers.get("Width"))
      Object.assign(canvas, {width: image.width, height: image.height})
      canvas.getContext("2d").putImageData(image, 0, 0)
      if (key == "N") times = [], obeyed = 0
      times.push(now())
      obeyed += answer.headers.get("Seen") == key.replace("N", "X")
      const rate = times.filter(time => time > now() - 2000).length / 2
      find("#text").textContent = `${rate} frames/s; ${obeyed} of ${times.length} frames obey`
    } catch (error) { until = 0; find("#text").textContent = `no frame: ${error}` }
    await new Promise(done => setTimeout(done, start + 1000 / 12 - now()))    // 12 a second at most
  }
  asking = false
}
onkeydown = event => {
  const key = KEYS[event.key]
  if (!key || event.altKey) return
  event.preventDefault()
  if (event.repeat) return
  tapped = key
  if (key != "N") held.unshift(key)
  drive(2000)
}
onkeyup = event => held = held.filter(key => key != KEYS[event.key])
onblur = () => held = []
drive(1)
</script>
"""

if __name__ == "__main__":
    vdm.run_program(main, "close other programs")
