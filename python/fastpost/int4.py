# SPDX-License-Identifier: Apache-2.0
"""Int4Weight: one container for four-bit weights, and the byte layout that every kernel reads (cpp/int4.h)."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch

SCHEMES = ("symmetric", "asymmetric", "nf4")
GROUP_SIZES = (32, 64, 128)
BLOCK = 128  # columns of a block of codes
SYMMETRIC_ZERO = 8

# The 16 values of NF4: quantiles of a normal distribution, scaled to [-1, 1], with an exact zero. QLoRA (Dettmers et al.
# 2023), appendix E; the digits are those of its published code, so that codes agree to the last bit.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True)
class Int4Weight:
    """W [N, K] in four bits: ``w = scale * (code - zero)``, or ``scale * NF4[code]``, computed in float32.

    Fields:
        codes: [N, 64 * ceil(K / 128)] uint8, packed as cpp/int4.h says (:func:`pack`, :func:`unpack`).
        scales: [N, G] float32, bfloat16 or float16, G = ceil(K / group_size); or uint8 with `nested`.
        zeros: [N, G] uint8 for "asymmetric", else None (8 for "symmetric").
        columns: K. N is len(codes).
        group_size: consecutive columns that share a scale, a multiple of 32; K or more: one scale a row.
        scheme: "symmetric", "asymmetric" or "nf4".
        order: [K] int64 or None. Stored column i is column order[i] of W (GPTQ's act-order makes groups of columns that
            are not neighbours; stored, they are).
        nested: how uint8 scales become float32 (double quantisation), or None.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    columns: int
    group_size: int
    scheme: str
    order: torch.Tensor | None = None
    nested: NestedScales | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.columns

    @property
    def table(self) -> torch.Tensor | None:
        """[16] float32 for "nf4"."""
        return _nf4(self.codes.device) if self.scheme == "nf4" else None

    def float_scales(self) -> torch.Tensor:
        """The scales as kernels take them: themselves, or float32 made from nested ones."""
        return self.scales if self.nested is None else self.nested.expand(self.scales)

    def nbytes(self) -> int:
        tensors = [getattr(self, f.name) for f in fields(self)]
        tensors += [getattr(self.nested, f.name) for f in fields(self.nested)] if self.nested else []
        return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))

    def to(self, device) -> Int4Weight:
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {k: v.to(device) if isinstance(v, (torch.Tensor, NestedScales)) else v for k, v in moved.items()}
        return replace(self, **moved)

    def unpacked(self) -> torch.Tensor:
        """Codes [N, K] uint8 in stored order, 0 to 15."""
        return unpack(self.codes, self.columns)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """W [N, K], columns in their own order; float32 arithmetic, rounded once to `dtype`."""
        from fastpost.ops.int4_gemm import int4_dequantize

        return int4_dequantize(self, dtype)


@dataclass(frozen=True)
class NestedScales:
    """Scales in eight bits: ``scale = table[code] * outer[block // 256] + offset`` over the scales in row-major order
    (QLoRA's double quantisation, as bitsandbytes computes it).

    Fields: table [256] float32, outer [ceil(N * G / 256)] float32, offset [] float32.
    """

    table: torch.Tensor
    outer: torch.Tensor
    offset: torch.Tensor

    def expand(self, codes: torch.Tensor) -> torch.Tensor:
        outer = self.outer.repeat_interleave(256)[: codes.numel()].view(codes.shape)
        return self.table[codes.long()] * outer + self.offset

    def to(self, device) -> NestedScales:
        return NestedScales(self.table.to(device), self.outer.to(device), self.offset.to(device))


# ---- the layout ------------------------------------------------------------------------------------------------------
# Column k = i j t h (2, 2, 2 and 1 bits) of a block is nibble 4h + j of the 32-bit word 4t + i.


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Codes [N, K] uint8, 0 to 15 -> [N, 64 * ceil(K / 128)] uint8; what a last block lacks gets code 8.

    Raises:
        ValueError: not uint8 [N, K].
    """
    if codes.dtype != torch.uint8 or codes.ndim != 2:
        raise ValueError(f"[int4 pack] codes: expected uint8 [N, K], got {codes.dtype} {list(codes.shape)}.")
    n, k = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -k % BLOCK), value=SYMMETRIC_ZERO)
    # [block, i, j, t, h] -> [block, t, i, h, j]: 32-bit words, then nibbles; two nibbles of a byte are neighbours in j.
    nibbles = padded.view(n, -1, 4, 4, 4, 2).permute(0, 1, 4, 2, 5, 3).reshape(n, -1, 2)
    return nibbles[..., 0] | nibbles[..., 1] << 4


def unpack(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """The inverse of :func:`pack`: [N, columns] uint8."""
    n = packed.shape[0]
    nibbles = torch.stack([packed & 15, packed >> 4], -1).view(n, -1, 4, 4, 2, 4)  # [block, t, i, h, j]
    return nibbles.permute(0, 1, 3, 5, 2, 4).reshape(n, -1)[:, :columns].contiguous()


def _nf4(device: torch.device) -> torch.Tensor:
    if device not in _tables:
        _tables[device] = torch.tensor(NF4, dtype=torch.float32, device=device)
    return _tables[device]


_tables: dict[torch.device, torch.Tensor] = {}


# ---- round to nearest ------------------------------------------------------------------------------------------------


def int4_quantize(
    weight: torch.Tensor,
    *,
    group_size: int = 128,
    scheme: str = "symmetric",
    scales_dtype: torch.dtype | None = None,
    double_quant: bool = False,
) -> Int4Weight:
    """Each group of `group_size` columns of a row to its nearest four-bit values.

    symmetric: ``scale = 2 max|w| / 15``, code = round(w / scale) + 8. asymmetric: ``scale = (max - min) / 15`` over a range
    that holds 0, ``zero = round(-min / scale)`` (round half to even). nf4: ``scale = max|w|``, the nearest of 16 quantiles.
    What is rounded is w divided by the scale that is stored.

    Args:
        weight: [N, K] float32, bfloat16, float16 or float64, on any device.
        group_size: 32, 64 or 128 (any multiple of 32 works); -1 for one scale a row.
        scheme: "symmetric", "asymmetric" or "nf4".
        scales_dtype: float32, bfloat16 or float16; the default is bfloat16, and float32 for nf4, as bitsandbytes has it.
        double_quant: for nf4, scales in eight bits (QLoRA): 4.127 bits a weight in groups of 64 instead of 4.5.

    Raises:
        ValueError: not a matrix of floats, NaN or infinity in it, a group size that is no multiple of 32 or -1, a scheme
            that does not exist, double_quant with another scheme than nf4.
    """
    if not isinstance(weight, torch.Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        got = f"{weight.dtype} {list(weight.shape)}" if isinstance(weight, torch.Tensor) else type(weight).__name__
        raise ValueError(f"[int4_quantize] weight: expected a float matrix [N, K], got {got}.")
    if scheme not in SCHEMES:
        raise ValueError(f"[int4_quantize] scheme: expected one of {', '.join(SCHEMES)}, got {scheme!r}.")
    columns = weight.shape[1]
    group_size = check_group_size("int4_quantize", group_size, columns)
    if double_quant and scheme != "nf4":
        raise ValueError(f"[int4_quantize] double_quant: expected the scheme nf4, got {scheme!r}.")
    finite = torch.isfinite(weight).all(1)
    if not finite.all():
        row = int((~finite).nonzero()[0])
        raise ValueError(f"[int4_quantize] weight: row {row} holds NaN or infinity; nothing was quantised.")
    dtype = scales_dtype or (torch.float32 if scheme == "nf4" else torch.bfloat16)
    groups = _grouped(weight.detach().float(), group_size)
    scales, zeros = group_scales(groups, scheme, dtype)
    nested = None
    if double_quant:
        scales, nested = nest_scales(scales)
    used = scales if nested is None else nested.expand(scales)
    codes = group_codes(groups, used, zeros, scheme).flatten(1)[:, :columns].contiguous()
    return Int4Weight(pack(codes), scales, zeros, columns, group_size, scheme, nested=nested)


def check_group_size(op: str, group_size: int, columns: int) -> int:
    """The group size as Int4Weight keeps it: a multiple of 32; for one scale a row the columns, rounded up to that."""
    whole_row = max(32, -(-columns // 32) * 32)
    if group_size == -1:
        return whole_row
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size <= 0 or group_size % 32:
        raise ValueError(f"[{op}] group_size: expected 32, 64, 128 or -1 (one scale a row), got {group_size!r}.")
    return min(group_size, whole_row)


def _grouped(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """[N, K] -> [N, G, group_size]; a last group that is not whole repeats its last column."""
    missing = -weight.shape[1] % group_size
    if missing:
        weight = torch.cat([weight, weight[:, -1:].expand(-1, missing)], 1)
    return weight.unflatten(1, (-1, group_size))


def group_scales(groups: torch.Tensor, scheme: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales [N, G] in `dtype` and zeros [N, G] uint8 (asymmetric) of float32 groups [N, G, g]. A group of zeros gets
    scale 1: its codes then mean exactly 0."""
    zeros = None
    if scheme == "asymmetric":
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scales = (high - low) / 15
    else:
        scales = groups.abs().amax(-1) * (1 if scheme == "nf4" else 2 / 15)
    scales = scales.to(dtype)
    smallest = torch.finfo(dtype).tiny
    scales = torch.where(scales < smallest, torch.where(groups.abs().amax(-1) == 0, 1.0, smallest).to(dtype), scales)
    if not torch.isfinite(scales).all():
        raise ValueError(f"[int4_quantize] weight: a scale does not fit {dtype}. Use scales_dtype=torch.float32.")
    if scheme == "asymmetric":
        zeros = (-low / scales.float()).round().clamp(0, 15).to(torch.uint8)
    return scales, zeros


def group_codes(
    groups: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, scheme: str
) -> torch.Tensor:
    """The nearest codes, uint8 in the shape of float32 groups [N, G, g]."""
    units = groups / scales.float()[..., None]
    if scheme == "nf4":
        table = _nf4(groups.device)
        return torch.bucketize(units, (table[1:] + table[:-1]) / 2).to(torch.uint8)
    zeros = SYMMETRIC_ZERO if zeros is None else zeros[..., None].float()
    return (units.round() + zeros).clamp(0, 15).to(torch.uint8)
