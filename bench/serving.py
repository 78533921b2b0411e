"""How a server of `fastvid serve` answers many clients: seconds to the first token and to the end, and tokens a second.

python bench/serving.py --video clip.mp4 [--url http://127.0.0.1:8000] [--clients 200] [--requests 1000] [--json FILE]
python bench/serving.py --video clip.mp4 --serve quickstart/llava   # starts a server of its own, and tells its memory

Each client asks, streamed, as soon as its last answer has ended. The first request, which makes the videos' features,
is not counted; `--fresh` appends some bytes to each video, so that every request makes its own. What is refused with
429 is counted, and asked again after the time that the server tells.
"""

import argparse
import base64
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import urllib3
from harness import ROOT, write_results


class Load:
    """Clients of one server, and what they measured."""

    def __init__(self, options):
        self.options, self.lock = options, threading.Lock()
        self.pool = urllib3.PoolManager(maxsize=options.clients, block=True, retries=False, timeout=600)
        self.videos = [Path(video).read_bytes() for video in options.video]
        self.first, self.whole, self.tokens, self.refused = [], [], 0, 0

    def body(self, number):
        """The request of a number."""
        video = self.videos[number % len(self.videos)]
        if self.options.fresh:
            video += b"\0\0\0\x10free" + number.to_bytes(8)  # what players skip in MP4
        url = f"data:video/mp4;base64,{base64.b64encode(video).decode()}"
        question = self.options.question[number % len(self.options.question)]
        parts = [{"type": "text", "text": question}, {"type": "video_url", "video_url": {"url": url}}]
        asked = {"messages": [{"role": "user", "content": parts}], "max_tokens": self.options.max_tokens}
        return json.dumps({**asked, "stream": True, "stream_options": {"include_usage": True}}).encode()

    def ask(self, number):
        """Ask, until it is answered."""
        headers, body = {"Content-Type": "application/json"}, self.body(number)
        if self.options.api_key:
            headers["Authorization"] = f"Bearer {self.options.api_key}"
        while True:
            began, first, tokens = time.perf_counter(), None, 0
            url = f"{self.options.url}/v1/chat/completions"
            response = self.pool.request("POST", url, body=body, headers=headers, preload_content=False)
            if response.status == 429:
                response.drain_conn()
                with self.lock:
                    self.refused += 1
                time.sleep(float(response.headers["retry-after"]))
                continue
            if response.status != 200:
                raise SystemExit(f"{url} answers {response.status}: {response.data.decode()}")
            for line in response:
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise SystemExit(f"{url}: {event['error']['message']}")
                    if first is None and event["choices"] and event["choices"][0]["delta"].get("content"):
                        first = time.perf_counter() - began
                    tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
            whole = time.perf_counter() - began
            with self.lock:
                self.whole.append(whole)
                self.first.append(whole if first is None else first)
                self.tokens += tokens
            return

    def run(self):
        """Everything; returns the figures."""
        for number in range(len(self.videos)):
            self.ask(number)
        self.first, self.whole, self.tokens, self.refused = [], [], 0, 0
        began = time.perf_counter()
        with ThreadPoolExecutor(self.options.clients) as clients:
            list(clients.map(self.ask, range(self.options.requests)))
        seconds = time.perf_counter() - began
        return {
            "clients": self.options.clients,
            "requests": len(self.whole),
            "seconds": seconds,
            "requests_per_second": len(self.whole) / seconds,
            "tokens_per_second": self.tokens / seconds,
            "refused_429": self.refused,
            "first_token_seconds": percentiles(self.first),
            "answer_seconds": percentiles(self.whole),
        }


@contextmanager
def serving(options):
    """A server of `options.serve` on a free port, whose address goes into the options; gives a function that tells its
    peak memory in MiB, that of the processes that decode apart."""
    command = [sys.executable, "-m", "fastvid.serve", "--model_name_or_path", options.serve, "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    process = subprocess.Popen([*command, *options.flag], stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None, "it is piped"
    try:
        for line in process.stderr:
            if found := re.search(r" at (http://\S+)", line):
                options.url = found[1]
                break
        else:
            raise SystemExit(f"{' '.join(command)} ended with {process.wait()}")
        threading.Thread(target=process.stderr.read, daemon=True).start()  # a full pipe would hold it up
        status = Path(f"/proc/{process.pid}/status")
        yield lambda: int(re.findall(r"VmHWM:\s+(\d+)", status.read_text())[0]) / 1024
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def percentiles(values):
    cuts = statistics.quantiles(values, n=100, method="inclusive") if len(values) > 1 else values * 99
    return {"p50": cuts[49], "p99": cuts[98]}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--video", nargs="+", required=True)
    parser.add_argument("--question", nargs="+", default=["What happens in this video?"])
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--max_tokens", type=int, default=64)
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--api_key")
    parser.add_argument("--serve", help="model folder of a server that is started for this")
    parser.add_argument("--flag", action="append", default=[], help="of that server: --flag=--bf16 --flag=True")
    parser.add_argument("--json")
    options = parser.parse_args(argv)
    if options.serve:
        with serving(options) as peak:
            before = peak()
            found = Load(options).run() | {"server_mib_before": before, "server_mib_peak": peak()}
    else:
        found = Load(options).run()
    for name, value in found.items():
        shown = value if isinstance(value, dict) else {"": value}
        print(f"{name:<22}" + "  ".join(f"{key} {each:,.3f}".strip() for key, each in shown.items()))
    if options.json:
        write_results(options.json, [found])


if __name__ == "__main__":
    main()
