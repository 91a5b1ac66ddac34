# SPDX-License-Identifier: Apache-2.0
"""A server that speaks as much of OpenAI's API as is used, answers by a rule, and misbehaves on demand.

with Stub() as stub:
    stub.behave = lambda body, number: "die" if number == 3 else "ok"
    Endpoint(stub.url, "m").run(...)

Run as a program it serves until it is killed: python stub_server.py PORT SECONDS_PER_ANSWER LOG."""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MODELS = ["m"]


def text_of(prompt: str, index: int, seed: int | None = None) -> str:
    """The rule: what it answers to a prompt."""
    return f"re {prompt!r} #{index}" + ("" if seed is None else f" seed {seed}")


def logprob_of(index: int, place: int) -> float:
    return -(1 + index) * 0.5 - place


class Stub:
    def __init__(self, behave=None, delay: float = 0.0, port: int = 0):
        self.behave = behave or (lambda body, number: "ok")
        self.delay, self.port, self.models = delay, port, list(MODELS)
        self.bodies: list[dict] = []  # of every POST that came in whole
        self.paths: list[str] = []
        self.headers: list[dict] = []
        self.most_at_once = self._now = 0
        self.go_on = threading.Event()  # ends "stall"
        self.lock = threading.Lock()
        self.server = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> Stub:
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.go_on.set()
        self.stop()

    def start(self) -> None:
        stub = self

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            allow_reuse_address = True
            request_queue_size = 128

            def handle_error(self, request, address):
                pass

        class Handler(_Handler):
            owner = stub

        self.open: set[socket.socket] = set()
        self.server = Server(("127.0.0.1", self.port), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self) -> None:
        """As if it were killed: nobody listens, and what was under way is cut."""
        if self.server is None:
            return
        self.server.shutdown()
        self.server.server_close()
        with self.lock:
            for connection in self.open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        self.server = None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: Stub

    def log_message(self, *_):
        pass

    def setup(self):
        super().setup()
        with self.owner.lock:
            self.owner.open.add(self.connection)

    def finish(self):
        with self.owner.lock:
            self.owner.open.discard(self.connection)
        super().finish()

    def do_GET(self):
        self.send(200, {"object": "list", "data": [{"id": name} for name in self.owner.models]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        stub = self.owner
        with stub.lock:
            number = len(stub.bodies)
            stub.bodies.append(body)
            stub.paths.append(self.path)
            stub.headers.append(dict(self.headers))
            stub._now += 1
            stub.most_at_once = max(stub.most_at_once, stub._now)
        try:
            time.sleep(stub.delay)
            self.act(stub.behave(body, number), body)
        finally:
            with stub.lock:
                stub._now -= 1

    def act(self, what, body: dict) -> None:
        tree = answer(body)
        if isinstance(what, tuple):  # (status, headers, body)
            return self.send(*[what[0], what[2]], headers=what[1])
        if what == "stall":
            self.owner.go_on.wait(20)
            return self.cut()
        if what == "drop":
            return self.cut()
        if what in ("die", "die without length"):
            data = json.dumps(tree).encode()
            self.send_response(200)
            if what == "die":
                self.send_header("Content-Length", str(len(data)))
            else:
                self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            return self.cut()
        if what == "garbage":
            return self.send(200, b'{"choices": [{"index": 0, "mess')
        if what == "no choices":
            tree = {"object": "chat.completion"}
        if what == "too few":
            tree["choices"] = tree["choices"][:-1]
        if what == "twice the same":
            tree["choices"][-1]["index"] = 0
        if what == "null text":
            for choice in tree["choices"]:
                choice.pop("text", None)
                choice["message"] = {"role": "assistant", "content": None}
                choice["finish_reason"] = None
        if what == "abort":
            tree["choices"][-1]["finish_reason"] = "abort"
        if what == "no logprobs":
            for choice in tree["choices"]:
                choice["logprobs"] = None
        if what in ("cut stream", "cut stream at once") or body.get("stream"):
            return self.stream(body, what)
        return self.send(200, tree)

    def stream(self, body: dict, what) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        events = []
        for choice in answer(body)["choices"]:
            text = choice["message"]["content"] if "message" in choice else choice["text"]
            for at in range(0, len(text), 5):
                part = text[at : at + 5]
                piece = {"delta": {"content": part}} if "message" in choice else {"text": part}
                if at == 0 and choice.get("logprobs"):
                    piece["logprobs"] = choice["logprobs"]
                events.append({"choices": [{"index": choice["index"], "finish_reason": None, **piece}]})
            last = {"delta": {}} if "message" in choice else {"text": ""}
            events.append({"choices": [{"index": choice["index"], "finish_reason": "stop", **last}]})
        events.append({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 7}})
        if what == "cut stream at once":
            return self.cut()
        for i, event in enumerate(events):
            if what == "cut stream" and i == 2:
                return self.cut()
            self.chunk(f"data: {json.dumps(event)}\n\n")
        self.chunk("data: [DONE]\n\n")
        self.chunk("")

    def chunk(self, text: str) -> None:
        data = text.encode()
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def send(self, status: int, tree, headers: dict | None = None) -> None:
        data = tree if isinstance(tree, bytes) else json.dumps(tree).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def cut(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


def answer(body: dict) -> dict:
    """What a well-behaved server would send."""
    chat, choices = "messages" in body, []
    prompt = body["messages"][-1]["content"] if chat else body["prompt"]
    for index in range(body.get("n", 1)):
        text = text_of(prompt, index)
        choice = {"index": index, "finish_reason": "stop"}
        choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        values = [logprob_of(index, place) for place in range(3)]
        if chat and body.get("logprobs"):
            others = range(body.get("top_logprobs", 0))
            tops = [[{"token": f"t{i}", "logprob": v - i} for i in others] for v in values]
            both = zip(values, tops, strict=True)
            choice["logprobs"] = {"content": [{"token": "t", "logprob": v, "top_logprobs": top} for v, top in both]}
        elif not chat and body.get("logprobs") is not None:
            choice["logprobs"] = {"token_logprobs": values, "tokens": ["t"] * 3, "top_logprobs": None}
        choices.append(choice)
    return {"choices": choices, "usage": {"prompt_tokens": 3, "completion_tokens": 3 * len(choices)}}


def main() -> None:
    """Each prompt that comes is logged, as a line, before it is answered."""
    port, delay, log = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3]

    def behave(body: dict, number: int) -> str:
        prompt = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
        with open(log, "a") as stream:
            stream.write(json.dumps(prompt) + "\n")
        return "ok"

    stub = Stub(behave, delay, port)
    stub.start()
    print(stub.port, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
