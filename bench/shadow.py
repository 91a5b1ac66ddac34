# SPDX-License-Identifier: Apache-2.0
"""Decoding over a long context: ShadowCache beside full attention.

    python -m bench.shadow layer [--context 32768] [--budget 2048] [--rank 160] [--value-folder DIR]
    python -m bench.shadow model --model DIR [--context 8000] [--tokens 16]

layer: one layer of Llama-3.1-8B's geometry (32 heads, 8 key heads of 128) in bfloat16, one token at a time. Keys are
drawn with the falling spectrum of real ones and rotated; queries drift from step to step, so that most chunks are
chosen again, as in a text ("fresh" is the share that had to be rebuilt); with "cold" all are rebuilt at every step.
Beside it torch's attention over all keys and values, in the forms that transformers uses, and as two plain products;
paged_attention over all of them. Memory is what the cache says of itself, and with --growth what a process really needs
more for twice the context (private memory, without the pages of a value file), for each token that came; that has
the tables of RoPE in it, 256 bytes a token here, which all layers of a model share.

model: prompts of a model at its full length: seconds to the first token and per token after it, ShadowCache and
transformers' DynamicCache taking turns, with the model's own attention (sdpa) for the latter.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import multiprocessing
import statistics
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

from bench.timing import CLOCKS, interleave

HEADS, GROUPS, DIM = 32, 8, 128


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser("python -m bench.shadow", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("what", choices=("layer", "model"))
    parser.add_argument("--context", type=int, help="tokens before the first new one (layer: 32768, model: 8000)")
    parser.add_argument("--rank", type=int, help="of the factors (layer: 160, model: in that proportion)")
    parser.add_argument("--budget", type=int, default=2048, help="tokens chosen for each key head (2048)")
    parser.add_argument("--value-folder", help="hold the values in files there instead of memory")
    parser.add_argument("--value-bits", type=int, choices=(8,), help="hold the values in int8")
    parser.add_argument("--model", help="Hugging Face folder")
    parser.add_argument("--tokens", type=int, default=16, help="new tokens of each turn (16)")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each side (layer: 9, model: a third of it)")
    parser.add_argument("--growth", action="store_true", help="layer: measure the process, too, at twice the context")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=CLOCKS, default="cpu")
    parser.add_argument("--json", metavar="FILE", help="write the figures")
    args = parser.parse_args(argv)
    if args.what == "model" and not args.model:
        parser.error("--model: expected a Hugging Face folder.")
    torch.set_num_threads(args.threads)
    with torch.no_grad():
        result = (layer if args.what == "layer" else model)(args)
    if args.json:
        from bench.machine import describe

        Path(args.json).write_text(json.dumps(describe(torch.device("cpu")) | result, indent=1) + "\n")
    return result


def options(args) -> dict:
    file = None if args.value_folder is None else Path(tempfile.mkdtemp(dir=args.value_folder)) / "values"
    return {"budget": args.budget, "value_file": file, "value_bits": args.value_bits}


# ---- one layer -------------------------------------------------------------------------------------------------------


def layer(args) -> dict:
    context = args.context or 32768
    cache = filled(context, args)
    memory = cache.memory()
    if args.growth:
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            small, large = (pool.apply(private_bytes, (n, args)) for n in (context, 2 * context))
        memory["process_per_token"] = (large - small) / context
    step, counted = decoding(cache)
    g = torch.Generator().manual_seed(1)
    keys, values = (torch.randn(1, GROUPS, context, DIM, generator=g).bfloat16() for _ in range(2))
    table = torch.arange(context // 16, dtype=torch.int32)[None, None]
    length = torch.tensor([context], dtype=torch.int32)
    query = torch.randn(1, HEADS, 1, DIM, generator=g).bfloat16()
    few = query.view(1, GROUPS, HEADS // GROUPS, DIM)

    import fastpost

    cold = cache.fork()
    cold_step, _ = decoding(cold, cold=True)
    runs = {
        "ShadowCache": step,
        "ShadowCache, cold": cold_step,
        "paged_attention, all": lambda _: fastpost.paged_attention(
            query[:, :, 0], keys.unflatten(2, (-1, 16)), values.unflatten(2, (-1, 16)), table, length
        ),
        "sdpa": lambda _: F.scaled_dot_product_attention(few, keys, values),
        "sdpa, enable_gqa": lambda _: F.scaled_dot_product_attention(query, keys, values, enable_gqa=True),
        "two products": lambda _: (few @ keys.mT * DIM**-0.5).float().softmax(-1).bfloat16() @ values,
    }
    times = interleave(runs, args.rounds, torch.device("cpu"), CLOCKS[args.clock])
    ms = {name: 1e3 * statistics.median(found) for name, found in times.items()}
    fresh = counted["fresh"] / max(1, counted["chosen"])
    print(
        f"one layer, {context} tokens, {HEADS} heads, {GROUPS} key heads of {DIM}, bfloat16, {args.threads} thread(s)"
    )
    for name, t in ms.items():
        note = f", {fresh:.0%} of the chunks fresh" if name == "ShadowCache" else ""
        print(f"  {name:<22} {t:9.3f} ms  {t / ms['ShadowCache']:7.2f} x{note}")
    print("  bytes per token: " + ", ".join(f"{name} {memory[name]:.0f}" for name in
          ("per_token_layer", "dense_per_token_layer", "process_per_token") if name in memory), end="; ")  # fmt: skip
    print("in all, MB: " + ", ".join(f"{name} {memory[name] / 1e6:.1f}" for name in
          ("factors", "landmarks", "constant", "tail", "rope", "values", "value_file")))  # fmt: skip
    print(f"  truncation error of the keys: {cache.errors()[0].item():.3f}")
    return {"layer": {"context": context, "threads": args.threads, "clock": args.clock, "ms": ms, "fresh": fresh,
                      "memory": memory, "times": times}}  # fmt: skip


def filled(context: int, args):
    """A ShadowCache of one layer that has taken in a prompt."""
    from transformers import LlamaConfig

    import fastpost
    from fastpost.hf import cached_attention

    config = LlamaConfig(hidden_size=HEADS * DIM, num_attention_heads=HEADS, num_key_value_heads=GROUPS,
                         num_hidden_layers=1, max_position_embeddings=2 * context,
                         rope_parameters={"rope_type": "default", "rope_theta": 500000.0})  # fmt: skip
    cache = fastpost.ShadowCache(config, rank=160 if args.rank is None else args.rank, **options(args))
    g = torch.Generator().manual_seed(0)
    keys = rotated(falling(context, GROUPS * DIM, g).view(context, GROUPS, DIM)).transpose(0, 1)[None].bfloat16()
    values = torch.randn(1, GROUPS, context, DIM, generator=g).bfloat16()
    none = torch.zeros(1, GROUPS, context, DIM, dtype=torch.bfloat16)  # one query head for each key head: a quarter
    attend(cached_attention, cache, none, keys, values)
    del keys, values, none
    gc.collect()
    return cache


def falling(n: int, width: int, g: torch.Generator) -> torch.Tensor:
    """[n, width] rows whose singular values fall like 1 / j, neighbours alike."""
    noise = torch.randn(n, width, generator=g)
    alike = noise.cumsum(0)[8:] - noise.cumsum(0)[:-8]
    alike = torch.cat([noise[:8], alike * 8**-0.5])
    mix = torch.linalg.qr(torch.randn(width, width, generator=g)).Q
    return alike * (8.0 / torch.arange(1, width + 1)) @ mix * width**0.5 / 8


def rotated(x: torch.Tensor, start: int = 0) -> torch.Tensor:
    """RoPE of x [tokens, heads, d]."""
    half = x.shape[-1] // 2
    angle = torch.arange(start, start + len(x))[:, None] * 500000.0 ** -(torch.arange(half) / half)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def attend(cached_attention, cache, query, key, value) -> torch.Tensor:
    key, value = cache.update(key, value, 0)
    return cached_attention.attention(None, query, key, value, None, scaling=DIM**-0.5)[0]


def decoding(cache, cold: bool = False):
    """(one step of decoding, what was counted)."""
    from fastpost.hf import cached_attention

    g = torch.Generator().manual_seed(2)
    shadow = cache.shadow_layers[0]
    state = {"query": torch.randn(1, HEADS, 1, DIM, generator=g), "chosen": 0, "fresh": 0}

    def step(_):
        # A drifting query: 0.98 of the last one.
        state["query"] = 0.98 * state["query"] + 0.2 * torch.randn(1, HEADS, 1, DIM, generator=g)
        key, value = (torch.randn(1, GROUPS, 1, DIM, generator=g).bfloat16() for _ in range(2))
        old = shadow.resident.clone()
        if cold:
            shadow.resident.fill_(-1)
        out = attend(cached_attention, cache, state["query"].bfloat16(), key, value)
        state["chosen"] += old.numel()
        state["fresh"] += (shadow.resident != old).sum().item()
        return out

    return step, state


def private_bytes(context: int, args) -> int:
    """What a process that holds such a cache needs more than before."""

    def now() -> int:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.split("RssAnon:")[1].split()[0]) * 1024

    torch.set_num_threads(1)
    with torch.no_grad():
        filled(256 + args.budget * 2, args)  # whatever is allocated once and for all
        before = now()
        cache = filled(context, args)
        decoding(cache)[0](0)
        return now() - before


# ---- a whole model ---------------------------------------------------------------------------------------------------


def model(args) -> dict:
    from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

    import fastpost

    context = args.context or 8000
    network = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    ids = torch.randint(0, AutoConfig.from_pretrained(args.model).vocab_size, (1, context),
                        generator=torch.Generator().manual_seed(0))  # fmt: skip

    def ours(cache=None):
        return fastpost.ShadowCache(network.config, rank=args.rank, **options(args))

    def plain(cache=None):
        network.set_attn_implementation("sdpa")
        return DynamicCache(config=network.config)

    clock = CLOCKS[args.clock]
    found = {name: {"prefill": [], "token": []} for name in ("ShadowCache", "DynamicCache")}
    for _ in range(max(1, args.rounds // 3)):
        for name, make in (("ShadowCache", ours), ("DynamicCache", plain)):
            cache, mask = make(), torch.ones_like(ids)
            t = clock()
            token = network(ids, attention_mask=mask, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
            found[name]["prefill"].append(clock() - t)
            # The first single token is no measure of the others: nothing is resident yet.
            token = network(token, past_key_values=cache).logits.argmax(-1)
            t = clock()
            for _ in range(args.tokens):
                token = network(token, past_key_values=cache).logits.argmax(-1)
            found[name]["token"].append((clock() - t) / args.tokens)
            if name == "ShadowCache":
                memory, errors = cache.memory(), cache.errors()
            del cache
            gc.collect()
    print(f"{Path(args.model).name}, {context} tokens, bfloat16, {args.threads} thread(s)")
    seconds = {name: {key: statistics.median(v) for key, v in both.items()} for name, both in found.items()}
    for key in ("prefill", "token"):
        a, b = (seconds[name][key] for name in ("ShadowCache", "DynamicCache"))
        print(f"  {key:<8} ShadowCache {a:8.3f} s, DynamicCache {b:8.3f} s, {b / a:.2f} x")
    error = torch.stack([e.mean() for e in errors if e is not None]).mean().item()
    grows, dense = (memory[f"{kind}per_token_layer"] for kind in ("", "dense_"))
    print(f"  bytes per token and layer: {grows:.0f} and {dense:.0f}, values aside; truncation error of keys, mean of "
          f"layers: {error:.3f}")  # fmt: skip
    return {"model": {"context": context, "threads": args.threads, "clock": args.clock, "seconds": seconds,
                      "memory": memory, "found": found}}  # fmt: skip


if __name__ == "__main__":
    main()
