"""A server that a bench can measure without a model: it paints the mask grey after a while, or does something wrong."""

import argparse
import base64
import email
import io
import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image, ImageFile

parser = argparse.ArgumentParser()
for name in ("model", "dtype", "threads"):
    parser.add_argument(f"--{name}")
parser.add_argument("--port", type=int)
parser.add_argument("--ms", type=float, default=1)
parser.add_argument("--wrong", default="")
parser.add_argument("--after", type=int, default=0)
parser.add_argument("--usage", action="store_true")
args = parser.parse_args()
ImageFile.LOAD_TRUNCATED_IMAGES = args.wrong == "cut off"  # what it made is sent to it again, to be edited further
lock, asked = threading.Lock(), []


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answered(503 if args.wrong == "never ready" else 200 if self.path == "/healthz" else 404, {})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        parts = email.message_from_bytes(f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode() + body).get_payload()
        form = {part.get_param("name", header="Content-Disposition"): part.get_payload(decode=True) for part in parts}
        pixels = np.array(Image.open(io.BytesIO(form["image"])).convert("RGB"))
        mask = (
            np.array(Image.open(io.BytesIO(form["mask"])))[..., 3] == 0 if "mask" in form else np.ones(pixels.shape[:2], bool)
        )
        n = int(form.get("n", 1))
        with lock:  # one at a time, as a device is
            asked.append(n)
            if args.wrong == "dies" and len(asked) > args.after:
                print("out of luck", file=sys.stderr, flush=True)
                os._exit(7)
            time.sleep(n * args.ms / 1e3)
        if args.wrong == "refuses" and len(asked) > args.after:
            self.answered(500, {"error": {"message": "no", "code": "broken"}})
            return
        pixels[mask] = 128
        if args.wrong == "outside":
            pixels[~mask] += 1
        if args.wrong == "size":
            pixels = pixels[:-16]
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        file = buffer.getvalue()
        if args.wrong == "cut off":
            file = file[: len(file) // 2]
        answer = {"data": [{"b64_json": base64.b64encode(file).decode()}] * n}
        if args.usage:
            told = {"seconds": {"document": 0.2 * n * args.ms / 1e3, "step": 0.7 * n * args.ms / 1e3}, "tokens_computed": n}
            told |= {"tokens_whole": 2 * n, "steps": 4, "cache_hits": [], "approximate": []}
            answer["usage"] = {"retouch": told}
        self.answered(200, answer)

    def answered(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


if args.wrong == "does not start":
    sys.exit("there is no such device")
ThreadingHTTPServer(("127.0.0.1", args.port), Handler).serve_forever()
