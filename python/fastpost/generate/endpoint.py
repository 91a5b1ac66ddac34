# SPDX-License-Identifier: Apache-2.0
"""An OpenAI-compatible HTTP server (vLLM, SGLang, llama.cpp, ...) as the generator, with the standard library alone.

    endpoint = Endpoint("http://localhost:8000/v1", "Qwen/Qwen3-8B")
    for completion in endpoint.run([Request("Who are you?", Sampling(n=4, temperature=0.8))]): ...

The same interface as Engine.run, but a prompt may be a string or a list of messages, too. Messages go to
/chat/completions, token ids to /completions, and strings to the former as a user message or, with chat=False, to the
latter as they are.

What is tried again, with exponential backoff and jitter: refused and broken connections, timeouts, 408, 425, 429 and
5xx (Retry-After is kept to), answers cut off in the middle, and answers that are not what was asked for. Any other 4xx
is final. A request is answered once or not at all, so a server may die and come back while it is used."""

from __future__ import annotations

import contextlib
import email.utils
import hashlib
import http.client
import json
import math
import os
import queue
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from urllib.parse import urlsplit

from fastpost.generate.replies import Broken, completions, stream
from fastpost.generate.request import Completion, Request

FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
"""Seconds before the first and at most before any further attempt; half of it is drawn."""
TRIES = 6
"""Attempts of a request that fails while the server answers others."""
WRONG = 3
"""Attempts of a request that gets well-formed answers of the wrong form: another will hardly be better."""
AGAIN = (408, 425, 429)
NOBODY = (401, 403, 404, 405)
"""Statuses that every other request would get as well."""
UNSAID_S = 1.0
"""Seconds of failures only that are not worth a word."""
CONNECT_S = 30.0
"""Seconds for making a connection."""


class EndpointError(OSError):
    """The server is of no use: unreachable for longer than `patience`, or it refuses everybody."""


class Endpoint:
    """
    Args:
        url: of the API, such as http://host:8000/v1.
        model: its name there; None: the only one that the server has.
        key: sent as a bearer token; None: OPENAI_API_KEY of the environment, if it is there.
        chat: send strings as user messages.
        concurrency: requests that are under way at once.
        timeout: seconds without a byte from the server.
        patience: seconds without any answer at all after which the server counts as dead.
        failed: called with (request, message) for a request that the server refuses or fails on again and again; the
            others go on. None: it ends everything, as EndpointError.
        say: gets a sentence when the server is lost, and when it is back.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        key: str | None = None,
        chat: bool = True,
        concurrency: int = 16,
        timeout: float = 600.0,
        patience: float = 300.0,
        failed: Callable[[Request, str], None] | None = None,
        say: Callable[[str], None] = lambda text: None,
    ):
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
            raise ValueError(
                f"[Endpoint] url: expected an address such as http://localhost:8000/v1, got {url!r}. Correct it."
            )
        for name, value in (("concurrency", concurrency), ("timeout", timeout), ("patience", patience)):
            if not value > 0:
                raise ValueError(f"[Endpoint] {name}: expected more than 0, got {value}. Correct it.")
        self.url, self.model, self.chat = url.rstrip("/"), model, chat
        self.concurrency, self.timeout, self.patience = concurrency, timeout, patience
        self._failed, self._say = failed, say
        self._https, self._host, self._port = parts.scheme == "https", parts.hostname, port
        self._path = parts.path.rstrip("/")
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key := key or os.environ.get("OPENAI_API_KEY"):
            self._headers["Authorization"] = f"Bearer {key}"
        self._lock = threading.Lock()
        self._last_success = self._lost = None  # times
        self._told = False  # that it is lost
        self._stats = {"requests": 0, "finished": 0, "failed": 0, "retries": 0, "prompt_tokens": 0, "new_tokens": 0}

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *_) -> None:
        pass

    def stats(self) -> dict:
        """requests (sent, further attempts included), finished, failed, retries, prompt_tokens, new_tokens."""
        with self._lock:
            return dict(self._stats)

    def run(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Yield answers as they arrive, the n of a request together. Requests are taken from the iterable when there
        is room, in the caller's thread. Raises EndpointError when the server is of no use; what had arrived has been
        yielded then, and what was under way is dropped."""
        self.find_model()
        work, results, stop = queue.SimpleQueue(), queue.SimpleQueue(), threading.Event()
        workers = []
        numbered = iter(requests)
        under_way = taken = 0
        more = True
        try:
            while more or under_way:
                while more and under_way < self.concurrency:
                    request = next(numbered, None)
                    if request is None:
                        more = False
                        break
                    if under_way == len(workers):
                        workers.append(_Worker(self, work, results, stop))
                    work.put((request, taken if request.id is None else request.id))
                    under_way, taken = under_way + 1, taken + 1
                if not under_way:
                    break
                request, answer = results.get()
                under_way -= 1
                if isinstance(answer, list):
                    yield from answer
                elif isinstance(answer, Refused) and self._failed is not None:
                    self._count(failed=1)
                    self._failed(request, str(answer))
                else:
                    while not results.empty():
                        _, late = results.get()
                        if isinstance(late, list):
                            yield from late
                    raise EndpointError(str(answer)) if isinstance(answer, (Refused, EndpointError)) else answer
        finally:
            stop.set()
            for worker in workers:
                work.put(None)
                worker.hang_up()

    def generate(self, requests: Iterable[Request]) -> list[list[Completion]]:
        """The answers of each request, in order (none for one that `failed`)."""
        requests = list(requests)
        numbered = {i if r.id is None else r.id: [] for i, r in enumerate(requests)}
        for completion in self.run(requests):
            numbered[completion.id].append(completion)
        return list(numbered.values())

    def find_model(self) -> str:
        """The model's name. Asks the server where none was given; ValueError when it has several."""
        if self.model is None:
            self.model = self._only_model()
        return self.model

    def _only_model(self) -> str:
        line = _Line(self, threading.Event())
        try:
            found = self._persist(line, "GET", "/models", None, lambda response: _names(response.read()))
        except Refused as error:
            raise EndpointError(str(error)) from None
        finally:
            line.close()
        if len(found) != 1:
            raise ValueError(
                f"[Endpoint] model: expected the name of one of the server's models, got none. {self.url} has: "
                f"{', '.join(found) or 'none'}."
            )
        return found[0]

    def _answer(self, line: _Line, request: Request, name) -> list[Completion]:
        """The n completions of a request, however many attempts it takes. Raises Refused or EndpointError."""
        path, body = self._body(request, name)
        seen = [False]

        def parse(response) -> list[Completion]:
            if request.stream is None:
                return completions(response.read(), request, name)
            return stream(response, request, name, seen)

        found, usage = self._persist(line, "POST", path, json.dumps(body).encode(), parse, seen)
        self._count(finished=len(found), **usage)
        return found

    def _body(self, request: Request, name) -> tuple[str, dict]:
        prompt, how = request.prompt, request.sampling
        if how.logits_callback is not None or how.logprob_of != "model":
            raise Refused("logits_callback and logprob_of='sampled' need an Engine; a server cannot do them")
        if isinstance(prompt, str) and self.chat:
            prompt = [{"role": "user", "content": prompt}]
        chat = not isinstance(prompt, str) and bool(prompt) and isinstance(prompt[0], dict)
        body = {"model": self.model, "messages" if chat else "prompt": prompt, "max_tokens": how.max_new_tokens,
                "temperature": how.temperature, "n": how.n, "seed": _seed(how.seed, name)}  # fmt: skip
        if how.stop:
            body["stop"] = list(how.stop)
        # What OpenAI's own API does not know is sent only where it does something.
        for name, off in (("top_p", 1), ("top_k", 0), ("min_p", 0), ("repetition_penalty", 1), ("ignore_eos", False)):
            if getattr(how, name) != off:
                body[name] = getattr(how, name)
        if how.logprobs is not None:
            if chat:
                body |= {"logprobs": True} | ({"top_logprobs": how.logprobs} if how.logprobs else {})
            else:
                body["logprobs"] = max(1, how.logprobs)  # 0 is taken for "none" by some servers
        if request.stream is not None:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        body |= getattr(request, "extra", {})
        return "/chat/completions" if chat else "/completions", body

    def _persist(self, line: _Line, method: str, path: str, body: bytes | None, parse: Callable, seen=(False,)):
        """parse(response) of the first attempt that works. Raises Refused when this request has no hope, EndpointError
        when none has."""
        first = None  # when this request failed for the first time
        tries, attempt = {"busy": 0, "failed": 0, "wrong": 0}, 0
        while True:
            began = time.monotonic()
            try:
                self._count(requests=1)
                found = line.ask(method, self._path + path, body, parse)
                self._found(began)
                return found
            except Refused:
                self._found(began)
                raise
            except _Attempt as error:
                failure = error
            now = time.monotonic()
            first = now if first is None else first
            with self._lock:
                success = self._last_success
            tries[failure.kind] += 1
            if seen[0]:
                raise Refused(f"{failure}, when a part of the answer had been streamed")
            if tries["wrong"] >= WRONG:
                raise Refused(f"{failure} ({WRONG} times)")
            if tries["failed"] >= TRIES and success is not None and success > first:
                raise Refused(f"{failure} ({tries['failed']} times, while other requests were answered)")
            if failure.unknown_host and success is None:
                raise EndpointError(f"{self.url}: {failure}. Is the name right?")
            quiet = now - max(first, success or first)
            if quiet > self.patience:
                raise EndpointError(f"{self.url}: no answer for {quiet:.0f} seconds; the last attempt: {failure}")
            if failure.kind != "wrong" and not line.stop.is_set():
                self._failure(str(failure))
            wait = min(LONGEST_WAIT, FIRST_WAIT * 2**attempt) * random.uniform(0.5, 1)
            attempt = min(attempt + 1, 30)
            if failure.after is not None:
                wait = max(wait, failure.after)
                first += wait  # a wait that was asked for tries no patience
            self._count(retries=1)
            if line.stop.wait(wait):
                raise Refused("stopped")

    def _count(self, **more: int) -> None:
        with self._lock:
            for name, value in more.items():
                self._stats[name] += value

    def _found(self, began: float) -> None:
        """The server answered what it was asked at `began`."""
        with self._lock:
            now, lost, told = time.monotonic(), self._lost, self._told
            self._last_success = now
            if lost is None or began < lost:  # on its way when the others failed: says nothing about now
                return
            self._lost, self._told = None, False
        if told:
            self._say(f"{self.url}: answers again after {now - lost:.0f} s")

    def _failure(self, text: str) -> None:
        with self._lock:
            now = time.monotonic()
            self._lost = now if self._lost is None else self._lost
            if self._told or now - self._lost < UNSAID_S:
                return
            self._told = True
        self._say(f"{self.url}: {text}; trying again for up to {self.patience:.0f} s")


class Refused(Exception):
    """One request has no hope; the message says why. The others may go on."""


class _Attempt(Exception):
    """An attempt came to nothing. kind: "busy" (says nothing about the request), "failed" (may be due to it), "wrong"
    (a well-formed answer to something else). after: seconds that the server asks to wait."""

    def __init__(self, message: str, kind: str, after: float | None = None, unknown_host: bool = False):
        super().__init__(message)
        self.kind, self.after, self.unknown_host = kind, after, unknown_host


class _Line:
    """A connection that is kept open from request to request, and opened anew when it broke."""

    def __init__(self, endpoint: Endpoint, stop: threading.Event):
        self.endpoint, self.stop = endpoint, stop
        self.connection: http.client.HTTPConnection | None = None
        self._socket: socket.socket | None = None  # http.client forgets its own before the answer is read
        self._sent = False

    def ask(self, method: str, path: str, body: bytes | None, parse: Callable):
        """parse(response), once. Raises _Attempt, Refused or EndpointError."""
        try:
            kept = self.connection is not None
            try:
                response = self._send(method, path, body)
            except (ConnectionError, http.client.BadStatusLine):
                if not kept or self.stop.is_set():
                    raise
                self.close()  # the server had closed it in the meantime, which is its right
                response = self._send(method, path, body)
            if not 200 <= response.status < 300:
                self._status(response)
            found = parse(response)
            if response.will_close:
                self.close()
            return found
        except (_Attempt, Refused):  # a status: the connection is still good
            raise
        except BaseException as error:
            self.close()
            raise self._meaning(error) from None

    def _meaning(self, error: BaseException) -> BaseException:
        if isinstance(error, Broken):
            return _Attempt(str(error), "wrong" if error.whole else "failed")
        if isinstance(error, ssl.SSLCertVerificationError):
            return EndpointError(f"{self.endpoint.url}: {error}")
        if isinstance(error, socket.gaierror):
            return _Attempt(f"unknown host: {error.strerror}", "busy", unknown_host=True)
        kind = "failed" if self._sent else "busy"
        if isinstance(error, TimeoutError):
            return _Attempt(f"no answer within {self.endpoint.timeout:g} s" if self._sent else "cannot connect", kind)
        if isinstance(error, http.client.IncompleteRead):
            return _Attempt(f"the answer was cut off after {len(error.partial)} bytes", kind)
        if isinstance(error, (OSError, http.client.HTTPException)) and not isinstance(error, EndpointError):
            words = getattr(error, "strerror", None) or str(error) or type(error).__name__
            return _Attempt(words[:1].lower() + words[1:], kind)
        return error

    def _send(self, method: str, path: str, body: bytes | None) -> http.client.HTTPResponse:
        self._sent = False
        if self.connection is None:
            end = self.endpoint
            made = http.client.HTTPSConnection if end._https else http.client.HTTPConnection
            self.connection = made(end._host, end._port, timeout=min(CONNECT_S, end.timeout))
            self.connection.connect()
            self._socket = self.connection.sock
            self._socket.settimeout(end.timeout)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connection.request(method, path, body, self.endpoint._headers)
        self._sent = True
        return self.connection.getresponse()

    def _status(self, response: http.client.HTTPResponse) -> None:
        """Raise what a status that is no success means."""
        status, url = response.status, self.endpoint.url
        said = f"HTTP {status}: {_said(response.read()) or response.reason}"
        if response.will_close:
            self.close()
        if status in AGAIN or status >= 500:
            kind = "busy" if status in (429, 503) else "failed"
            raise _Attempt(said, kind, _retry_after(response.headers.get("Retry-After")))
        if status in NOBODY:
            hint = " Is the path of the URL right (it mostly ends in /v1), and the model's name?"
            raise EndpointError(f"{url}: {said}.{hint if status in (404, 405) else ''}")
        if status < 400:
            there = response.headers.get("Location", "elsewhere")
            raise EndpointError(f"{url}: HTTP {status}: it refers to {there}. Give that URL.")
        raise Refused(said)

    def close(self) -> None:
        if self.connection is not None:
            self.connection.close()
            self.connection = None

    def hang_up(self) -> None:
        """From another thread: whoever waits for this line gets an error now."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)


class _Worker:
    """A thread with a line of its own, from one queue to another."""

    def __init__(self, endpoint: Endpoint, work, results, stop: threading.Event):
        self.endpoint, self.work, self.results = endpoint, work, results
        self.line = _Line(endpoint, stop)
        threading.Thread(target=self._serve, daemon=True, name="fastpost endpoint").start()

    def hang_up(self) -> None:
        self.line.hang_up()

    def _serve(self) -> None:
        try:
            while (item := self.work.get()) is not None and not self.line.stop.is_set():
                request, name = item
                try:
                    answer = self.endpoint._answer(self.line, request, name)
                except BaseException as error:
                    answer = error
                self.results.put((request, answer))
        finally:
            self.line.close()


def _seed(seed: int, name) -> int:
    """As in Engine, draws depend on the seed and the request's id."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=4).digest(), "big") >> 1


def _names(data: bytes) -> list[str]:
    try:
        return [entry["id"] for entry in json.loads(data)["data"]]
    except (ValueError, KeyError, TypeError):
        raise Broken("a list of models was expected, something else came", whole=True) from None


def _said(data: bytes) -> str:
    """The message in the body of an error, whichever of the usual forms it has."""
    text = data[:2000].decode("utf-8", "replace").strip()
    try:
        tree = json.loads(data)
    except ValueError:
        return "" if text.startswith("<") else " ".join(text.split())[:500]
    for name in ("error", "message", "detail"):
        if isinstance(tree, dict) and name in tree:
            tree = tree[name]
    return (tree if isinstance(tree, str) else json.dumps(tree, ensure_ascii=False))[:500].rstrip(".")


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header, which has them or a date."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError):
            return None
    return min(max(seconds, 0.0), 3600.0) if math.isfinite(seconds) else None
