# SPDX-License-Identifier: Apache-2.0
"""GGUF files of the Llama family, read once and written as a Hugging Face folder.

A GGUF file is a header (key-value pairs, then name, shape, type and offset of each tensor) followed by aligned data.
The layout is llama.cpp's (docs/gguf.md in ggml); the block types here are the ones SmolLM2 is published in.
transformers can read such files too, at the price of two more packages, twenty seconds, and a tokenizer that splits
numbers wrongly.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
F32, Q4_1, Q8_0 = 0, 3, 8
BLOCK = 32  # values that share a scale in Q4_1 and Q8_0
ROW_BYTES = {F32: 4 * BLOCK, Q4_1: 4 + BLOCK // 2, Q8_0: 2 + BLOCK}  # bytes that hold BLOCK values
CONTROL = 3  # token type of special tokens


class Tensor(NamedTuple):
    """Where a tensor lies: shape as torch has it (rows, columns), block type, first byte."""

    shape: tuple[int, ...]
    kind: int
    offset: int


class Gguf:
    """An open file: `fields` (key -> value), `tensors` (name -> Tensor), `load(name)` -> float32 torch tensor.

    Raises ValueError when the file is not GGUF 2 or 3, is cut short, or a tensor has a block type not known here.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        with open(self.path, "rb") as stream:
            self._data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        self._at = 0
        try:
            magic, version, tensors, pairs = self._unpack("<4sIQQ")
            if magic != b"GGUF" or version not in (2, 3):
                raise ValueError(f"{self.path}: expected a GGUF file of version 2 or 3, got {magic!r} {version}.")
            self.fields = {self._string(): self._value(*self._unpack("<I")) for _ in range(pairs)}
            self.tensors = dict(self._tensor() for _ in range(tensors))
        except struct.error:
            raise ValueError(f"{self.path}: the header is cut short. Fetch the file again.") from None
        alignment = self.fields.get("general.alignment", 32)
        self._start = -(-self._at // alignment) * alignment

    def load(self, name: str) -> torch.Tensor:
        shape, kind, offset = self.tensors[name]
        if kind not in ROW_BYTES:
            raise ValueError(f"{self.path}: {name} has block type {kind}, and only F32, Q4_1 and Q8_0 are read.")
        count = int(np.prod(shape))
        begin, size = self._start + offset, count // BLOCK * ROW_BYTES[kind]
        if begin + size > len(self._data):
            raise ValueError(f"{self.path}: the data of {name} is cut short. Fetch the file again.")
        raw = np.frombuffer(self._data, np.uint8, size, begin).reshape(-1, ROW_BYTES[kind])
        if kind == F32:
            values = raw.view("<f4")
        elif kind == Q8_0:
            values = raw[:, :2].copy().view("<f2").astype(np.float32) * raw[:, 2:].view(np.int8)
        else:  # Q4_1: scale, minimum, then 16 bytes whose low halves are values 0-15 and high halves 16-31
            scale, low = raw[:, :4].copy().view("<f2").astype(np.float32).T[:, :, None]
            values = scale * np.concatenate([raw[:, 4:] & 15, raw[:, 4:] >> 4], axis=1) + low
        return torch.from_numpy(np.array(values, np.float32).reshape(shape))

    def _unpack(self, form: str) -> tuple:
        values = struct.unpack_from(form, self._data, self._at)
        self._at += struct.calcsize(form)
        return values

    def _string(self) -> str:
        (size,) = self._unpack("<Q")
        return self._unpack(f"<{size}s")[0].decode("utf-8")

    def _value(self, kind: int):
        if kind == STRING:
            return self._string()
        if kind != ARRAY:
            return self._unpack("<" + SCALARS[kind])[0]
        kind, count = self._unpack("<IQ")
        if kind in SCALARS:
            return list(self._unpack(f"<{count}{SCALARS[kind]}"))
        return [self._value(kind) for _ in range(count)]

    def _tensor(self) -> tuple[str, Tensor]:
        name = self._string()
        (dims,) = self._unpack("<I")
        *shape, kind, offset = self._unpack(f"<{dims}QIQ")
        return name, Tensor(tuple(reversed(shape)), kind, offset)


NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def weights(file: Gguf, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """The file's tensors under transformers' names, in its order of rotary dimensions."""
    state = {}
    heads = {kind: file.fields[f"llama.attention.head_count{suffix}"] for kind, suffix in (("q", ""), ("k", "_kv"))}
    for name in file.tensors:
        tensor, parts = file.load(name), name.split(".")
        kind = parts[-2]
        if kind in ("attn_q", "attn_k"):
            # llama.cpp rotates neighbours (0,1)(2,3).., transformers halves (0,d/2)(1,d/2+1)..: undo its reordering
            rows, columns = tensor.shape
            tensor = tensor.view(heads[kind[-1]], -1, 2, columns).transpose(1, 2).reshape(rows, columns)
        layer = f"model.layers.{parts[1]}." if parts[0] == "blk" else ""
        state[f"{layer}{NAMES[kind]}.{parts[-1]}"] = tensor.to(dtype)
    return state


def config(file: Gguf):
    """transformers' LlamaConfig for the file."""
    from transformers import LlamaConfig

    fields = {key.removeprefix("llama."): value for key, value in file.fields.items()}
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        hidden_size=fields["embedding_length"],
        intermediate_size=fields["feed_forward_length"],
        num_hidden_layers=fields["block_count"],
        num_attention_heads=fields["attention.head_count"],
        num_key_value_heads=fields["attention.head_count_kv"],
        max_position_embeddings=fields["context_length"],
        rms_norm_eps=float(f"{fields['attention.layer_norm_rms_epsilon']:.6g}"),  # 1e-5, not its nearest float32
        rope_parameters={"rope_type": "default", "rope_theta": fields["rope.freq_base"]},
        tie_word_embeddings="output.weight" not in file.tensors,
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
        dtype="bfloat16",
    )


def tokenizer(file: Gguf):
    """The file's byte-level BPE tokenizer with its chat template.

    Raises ValueError for a pre-tokenizer other than "smollm": GGUF names it but does not describe it.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = {key.removeprefix("tokenizer.ggml."): value for key, value in file.fields.items()}
    if (fields["model"], fields.get("pre")) != ("gpt2", "smollm"):
        raise ValueError(f"{file.path}: expected the tokenizer gpt2/smollm, got {fields['model']}/{fields.get('pre')}.")
    tokens = fields["tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["merges"]]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    # numbers are split into digits first: the vocabulary has no token of two digits, or of a space and a digit
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, fields["token_type"]) if kind == CONTROL]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=file.fields["llama.context_length"],
        **{f"{ours}_token": tokens[fields[f"{theirs}_token_id"]] for ours, theirs in roles.items()},
    )
    made.chat_template = file.fields["tokenizer.chat_template"]
    return made


def convert(path: str | Path, folder: str | Path) -> None:
    """Write the GGUF file at `path` as a Hugging Face folder with bfloat16 weights."""
    from safetensors.torch import save_file
    from transformers import GenerationConfig

    file, folder = Gguf(path), Path(folder)
    folder.mkdir(parents=True)
    settings = config(file)
    settings.save_pretrained(folder)
    GenerationConfig.from_model_config(settings).save_pretrained(folder)
    tokenizer(file).save_pretrained(folder)
    save_file(weights(file), folder / "model.safetensors", metadata={"format": "pt"})
