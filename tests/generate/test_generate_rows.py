# SPDX-License-Identifier: Apache-2.0
"""JSON lines in and out: what a row may be, what a broken one is told, and an output that survives kills."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from fastpost.generate import rows
from fastpost.generate.request import Completion, Request, Sampling
from fastpost.generate.rows import ADDED, Output, read

THREE = ADDED[:3]
SETTINGS = {"--temperature": 0.5, "--stop": ["a"], "--system": None}


def write(path, *lines) -> None:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def inputs(path, count: int, **more):
    write(path, *(json.dumps({"prompt": f"p{i}", "n": i, **more}) for i in range(count)))
    return path


def lines(path) -> list[dict]:
    return [json.loads(text) for text in path.read_bytes().split(b"\n")[:-1]]


def done(row) -> dict:
    return {"answers": [f"re {row.prompt}"], "finish": ["stop"]}


def fill(out: Output, path, count: int | None = None, order=list) -> None:
    """Answer all missing rows, or `count` of them."""
    for row in order(out.missing(read(path)))[:count]:
        out.write(row, done(row))


# ---- input ----


def test_rows_with_their_lines_and_wishes(tmp_path):
    path = tmp_path / "in.jsonl"
    chat = [{"role": "user", "content": "Hi\u2028there"}]
    text = [
        json.dumps({"prompt": "a", "id": 7}), "", json.dumps({"prompt": chat}, ensure_ascii=False), "  ",
        json.dumps({"prompt": "c", "temperature": 0.5, "max_new_tokens": 9, "stop": "x", "samples": 2, "top_p": None,
                    "top_k": 3, "min_p": 0.1, "repetition_penalty": 2, "seed": -1, "system": "S"}),
    ]  # fmt: skip
    path.write_text("\ufeff" + "\n".join(text), encoding="utf-8")  # a BOM, and no end of the last line
    found = list(read(path))
    assert [(r.index, r.line, r.where) for r in found] == [(i, n, f"{path}:{n}") for i, n in enumerate((1, 3, 5))]
    assert [r.prompt for r in found] == ["a", chat, "c"] and found[0].own == {} and found[0].system is None
    assert found[2].own == {"temperature": 0.5, "max_new_tokens": 9, "stop": ("x",), "n": 2, "top_k": 3, "min_p": 0.1,
                            "repetition_penalty": 2, "seed": -1} and found[2].system == "S"  # fmt: skip
    assert [r.line for r in read(path, 2)] == [1, 3] and [r.index for r in read(path, begin=5)] == [5, 6, 7]


@pytest.mark.parametrize("line, message", [
    ('{"prompt": "a"', "expected an object with 'prompt', got broken JSON: Expecting ',' delimiter"),
    ('{"prompt": NaN}', "broken JSON: NaN is not JSON"),
    ("[" * 100000, "broken JSON"),
    ('["a"]', "expected an object with 'prompt', got list. Rename"),
    ('{"question": "a", "b": 1}', "expected an object with 'prompt', got columns question, b. Rename"),
    ('{"prompt": 3}', "column 'prompt': expected a string or a list of messages, got int. Write one"),
    ('{"prompt": null}', "expected a string or a list of messages, got null"),
    ('{"prompt": []}', "expected a string or a list of messages, got an empty list"),
    ('{"prompt": [{"from": "user", "value": "a"}]}', "prompt[0]: expected {'role', 'content'}, got keys from, value"),
    ('{"prompt": "a", "temperature": -1}', "column 'temperature', which overrides the command's option: expected a "
     "number from 0, got -1"),
    ('{"prompt": "a", "samples": 0}', "column 'samples', which overrides the command's option: expected a whole number "
     "of at least 1, got 0"),
    ('{"prompt": "a", "max_new_tokens": "9"}', "column 'max_new_tokens', which overrides"),
    ('{"prompt": "a", "stop": 5}', "column 'stop', which overrides the command's option: expected a string or a list"),
    ('{"prompt": "a", "stop": ["x", ""]}', "expected strings that are not empty, got ''"),
    ('{"prompt": "a", "system": 5}', "column 'system': expected a string, got int"),
    ('{"prompt": "a", "answers": []}', "column 'answers': expected no such column"),
])  # fmt: skip
def test_broken_rows_are_named(tmp_path, line, message):
    write(tmp_path / "in.jsonl", '{"prompt": "fine"}', line)
    with pytest.raises(ValueError) as caught:
        list(read(tmp_path / "in.jsonl", added=THREE))
    assert str(caught.value).startswith(f"{tmp_path}/in.jsonl:2: ") and message in str(caught.value)


def test_not_utf8_and_no_file(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(ValueError, match=r"in\.jsonl:1: expected UTF-8, got byte 12: .* Convert the file"):
        list(read(tmp_path / "in.jsonl"))
    with pytest.raises(ValueError, match=r"none: expected a \.jsonl file of prompts, got no such file"):
        list(read(tmp_path / "none"))


# ---- rows and their answers ----


def test_answers_come_together_and_requests_when_asked_for(tmp_path):
    """A row is there when all its answers are, whatever the order; a row without a request is passed over."""
    path, asked = inputs(tmp_path / "in.jsonl", 4), []

    def run(requests):
        made = list(requests)
        for r in reversed(made):
            for index in reversed(range(r.sampling.n)):
                yield Completion(r.id, index, 1, [index], f"{r.prompt}/{index}", "stop")

    def request(row):
        asked.append(row.index)
        return None if row.index == 2 else Request([row.index], Sampling(n=1 + row.index))

    found = list(rows.answer(run, read(path), request))
    assert [(r.index, [c.text for c in cs]) for r, cs in found] == [
        (i, [f"[{i}]/{j}" for j in range(i + 1)]) for i in (3, 1, 0)
    ]
    assert asked == [0, 1, 2, 3]


# ---- output ----


def test_columns_are_kept_and_order_is_restored(tmp_path):
    path, out = tmp_path / "in.jsonl", tmp_path / "deep/out.jsonl"
    odd = {"prompt": "ä\u2028\ud800", "nested": {"b": [1, None, 1.5e300], "a": True}, "": "x", "big": 2**70}
    write(path, "", *(json.dumps({"prompt": str(i)}) for i in range(5)), json.dumps(odd))
    with Output(out, SETTINGS) as output:
        fill(output, path, order=lambda r: list(r)[::-1])
        assert [r["line"] for r in lines(out)] == [7, 6, 5, 4, 3, 2]
        output.finish()
    found = lines(out)
    assert [r["line"] for r in found] == [2, 3, 4, 5, 6, 7]
    assert found[-1] == {**odd, "line": 7, "answers": [f"re {odd['prompt']}"], "finish": ["stop"]}
    assert sorted(os.listdir(out.parent)) == ["out.jsonl", "out.jsonl.settings.json"]
    with Output(out, SETTINGS) as output:  # odd row and all
        assert not list(output.missing(read(path)))


def test_what_is_there_is_not_done_again(tmp_path):
    path, out, said = inputs(tmp_path / "in.jsonl", 9), tmp_path / "out.jsonl", []
    with Output(out, SETTINGS) as output:
        fill(output, path, 4, order=lambda r: list(r)[::-1])
    with open(out, "a") as stream:
        stream.write('{"prompt": "p0", "n": 0, "line": 1, "ans')
    with Output(out, SETTINGS, say=said.append) as output:
        assert said == [f"{out}: the last line was cut off in mid-write (40 bytes): removed, done again"]
        assert [r.line for r in output.missing(read(path))] == [1, 2, 3, 4, 5]
        assert [r.line for r in output.missing(read(path, 7), whole=False)] == [1, 2, 3, 4, 5]
        fill(output, path)
        output.finish()
    whole = tmp_path / "whole.jsonl"
    with Output(whole, SETTINGS) as output:
        fill(output, path)
        output.finish()
    assert out.read_bytes() == whole.read_bytes() and len(lines(out)) == 9


def test_a_torn_first_line_and_a_long_one(tmp_path):
    out, said = tmp_path / "out.jsonl", []
    path = inputs(tmp_path / "in.jsonl", 2, long="x" * 3_000_000)
    with Output(out, SETTINGS) as output:
        fill(output, path)
    data = out.read_bytes()
    first = data.index(b"\n") + 1
    for size, left in ((first - 1, [1, 2]), (first, [2]), (first + 1, [2]), (len(data) - 1, [2]), (5, [1, 2])):
        out.write_bytes(data[:size])
        with Output(out, SETTINGS, say=said.append) as output:
            assert [r.line for r in output.missing(read(path))] == left
    assert len(said) == 4


def test_other_settings_are_refused_by_name(tmp_path):
    path, out = inputs(tmp_path / "in.jsonl", 3), tmp_path / "out.jsonl"
    with Output(out, SETTINGS) as output:
        fill(output, path, 2)
    before = out.read_bytes()
    with pytest.raises(ValueError) as caught:
        Output(out, {"--temperature": 0.7, "--stop": ["a"], "--system": "S", "--top-k": 3})
    for words in ("its 2 rows", "--temperature: 0.7, there 0.5", '--system: "S", there not given',
                  "--top-k: 3, there not given", "--overwrite"):  # fmt: skip
        assert words in str(caught.value)
    assert "--stop" not in str(caught.value) and out.read_bytes() == before
    with Output(out, {"--temperature": 0.7}, overwrite=True) as output:
        assert not output.done and out.read_bytes() == b""
    with Output(out, SETTINGS) as output:  # nothing was there to contradict
        fill(output, path)


def test_files_that_are_not_ours(tmp_path):
    path, out = inputs(tmp_path / "in.jsonl", 3), tmp_path / "out.jsonl"
    out.write_text('{"prompt": "mine"}\n')
    with pytest.raises(ValueError, match=r"--out: expected a new file, or one that this command wrote"):
        Output(out, SETTINGS)
    assert out.read_text() == '{"prompt": "mine"}\n'
    with pytest.raises(ValueError, match="got a folder or a device"):
        Output(tmp_path, SETTINGS)
    out.unlink()
    with Output(out, SETTINGS) as output:
        fill(output, path, 2)
    for line, words in (("mine", "out.jsonl:3: expected a row of answers, got b'mine"),
                        ('{"prompt": "p", "n": 2, "line": 3}', "out.jsonl:3: expected a row of answers"),
                        (out.read_text().splitlines()[0], "out.jsonl:3: expected one row for line 1")):  # fmt: skip
        kept = out.read_text()
        with open(out, "a") as stream:
            stream.write(line + "\n")
        with pytest.raises(ValueError, match=words):
            Output(out, SETTINGS)
        out.write_text(kept)


def test_an_edited_input_is_noticed(tmp_path):
    path, out = inputs(tmp_path / "in.jsonl", 4), tmp_path / "out.jsonl"
    with Output(out, SETTINGS) as output:
        fill(output, path)
    text = path.read_text().splitlines()
    write(path, text[0], text[2], text[1], text[3])
    with Output(out, SETTINGS) as output:
        with pytest.raises(ValueError, match=r"out\.jsonl: expected answers to the rows of .*in\.jsonl, got them to"):
            list(output.missing(read(path)))
        write(path, *text[:2])
        with pytest.raises(ValueError, match="got one to line 3, which it does not have"):
            list(output.missing(read(path)))
        assert not list(output.missing(read(path), whole=False))
        write(path, *text, '{"prompt": "new"}')  # more rows are welcome
        assert [r.line for r in output.missing(read(path))] == [5]


def test_one_writer_at_a_time(tmp_path):
    with Output(tmp_path / "out.jsonl", SETTINGS):
        with pytest.raises(ValueError, match="got another process that does"):
            Output(tmp_path / "out.jsonl", SETTINGS)
    Output(tmp_path / "out.jsonl", SETTINGS).close()


def test_a_file_that_is_sorted_between_opening_and_locking(tmp_path, monkeypatch):
    """What would be written then, would be written to a file that is gone."""
    path, out = inputs(tmp_path / "in.jsonl", 3), tmp_path / "out.jsonl"
    first = Output(out, SETTINGS)
    fill(first, path, 2, order=lambda r: list(r)[::-1])
    real = rows.fcntl.flock

    def late(fd, how):
        first.finish()
        first.close()
        real(fd, how)

    monkeypatch.setattr(rows.fcntl, "flock", late)
    with pytest.raises(ValueError, match="got another process that does"):
        Output(out, SETTINGS)
    monkeypatch.undo()
    with Output(out, SETTINGS) as second:
        fill(second, path)
    assert sorted(r["line"] for r in lines(out)) == [1, 2, 3]


def test_a_full_disk(tmp_path, monkeypatch):
    """Half a row is taken back; sorting without room leaves the rows as they are."""
    path, out, said = inputs(tmp_path / "in.jsonl", 4), tmp_path / "out.jsonl", []
    output = Output(out, SETTINGS, say=said.append)
    fill(output, path, 2, order=lambda r: list(r)[::-1])
    real, calls = os.write, []

    def full(fd, data):
        calls.append(1)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data[:10])

    with monkeypatch.context() as patched:
        patched.setattr(rows.os, "write", full)
        with pytest.raises(OSError, match=r"No space left on device\. The 2 rows that are there are whole"):
            fill(output, path)
    assert [r["line"] for r in lines(out)] == [4, 3]
    fill(output, path)
    before = out.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(rows.os, "pread", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
        output.finish()
    assert "no room to sort" in said[-1] and out.read_bytes() == before and len(os.listdir(tmp_path)) == 3
    output.finish()
    assert [r["line"] for r in lines(out)] == [1, 2, 3, 4]
    output.close()


@pytest.mark.parametrize("step", ["replace", "fsync", "fchmod"])
def test_stopped_while_sorting(tmp_path, monkeypatch, step):
    path, out = inputs(tmp_path / "in.jsonl", 6), tmp_path / "out.jsonl"
    output = Output(out, SETTINGS)
    fill(output, path, order=lambda r: list(r)[::-1])
    monkeypatch.setattr(rows.os, step, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        output.finish()
    output.close()
    monkeypatch.undo()
    with Output(out, SETTINGS) as output:
        assert not list(output.missing(read(path)))
        output.finish()
    assert [r["line"] for r in lines(out)] == [1, 2, 3, 4, 5, 6] and len(os.listdir(tmp_path)) == 3


WRITER = """
import sys
from fastpost.generate.rows import Output, read
with Output(sys.argv[2], {"a": 1}) as out:
    missing = list(out.missing(read(sys.argv[1])))[::-1]
    print("go", flush=True)
    for row in missing:
        out.write(row, {"answers": [row.values["long"][::-1] * 3], "finish": ["stop"]})
    out.finish()
"""


def test_killed_at_any_moment(tmp_path):
    """SIGKILL again and again, at moments drawn at random, some in the middle of a long line. The end is the file of a
    run that was left alone, byte for byte."""
    path, out, whole = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    draw = random.Random(0)
    write(path, *(json.dumps({"prompt": f"p{i}", "long": f"{i}-" * draw.choice((1, 50, 200_000))}) for i in range(16)))
    command = [sys.executable, "-c", WRITER, path]
    subprocess.run([*command, whole], check=True, stdout=subprocess.DEVNULL)
    kills = 0
    for _ in range(12):
        process = subprocess.Popen([*command, out], stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "go\n"
        size = out.stat().st_size
        while process.poll() is None and out.stat().st_size == size and draw.random() > 0.001:
            pass  # mostly until something is written, which may be a part of a line
        time.sleep(draw.uniform(0, 0.01))
        process.send_signal(signal.SIGKILL)
        process.stdout.close()
        kills += process.wait() == -signal.SIGKILL
        if out.read_bytes() == whole.read_bytes():
            break
        got = [json.loads(text)["line"] for text in out.read_bytes().split(b"\n")[:-1]]
        assert len(set(got)) == len(got)
    assert kills >= 3
    subprocess.run([*command, out], check=True, stdout=subprocess.DEVNULL)
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(os.listdir(tmp_path)) == sorted(
        ["in.jsonl", "out.jsonl", "out.jsonl.settings.json", "whole.jsonl", "whole.jsonl.settings.json"]
    )
