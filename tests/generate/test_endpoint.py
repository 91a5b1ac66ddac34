# SPDX-License-Identifier: Apache-2.0
"""An OpenAI-compatible server as the generator: a stub in a thread that refuses, stalls, dies and comes back."""

import email.utils
import threading
import time

import pytest

from fastpost.generate import Endpoint, EndpointError, Request, Sampling
from fastpost.generate import endpoint as module
from stub_server import Stub, logprob_of, text_of

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


@pytest.fixture
def stub():
    with Stub() as stub:
        yield stub


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(module, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(module, "LONGEST_WAIT", 0.05)


def requests(count: int, **how) -> list[Request]:
    return [Request(f"p{i}", Sampling(**how)) for i in range(count)]


def texts(completions) -> dict:
    """(id, index) -> text; each may come once."""
    found = {}
    for c in completions:
        assert (c.id, c.index) not in found
        found[c.id, c.index] = c.text
    return found


def expected(count: int, n: int = 1) -> dict:
    return {(i, j): text_of(f"p{i}", j) for i in range(count) for j in range(n)}


# ---- what is sent and what comes back ----


def test_messages_strings_and_ids_go_where_they_belong(stub):
    endpoint = Endpoint(stub.url, "m", concurrency=1)
    list(endpoint.run([Request(CHAT), Request("Hi"), Request([5, 6])]))
    list(Endpoint(stub.url, "m", chat=False).run([Request("Once upon")]))
    assert stub.paths == ["/v1/chat/completions"] * 2 + ["/v1/completions"] * 2
    assert [b.get("messages") for b in stub.bodies] == [CHAT, [{"role": "user", "content": "Hi"}], None, None]
    assert [b.get("prompt") for b in stub.bodies] == [None, None, [5, 6], "Once upon"]


def test_options_are_passed_on_and_defaults_left_out(stub):
    how = Sampling(max_new_tokens=7, temperature=0.5, top_p=0.9, top_k=40, min_p=0.1, repetition_penalty=1.1, n=3,
                   stop=("END", "\n\n"), seed=3, logprobs=0)  # fmt: skip
    endpoint = Endpoint(stub.url, "m", concurrency=1)
    first, second, third = endpoint.generate([Request("p0", how)])[0]
    (body,) = stub.bodies
    seed = body.pop("seed")
    assert body == {
        "model": "m", "messages": [{"role": "user", "content": "p0"}], "max_tokens": 7, "temperature": 0.5, "n": 3,
        "stop": ["END", "\n\n"], "top_p": 0.9, "top_k": 40, "min_p": 0.1, "repetition_penalty": 1.1, "logprobs": True,
    }  # fmt: skip
    assert [c.text for c in (first, second, third)] == [text_of("p0", j) for j in range(3)]
    assert second.logprobs == [logprob_of(1, place) for place in range(3)] and second.finish_reason == "stop"
    assert endpoint.stats()["new_tokens"] == 9 and first.prompt_tokens == 3
    list(endpoint.run([Request("p0"), Request("p0", id=0), Request("p0", Sampling(seed=1), id=0)]))
    assert set(stub.bodies[1]) == {"model", "messages", "max_tokens", "temperature", "n", "seed"}
    seeds = [b["seed"] for b in stub.bodies[1:]]
    assert seeds[0] == seeds[1] != seeds[2] and seed not in seeds and all(0 <= s < 2**31 for s in [seed, *seeds])


def test_logprobs_of_plain_text(stub):
    endpoint = Endpoint(stub.url, "m", chat=False)
    ((found,),) = endpoint.generate([Request("p0", Sampling(logprobs=0))])
    assert stub.bodies[0]["logprobs"] == 1 and found.logprobs == [logprob_of(0, place) for place in range(3)]


def test_key(stub, monkeypatch):
    list(Endpoint(stub.url, "m", key="k1").run(requests(1)))
    monkeypatch.setenv("OPENAI_API_KEY", "k2")
    list(Endpoint(stub.url, "m").run(requests(1)))
    monkeypatch.delenv("OPENAI_API_KEY")
    list(Endpoint(stub.url, "m").run(requests(1)))
    assert [h.get("Authorization") for h in stub.headers] == ["Bearer k1", "Bearer k2", None]


def test_the_only_model_is_found(stub):
    list(Endpoint(stub.url).run(requests(1)))
    assert stub.bodies[0]["model"] == "m"
    stub.models = ["a", "b"]
    with pytest.raises(ValueError, match=r"expected the name of one of the server's models.* has: a, b\."):
        list(Endpoint(stub.url).run(requests(1)))


def test_many_at_once_but_not_more(stub):
    stub.delay = 0.02
    assert texts(Endpoint(stub.url, "m", concurrency=4).run(requests(40))) == expected(40)
    assert 2 <= stub.most_at_once <= 4 and len(stub.bodies) == 40


def test_requests_are_taken_when_there_is_room(stub):
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield Request("p")

    running = Endpoint(stub.url, "m", concurrency=3).run(endless())
    for _ in range(5):
        next(running)
    running.close()
    assert len(taken) <= 8


def test_connections_are_kept(stub):
    endpoint = Endpoint(stub.url, "m", concurrency=1)
    opened, connect = [], module.http.client.HTTPConnection.connect
    module.http.client.HTTPConnection.connect = lambda self: (opened.append(1), connect(self))
    try:
        list(endpoint.run(requests(10)))
    finally:
        module.http.client.HTTPConnection.connect = connect
    assert len(opened) == 1


# ---- what is tried again ----


@pytest.mark.parametrize(
    "what",
    ["drop", "die", "die without length", "garbage", "no choices", "too few", "twice the same", "null text", "abort",
     "no logprobs", (500, {}, {"error": {"message": "oops"}}), (502, {}, b"<html>bad gateway</html>"), (503, {}, b""),
     (429, {}, b"slow down"), (408, {}, b"")],
)  # fmt: skip
def test_one_bad_answer_is_asked_for_again(stub, what):
    """Every third answer is spoiled once: all arrive, each once."""
    spoilt = set()

    def behave(body, number):
        prompt = body["messages"][-1]["content"]
        if int(prompt[1:]) % 3 == 0 and prompt not in spoilt:
            spoilt.add(prompt)
            return what
        return "ok"

    stub.behave = behave
    endpoint = Endpoint(stub.url, "m", concurrency=4)
    assert texts(endpoint.run(requests(12, n=2, logprobs=0))) == expected(12, 2)
    assert len(spoilt) == 4 and len(stub.bodies) == 16
    assert what == "drop" or endpoint.stats()["retries"] == 4  # a kept connection may be closed: sent again at once


def test_stalled_answers_time_out(stub):
    stub.behave = lambda body, number: "stall" if number == 1 else "ok"
    began = time.monotonic()
    assert texts(Endpoint(stub.url, "m", concurrency=1, timeout=0.3).run(requests(4))) == expected(4)
    assert 0.3 <= time.monotonic() - began < 5


@pytest.mark.parametrize("date", [False, True])
def test_retry_after_is_kept_to(stub, date):
    times = []

    def behave(body, number):
        times.append(time.time())
        wait = email.utils.formatdate(time.time() + 2.5, usegmt=True) if date else "0.7"
        return (429, {"Retry-After": wait}, {"error": {"message": "later"}}) if number == 0 else "ok"

    stub.behave = behave
    assert texts(Endpoint(stub.url, "m", patience=0.1).run(requests(1))) == expected(1)
    assert (1.4 if date else 0.7) <= times[1] - times[0] < 5  # a date has whole seconds


def test_waits_grow_and_are_drawn(stub, monkeypatch):
    monkeypatch.setattr(module, "FIRST_WAIT", 1.0)
    monkeypatch.setattr(module, "LONGEST_WAIT", 6.0)
    waits = []

    class Event(threading.Event):
        def wait(self, timeout=None):
            waits.append(timeout)
            return False

    stub.behave = lambda body, number: (500, {}, b"") if number < 6 else "ok"
    line = module._Line(Endpoint(stub.url, "m"), Event())
    found = line.endpoint._answer(line, Request("p0"), 0)
    assert found[0].text == text_of("p0", 0) and len(waits) == 6
    for wait, most in zip(waits, (1, 2, 4, 6, 6, 6), strict=True):
        assert most / 2 <= wait <= most
    assert len({w / m for w, m in zip(waits, (1, 2, 4, 6, 6, 6))}) > 1


def test_a_server_that_dies_and_comes_back(stub):
    """Killed in mid-batch, away for a while, back on the same port: nothing lost, nothing twice."""
    stub.delay, said = 0.01, []
    endpoint = Endpoint(stub.url, "m", concurrency=8, say=said.append)
    found = []
    for number, completion in enumerate(endpoint.run(requests(60))):
        found.append(completion)
        if number in (10, 30):
            stub.stop()
            threading.Timer(1.3, stub.start).start()
    assert texts(found) == expected(60)
    assert len(said) == 4 and all("connection refused; trying again for up to 300 s" in s for s in said[::2])
    assert all("answers again after 1 s" in s for s in said[1::2])


def test_a_server_that_stays_dead(stub):
    stub.delay = 0.01
    endpoint = Endpoint(stub.url, "m", concurrency=8, patience=0.5)
    found, began = [], None
    with pytest.raises(EndpointError, match=r"no answer for \d+ seconds; the last attempt: connection refused"):
        for completion in endpoint.run(requests(60)):
            found.append(completion)
            if len(found) == 10:
                stub.stop()
                began = time.monotonic()
    assert 0.5 <= time.monotonic() - began < 5 and 10 <= len(texts(found)) < 60


# ---- what is final ----


def test_a_4xx_is_final_and_said_with_its_request(stub):
    def behave(body, number):
        too_long = body["messages"][-1]["content"] == "p3"
        return (400, {}, {"error": {"message": "maximum context length is 9 tokens."}}) if too_long else "ok"

    stub.behave = behave
    failed = []
    endpoint = Endpoint(stub.url, "m", failed=lambda request, message: failed.append((request.prompt, message)))
    assert texts(endpoint.run(requests(6))) == {k: v for k, v in expected(6).items() if k != (3, 0)}
    assert failed == [("p3", "HTTP 400: maximum context length is 9 tokens")] and len(stub.bodies) == 6
    assert endpoint.generate(requests(4))[3] == []
    with pytest.raises(EndpointError, match="HTTP 400: maximum context length"):
        list(Endpoint(stub.url, "m").run(requests(6)))


@pytest.mark.parametrize("body, message", [
    ({"detail": "no such field"}, "no such field"), ({"message": "bad"}, "bad"), ({"error": "bad"}, "bad"),
    (b"plain words\n", "plain words"), (b"<html>x</html>", "Unprocessable Entity"), (b"", "Unprocessable Entity"),
    ({"detail": [{"loc": ["n"], "msg": "too many"}]}, '[{"loc": ["n"], "msg": "too many"}]'),
])  # fmt: skip
def test_messages_of_servers(stub, body, message):
    stub.behave = lambda *_: (422, {}, body)
    failed = []
    list(Endpoint(stub.url, "m", failed=lambda _, message: failed.append(message)).run(requests(1)))
    assert failed == [f"HTTP 422: {message}"]


@pytest.mark.parametrize("status", [401, 403, 404, 405])
def test_what_everybody_would_get_ends_it(stub, status):
    stub.behave = lambda body, number: (status, {}, {"error": {"message": "no"}}) if number >= 2 else "ok"
    found = []
    with pytest.raises(EndpointError, match=f"HTTP {status}: no"):
        for completion in Endpoint(stub.url, "m", concurrency=1, failed=lambda *_: None).run(requests(9)):
            found.append(completion)
    assert len(found) == 2 and len(stub.bodies) == 3


def test_a_redirect_is_named(stub):
    stub.behave = lambda *_: (307, {"Location": "http://elsewhere/v1"}, b"")
    with pytest.raises(EndpointError, match=r"it refers to http://elsewhere/v1\. Give that URL"):
        list(Endpoint(stub.url, "m").run(requests(1)))


def test_always_the_wrong_form_is_given_up_soon(stub):
    stub.behave = lambda body, _: "too few" if body["n"] > 1 else "ok"
    failed = []
    endpoint = Endpoint(stub.url, "m", failed=lambda r, m: failed.append(m))
    assert len(list(endpoint.run([*requests(1, n=4), *requests(2)]))) == 2
    assert failed == ["4 answers were asked for (n), 3 came (3 times)"]


def test_a_request_that_kills_the_server_is_given_up(stub):
    """The others are answered all the while."""
    stub.delay = 0.01
    stub.behave = lambda body, _: "drop" if body["messages"][-1]["content"] == "p1" else "ok"
    failed = []
    endpoint = Endpoint(stub.url, "m", concurrency=2, failed=lambda r, m: failed.append((r.prompt, m)))
    found = texts(endpoint.run(requests(60)))
    assert len(found) == 59 and failed[0][0] == "p1" and "while other requests were answered" in failed[0][1]


def test_an_unknown_host_is_said_at_once():
    began = time.monotonic()
    with pytest.raises(EndpointError, match=r"unknown host: .*Is the name right\?"):
        list(Endpoint("http://no-such-host.invalid/v1", "m").run(requests(1)))
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("url", ["localhost:8000/v1", "ftp://h/v1", "http://", "http://h:x/v1", ""])
def test_bad_urls(url):
    with pytest.raises(ValueError, match=r"\[Endpoint\] url: expected an address such as"):
        Endpoint(url, "m")


def test_bad_numbers_and_what_a_server_cannot_do(stub):
    with pytest.raises(ValueError, match=r"\[Endpoint\] concurrency: expected more than 0, got 0"):
        Endpoint(stub.url, "m", concurrency=0)
    with pytest.raises(EndpointError, match="need an Engine"):
        list(Endpoint(stub.url, "m").run(requests(1, logprob_of="sampled")))
    assert not stub.bodies


# ---- streaming and leaving early ----


def test_streamed_pieces_make_the_text(stub):
    pieces = []
    request = Request("p0", Sampling(n=2, temperature=1.0), stream=pieces.append)
    ((first, second),) = Endpoint(stub.url, "m").generate([request])
    assert stub.bodies[0]["stream"] is True and len(pieces) > 4
    for completion in (first, second):
        mine = [p for p in pieces if p.index == completion.index]
        assert "".join(p.text for p in mine) == completion.text == text_of("p0", completion.index)
        assert [p.finish_reason for p in mine] == [None] * (len(mine) - 1) + ["stop"]


@pytest.mark.parametrize("streamed", [False, True])
def test_logprobs_and_alternatives(stub, streamed):
    request = Request("p0", Sampling(logprobs=2), stream=(lambda piece: None) if streamed else None)
    ((found,),) = Endpoint(stub.url, "m").generate([request])
    values = [logprob_of(0, place) for place in range(3)]
    assert stub.bodies[0]["top_logprobs"] == 2 and found.logprobs == values
    assert found.top_logprobs == [[("t0", v), ("t1", v - 1)] for v in values]
    stub.behave = lambda *_: "no logprobs"
    failed = []
    if streamed:
        stub.behave = lambda body, _: body.pop("logprobs") and "ok"
    endpoint = Endpoint(stub.url, "m", failed=lambda _, message: failed.append(message))
    assert list(endpoint.run([request])) == [] and "has no log-probs, which were asked for" in failed[0]


def test_a_stream_that_breaks_off(stub):
    """Before the first piece it is tried again; after it, the reader has seen half an answer and is told."""
    pieces, failed = [], []
    stub.behave = lambda body, number: "cut stream at once" if number == 0 else "ok"
    endpoint = Endpoint(stub.url, "m", failed=lambda r, m: failed.append(m))
    assert len(list(endpoint.run([Request("p0", stream=pieces.append)]))) == 1 and len(stub.bodies) == 2
    assert "".join(p.text for p in pieces) == text_of("p0", 0) and not failed
    stub.behave = lambda *_: "cut stream"
    assert list(endpoint.run([Request("p0", stream=pieces.append)])) == []
    assert "when a part of the answer had been streamed" in failed[0]


def test_leaving_early_does_not_wait(stub):
    stub.behave = lambda body, number: "ok" if number == 0 else "stall"
    before = threading.active_count()
    began = time.monotonic()
    for _ in Endpoint(stub.url, "m", concurrency=4).run(requests(50)):
        break
    stub.go_on.set()
    while any(t.name == "fastpost endpoint" for t in threading.enumerate()) and time.monotonic() - began < 5:
        time.sleep(0.01)
    assert time.monotonic() - began < 3 and len(stub.bodies) <= 5
    assert not any(t.name == "fastpost endpoint" for t in threading.enumerate()), before
