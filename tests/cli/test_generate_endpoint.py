# SPDX-License-Identifier: Apache-2.0
"""`fastpost generate --endpoint`: rows through a server that may die, by a command that may be killed."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fastpost.cli import main
from fastpost.generate import endpoint as module
from stub_server import Stub, text_of


@pytest.fixture
def stub():
    with Stub() as stub:
        yield stub


@pytest.fixture(autouse=True)
def _quick(monkeypatch, tmp_path):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(module, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(module, "LONGEST_WAIT", 0.05)
    monkeypatch.chdir(tmp_path)


def inputs(count: int, **more) -> None:
    with open("in.jsonl", "w") as stream:
        stream.writelines(json.dumps({"id": f"r{i}", "prompt": f"p{i}", **more}) + "\n" for i in range(count))


def rows(name: str = "out.jsonl") -> list[dict]:
    with open(name) as stream:
        return [json.loads(line) for line in stream]


def run(stub, *more) -> int:
    return main(["generate", "--endpoint", stub.url, "--file", "in.jsonl", "--out", "out.jsonl", *more])


def whole(count: int, n: int = 1) -> list[dict]:
    return [
        {"id": f"r{i}", "prompt": f"p{i}", "line": i + 1, "answers": [text_of(f"p{i}", j) for j in range(n)],
         "finish": ["stop"] * n}
        for i in range(count)
    ]  # fmt: skip


def test_rows_through_a_server(stub, capsys):
    inputs(20)
    assert run(stub, "--temperature", "1", "--samples", "3", "--stop", "a", "--stop", "b", "--batch", "4") == 0
    assert rows() == whole(20, 3)
    said = capsys.readouterr()
    assert said.out.startswith("out.jsonl: 20 rows; 180 tokens, ") and not said.err
    assert all(b["stop"] == ["a", "b"] and b["n"] == 3 and b["model"] == "m" for b in stub.bodies)
    assert len({b["seed"] for b in stub.bodies}) == 20
    settings = json.loads(Path("out.jsonl.settings.json").read_text())["settings"]
    assert settings["--endpoint-model"] == "m" and settings["--samples"] == 3 and "MODEL" not in settings


def test_a_row_overrides_the_command(stub):
    with open("in.jsonl", "w") as stream:
        for row in (
            {"prompt": "p0", "temperature": 0.3, "max_new_tokens": 5, "stop": "S", "samples": 2, "system": "mine"},
            {"prompt": [{"role": "system", "content": "its own"}, {"role": "user", "content": "p1"}], "top_k": 7},
            {"prompt": "p2", "tools": [{"type": "function"}], "chat_template_kwargs": {"enable_thinking": False}},
        ):
            stream.write(json.dumps(row) + "\n")
    assert run(stub, "--system", "S0", "--max-new-tokens", "9", "--top-p", "0.9", "--batch", "1") == 0
    first, second, third = stub.bodies
    assert [b["max_tokens"] for b in stub.bodies] == [5, 9, 9] and [b["n"] for b in stub.bodies] == [2, 1, 1]
    assert first["temperature"] == 0.3 and first["stop"] == ["S"] and "stop" not in second and second["top_k"] == 7
    assert [b["messages"][0]["content"] for b in stub.bodies] == ["mine", "its own", "S0"]
    assert third["tools"] == [{"type": "function"}] and third["chat_template_kwargs"] == {"enable_thinking": False}
    assert [len(r["answers"]) for r in rows()] == [2, 1, 1] and rows()[0]["temperature"] == 0.3


def test_plain_text_and_logprobs(stub):
    inputs(3)
    assert run(stub, "--plain", "--logprobs") == 0
    assert stub.paths == ["/v1/completions"] * 3
    assert [r["logprobs"] for r in rows()] == [[[-0.5, -1.5, -2.5]]] * 3 and "tokens" not in rows()[0]


def test_to_the_terminal(stub, capsys, monkeypatch):
    """Answers in the order of the prompts, whichever is finished first."""
    stub.behave = lambda body, number: time.sleep(0.2 * (body["messages"][-1]["content"] == "p0")) or "ok"
    argv = ["generate", "--endpoint", stub.url, "--endpoint-model", "m"]
    assert main([*argv, "p0", "p1", "--prompt", "p2"]) == 0
    assert capsys.readouterr().out == "".join(f"> p{i}\n{text_of(f'p{i}', 0)}\n\n" for i in range(3))
    assert main([*argv, "p0", "p1", "--json", "--logprobs"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert found[1] == {"prompt": "p1", "answers": [text_of("p1", 0)], "logprobs": [[-0.5, -1.5, -2.5]]}
    assert main([*argv, "p5", "--stream"]) == 0
    assert capsys.readouterr().out == text_of("p5", 0) + "\n" and stub.bodies[-1]["stream"] is True


def test_rows_that_the_server_refuses(stub, capsys):
    """Said with their place, status 1; the rest is there, and the same command tries those again."""
    inputs(8)
    refused = {"p2", "p5"}

    def behave(body, number):
        bad = body["messages"][-1]["content"] in refused
        return (400, {}, {"error": {"message": "too long"}}) if bad else "ok"

    stub.behave = behave
    assert run(stub) == 1
    said = capsys.readouterr().err
    assert "in.jsonl:3: HTTP 400: too long" in said and "in.jsonl:6: HTTP 400: too long" in said
    assert "rows that failed: 2, see above. They are not in out.jsonl. The same command tries again." in said
    assert rows() == [r for r in whole(8) if r["prompt"] not in refused]
    refused.clear()
    before = len(stub.bodies)
    assert run(stub) == 0 and len(stub.bodies) == before + 2 and rows() == whole(8)


def test_when_all_are_refused_it_ends(stub, capsys):
    inputs(50)
    stub.behave = lambda *_: (400, {}, {"error": {"message": "unknown field top_k"}})
    assert run(stub, "--top-k", "5", "--batch", "1") == 1
    said = capsys.readouterr().err
    assert said.count("unknown field top_k") == 10 and "the first 10 rows failed" in said and len(stub.bodies) == 10


def test_a_server_that_comes_back_and_one_that_does_not(stub, capsys):
    inputs(60)
    stub.delay, dead = 0.005, []

    def behave(body, number):
        if number in (15, 40) and number not in dead:
            dead.append(number)
            threading.Thread(target=die_for, args=(0.3,)).start()
            time.sleep(0.05)
        return "ok"

    def die_for(seconds):
        stub.stop()
        time.sleep(seconds)
        stub.start()

    stub.behave = behave
    assert run(stub, "--batch", "8") == 0 and dead == [15, 40] and rows() == whole(60)

    stub.behave = lambda body, number: threading.Thread(target=stub.stop).start() if number == before + 20 else "ok"
    before = len(stub.bodies)
    capsys.readouterr()
    assert run(stub, "--batch", "4", "--patience", "0.3", "--overwrite", "--endpoint-model", "m") == 1
    said, there = capsys.readouterr().err, rows()
    assert "no answer for" in said and "connection refused" in said
    assert f"out.jsonl: {len(there)} of 60 rows are there, whole. The same command without --overwrite goes on" in said
    assert 10 <= len(there) < 60 and len({r["line"] for r in there}) == len(there)
    stub.behave = lambda *_: "ok"
    stub.start()
    before = len(stub.bodies)
    assert run(stub, "--batch", "4", "--patience", "0.3", "--endpoint-model", "m") == 0
    assert rows() == whole(60) and len(stub.bodies) - before == 60 - len(there)


def command(url: str, *more: str) -> list[str]:
    return [sys.executable, "-m", "fastpost", "generate", "--endpoint", url, "--file", "in.jsonl", "--out", "out.jsonl",
            "--batch", "3", *more]  # fmt: skip


def size(name: str = "out.jsonl") -> int:
    return os.path.getsize(name) if os.path.exists(name) else 0


def until_it_grows(process, least: int) -> None:
    while process.poll() is None and size() <= least:
        time.sleep(0.001)


def test_killed_commands_lose_and_repeat_nothing(stub):
    inputs(60)
    stub.delay, draw = 0.01, random.Random(1)
    for _ in range(4):
        there = size()
        process = subprocess.Popen(command(stub.url), stderr=subprocess.DEVNULL)
        until_it_grows(process, there)
        time.sleep(draw.uniform(0, 0.1))
        process.kill()
        process.wait()
    finished = len(rows())
    assert finished >= 4
    done = subprocess.run(command(stub.url), capture_output=True, text=True)
    assert done.returncode == 0 and f"60 rows, {finished} of them from an earlier attempt" in done.stdout, done.stderr
    assert rows() == whole(60)
    again = subprocess.run(command(stub.url), capture_output=True, text=True)
    assert again.stdout == "out.jsonl: 60 rows, 60 of them from an earlier attempt\n"
    asked = [b["messages"][-1]["content"] for b in stub.bodies]
    assert len(asked) <= 60 + 4 * 3  # only what was under way at a kill was asked for twice


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_asked_to_stop(stub, number, status):
    inputs(60)
    stub.delay = 0.05
    process = subprocess.Popen(command(stub.url), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until_it_grows(process, 0)
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    there = len(rows())
    assert process.returncode == status and out == "" and 1 <= there < 60
    assert err == (f"{signal.Signals(number).name}: stopped. out.jsonl: {there} of 60 rows are there, whole. The same "
                   "command goes on from them.\n")  # fmt: skip
    assert run(stub) == 0 and rows() == whole(60)


def test_server_and_command_both_killed(tmp_path):
    """The server in a process of its own, killed by force and started again on its port while the command runs."""
    inputs(60)
    log = str(tmp_path / "log")
    server_file = os.path.join(os.path.dirname(__file__), "..", "stub_server.py")

    def serve(port: str = "0"):
        process = subprocess.Popen([sys.executable, server_file, port, "0.02", log], stdout=subprocess.PIPE, text=True)
        return process, process.stdout.readline().strip()

    server, port = serve()
    try:
        url = f"http://127.0.0.1:{port}/v1"
        process = subprocess.Popen(command(url), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        until_it_grows(process, 400)
        server.kill()
        server.wait()
        time.sleep(0.2)
        process.kill()
        process.wait()
        assert 0 < len(rows()) < 60
        process = subprocess.Popen(command(url, "--endpoint-model", "m"), stdout=subprocess.PIPE, text=True)
        time.sleep(0.3)
        server, _ = serve(port)
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0 and "60 rows" in out and rows() == whole(60)
    finally:
        server.kill()
        server.wait()


@pytest.mark.parametrize("argv, words", [
    (["--endpoint", "URL", "p", "--kv", "shadow"], "--endpoint and --kv: the server has its own cache"),
    (["--endpoint", "nonsense", "p"], "[Endpoint] url: expected an address such as"),
    (["--endpoint", "URL"], "expected a prompt, got no prompt"),
    (["model", "p", "--endpoint-model", "m"], "--endpoint-model without --endpoint"),
])  # fmt: skip
def test_mistakes(stub, capsys, monkeypatch, argv, words):
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert main(["generate", *(stub.url if a == "URL" else a for a in argv)]) == 1
    assert words in capsys.readouterr().err


def test_other_models_are_other_settings(stub, capsys):
    inputs(3)
    assert run(stub) == 0
    assert run(stub, "--endpoint-model", "other") == 1
    assert '--endpoint-model: "other", there "m"' in capsys.readouterr().err


def test_no_torch_is_needed(stub):
    inputs(2)
    code = (
        "import sys\nfrom fastpost.cli import main\nstatus = main(sys.argv[1:])\n"
        "sys.exit(status or any(m in sys.modules for m in ('torch', 'transformers', 'numpy')))"
    )
    done = subprocess.run([sys.executable, "-c", code, *command(stub.url)[3:]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
