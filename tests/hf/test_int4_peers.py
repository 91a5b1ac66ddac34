# SPDX-License-Identifier: Apache-2.0
"""Four-bit layers packed by the real libraries, where these are installed, become the weights that they compute."""

import pytest
import torch
import transformers

import tiny
from fastpost.hf import int4_awq, int4_bitsandbytes, int4_compressed, int4_gptq, load_int4
from fastpost.hf.int4_tensors import Part
from fastpost.nn import Int4Linear


class Held(dict):
    """Tensors in memory, as Part wants them."""

    def where(self, key):
        return key

    def get(self, key):
        return self[key]


def part(tensors, n, k):
    return Part(Held({f"x.{name}": t for name, t in tensors.items()}), "x", (n, k))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("strategy", ["group", "channel"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors(symmetric, strategy, dtype):
    quantization = pytest.importorskip("compressed_tensors.quantization")
    base = pytest.importorskip("compressed_tensors.compressors.pack_quantized.base")
    n, k, groups = 40, 192, 6 if strategy == "group" else 1
    weights = {"num_bits": 4, "type": "int", "symmetric": symmetric, "strategy": strategy,
               "group_size": 32 if strategy == "group" else None}  # fmt: skip
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=quantization.QuantizationArgs(**weights))
    made = {"weight": torch.randn(n, k).to(dtype), "weight_scale": (torch.rand(n, groups) * 0.2 + 0.05).to(dtype)}
    if not symmetric:
        made["weight_zero_point"] = torch.randint(-8, 8, (n, groups)).to(torch.int8)
    packed = base.PackedQuantizationCompressor.compress(made, scheme)
    theirs = base.PackedQuantizationCompressor.decompress(packed, scheme)["weight"]
    ours = int4_compressed.read(part(packed, n, k), {"config_groups": {"group_0": {"weights": weights}}})
    assert torch.equal(ours.dequantize(dtype), theirs)


def test_awq():
    gemm = pytest.importorskip("awq.modules.linear.gemm")
    from awq.utils.packing_utils import dequantize_gemm

    n, k, size = 64, 256, 64
    scales = (torch.rand(n, k // size) * 0.01 + 0.005).half().t().contiguous()
    zeros = torch.randint(0, 16, (n, k // size)).half().t().contiguous()
    linear = torch.nn.Linear(k, n, bias=False).half()
    made = gemm.WQLinear_GEMM.from_linear(linear, 4, size, False, scales, zeros)
    names = ("qweight", "qzeros", "scales")
    ours = int4_awq.read(part({name: getattr(made, name) for name in names}, n, k), {"group_size": size})
    theirs = dequantize_gemm(made.qweight, made.qzeros, made.scales, 4, size).t()
    assert torch.equal(ours.dequantize(torch.float16), theirs)
    again, _ = int4_awq.tensors({"x": ours})
    assert all(torch.equal(again[f"x.{name}"], getattr(made, name)) for name in names)


@pytest.mark.parametrize("act_order", [False, True])
def test_gptq(act_order):
    library = pytest.importorskip("auto_gptq.nn_modules.qlinear.qlinear_cuda")
    n, k, size = 64, 256, 64
    scales, zeros = torch.rand(n, k // size) * 0.01 + 0.005, torch.randint(1, 16, (n, k // size)).float()
    groups = torch.arange(k) // size
    made = library.QuantLinear(4, size, k, n, False)
    groups = groups[torch.randperm(k)] if act_order else groups
    made.pack(torch.nn.Linear(k, n, bias=False).half(), scales, zeros, groups.int())
    names = ("qweight", "qzeros", "scales", "g_idx")
    tensors = {name: getattr(made, name).clone() for name in names}
    ours = int4_gptq.read(part(tensors, n, k), {"group_size": size, "bits": 4})
    made.autogptq_cuda_available = False
    assert torch.equal(ours.dequantize(), made.float()(torch.eye(k)).t())
    again, _ = int4_gptq.tensors({"x": ours})
    assert all(torch.equal(again[f"x.{name}"], tensors[name]) for name in names)


@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_module(nested):
    """A whole Linear4bit, through the state_dict that it saves."""
    library = pytest.importorskip("bitsandbytes")
    made = library.nn.Linear4bit(192, 40, bias=False, compute_dtype=torch.bfloat16, compress_statistics=nested,
                                 quant_type="nf4").to("cpu")  # fmt: skip
    made.weight = library.nn.Params4bit(torch.randn(40, 192).bfloat16(), requires_grad=False, blocksize=64,
                                        compress_statistics=nested, quant_type="nf4").to("cpu")  # fmt: skip
    ours = int4_bitsandbytes.read(part(made.state_dict(), 40, 192), {})
    assert torch.equal(ours.dequantize(torch.bfloat16), library.functional.dequantize_4bit(
        made.weight.data, made.weight.quant_state))  # fmt: skip
    x = torch.randn(5, 192).bfloat16()
    error = (ours.dequantize() @ x.float().t()).t() - made(x).float()
    assert error.norm() < 1e-2 * made(x).float().norm()


def test_a_folder_that_transformers_and_bitsandbytes_wrote(tmp_path):
    pytest.importorskip("bitsandbytes")
    path = tiny.folder(tmp_path / "plain", tie=False, hidden_size=64, intermediate_size=128, head_dim=16)
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        path, quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
    )
    theirs.save_pretrained(tmp_path / "nf4")
    ours = load_int4(tmp_path / "nf4", torch.bfloat16)
    names = [name for name, m in ours.named_modules() if isinstance(m, Int4Linear)]
    assert len(names) == 14
    for name in names:
        weight = theirs.get_submodule(name).weight
        exact = bitsandbytes_weight(weight)
        assert torch.equal(ours.get_submodule(name).dequantize(exact.dtype), exact), name
    ids = torch.arange(5, 25)[None]
    a, b = ours(ids).logits.float(), theirs(ids).logits.float()
    assert (a - b).norm() < 3e-2 * b.norm()


def bitsandbytes_weight(weight):
    import bitsandbytes.functional as functional

    return functional.dequantize_4bit(weight.data, weight.quant_state)
