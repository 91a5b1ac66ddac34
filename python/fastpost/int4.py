# SPDX-License-Identifier: Apache-2.0
"""Int4Weight: one container for four-bit weights, and the byte layout that every kernel reads (cpp/int4.h)."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch

SCHEMES = ("symmetric", "asymmetric", "nf4")
GROUP_SIZES = (32, 64, 128)
BLOCK = 128  # columns of a block of codes
SYMMETRIC_ZERO = 8
NESTED_BLOCK = 256  # scales that share an outer scale
QUANTIZE_AT_A_TIME = 1 << 24  # weights that are float32 at once

# The 16 values of NF4: quantiles of a normal distribution, scaled to [-1, 1], with an exact zero. QLoRA (Dettmers et
# al. 2023), appendix E; the digits are those of its published code, so that codes agree to the last bit.
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

    def check(self, where: str = "Int4Weight") -> Int4Weight:
        """Itself, after a look at every field; `where` begins the message. Kernels do not look at contents, so whoever
        makes one from a file or by hand calls this once.

        Raises:
            ValueError: a dtype, shape, group size or scheme that does not fit, scales with NaN or infinity, a scale of
                0 under codes that mean something, zeros above 15, an order that is no permutation.
        """
        _check(self, where)
        return self

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
        outer = self.outer.repeat_interleave(NESTED_BLOCK)[: codes.numel()].view(codes.shape)
        return self.table[codes.long()] * outer + self.offset

    def to(self, device) -> NestedScales:
        return NestedScales(self.table.to(device), self.outer.to(device), self.offset.to(device))


# ---- what a good one looks like --------------------------------------------------------------------------------------


def _check(w: Int4Weight, where: str) -> None:
    def expect(good: bool, field: str, expected: str, got) -> None:
        if not good:
            if isinstance(got, torch.Tensor):
                got = f"{str(got.dtype).removeprefix('torch.')} {list(got.shape)}"
            raise ValueError(f"[{where}] {field}: expected {expected}, got {got}.")

    def is_like(tensor, dtypes, shape) -> bool:
        return isinstance(tensor, torch.Tensor) and tensor.dtype in dtypes and tuple(tensor.shape) == tuple(shape)

    expect(w.scheme in SCHEMES, "scheme", f"one of {', '.join(SCHEMES)}", repr(w.scheme))
    expect(type(w.columns) is int and w.columns > 0, "columns", "a number of columns", repr(w.columns))
    whole = type(w.group_size) is int and w.group_size > 0 and w.group_size % 32 == 0
    expect(whole, "group_size", "a multiple of 32", repr(w.group_size))
    row_bytes = -(-w.columns // BLOCK) * BLOCK // 2
    rows = w.codes.shape[0] if isinstance(w.codes, torch.Tensor) and w.codes.ndim else 0
    expect(is_like(w.codes, [torch.uint8], (rows, row_bytes)), "codes", f"uint8 [N, {row_bytes}]", w.codes)
    shape = (rows, -(-w.columns // w.group_size))
    floats = [torch.float32, torch.bfloat16, torch.float16]
    if w.nested is None:
        kind = f"float32, bfloat16 or float16 {list(shape)}"
        expect(is_like(w.scales, floats, shape), "scales", kind, w.scales)
    else:
        expect(is_like(w.scales, [torch.uint8], shape), "scales", f"uint8 {list(shape)} (nested)", w.scales)
        n = w.nested
        for name, tensor, size in (("table", n.table, (256,)), ("offset", n.offset, ()),
                                   ("outer", n.outer, (-(-w.scales.numel() // NESTED_BLOCK),))):  # fmt: skip
            expect(is_like(tensor, floats[:1], size), f"nested.{name}", f"float32 {list(size)}", tensor)
    if w.scheme == "asymmetric":
        expect(is_like(w.zeros, [torch.uint8], shape), "zeros", f"uint8 {list(shape)}", w.zeros)
    else:
        expect(w.zeros is None, "zeros", f"None for {w.scheme}", w.zeros)
    if w.order is not None:
        expect(is_like(w.order, [torch.int64], (w.columns,)), "order", f"int64 [{w.columns}]", w.order)
    if w.codes.is_meta:
        return
    scales = w.float_scales().float()
    bad = ~torch.isfinite(scales)
    expect(not bad.any(), "scales", "finite numbers", f"NaN or infinity in row {_first_row(bad)}")
    if w.zeros is not None:
        high = w.zeros > 15
        expect(not high.any(), "zeros", "0 to 15", f"more in row {_first_row(high)}")
    if w.order is not None:
        expect(torch.equal(w.order.sort()[0], torch.arange(w.columns, device=w.order.device)), "order",
               "each column once", "a column that is missing or out of range")  # fmt: skip
    lost = _lost(w, scales == 0)
    expect(lost is None, "scales", "no 0 where codes differ from the zero point",
           f"0 in row {lost} (a scale too small for its dtype?)")  # fmt: skip


def _first_row(bad: torch.Tensor) -> int:
    return int(bad.any(1).nonzero().min()) if bad.any() else -1


def _lost(w: Int4Weight, none: torch.Tensor) -> int | None:
    """The first row with a group whose scale is 0 while its codes are not those of 0 (a group of zeros may have it)."""
    for row in none.any(1).nonzero().flatten().tolist():
        means_zero = NF4.index(0.0) if w.scheme == "nf4" else SYMMETRIC_ZERO
        codes = unpack(w.codes[row : row + 1], w.columns)[0]
        group = torch.arange(w.columns, device=codes.device) // w.group_size
        zeros = means_zero if w.zeros is None else w.zeros[row][group]
        if ((codes != zeros) & none[row][group]).any():
            return row
    return None


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
    blocks = padded.shape[1] // BLOCK  # spelt out, so that no rows are fine, too
    nibbles = padded.view(n, blocks, 4, 4, 4, 2).permute(0, 1, 4, 2, 5, 3).reshape(n, blocks * BLOCK // 2, 2)
    return nibbles[..., 0] | nibbles[..., 1] << 4


def unpack(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """The inverse of :func:`pack`: [N, columns] uint8."""
    n = packed.shape[0]
    blocks = packed.shape[1] * 2 // BLOCK
    nibbles = torch.stack([packed & 15, packed >> 4], -1).view(n, blocks, 4, 4, 2, 4)  # [block, t, i, h, j]
    return nibbles.permute(0, 1, 3, 5, 2, 4).reshape(n, blocks * BLOCK)[:, :columns].contiguous()


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

    symmetric: ``scale = 2 max|w| / 15``, code = round(w / scale) + 8. asymmetric: ``scale = (max - min) / 15`` over a
    range that holds 0, ``zero = round(-min / scale)`` (round half to even). nf4: ``scale = max|w|``, the nearest of 16
    quantiles. What is rounded is w divided by the scale that is stored.

    Args:
        weight: [N, K] float32, bfloat16, float16 or float64, on any device.
        group_size: 32, 64 or 128 (any multiple of 32 works); -1 for one scale a row.
        scheme: "symmetric", "asymmetric" or "nf4".
        scales_dtype: float32, bfloat16 or float16; the default is bfloat16, and float32 for nf4 as in bitsandbytes.
        double_quant: for nf4, scales in eight bits (QLoRA): 4.127 bits a weight in groups of 64 instead of 4.5.

    Raises:
        ValueError: not a matrix of floats, NaN or infinity in it, a group size that is no multiple of 32 or -1, a
            scheme that does not exist, double_quant with another scheme than nf4.
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
    parts = weight.detach().split(max(1, QUANTIZE_AT_A_TIME // max(1, columns)))
    finite = torch.cat([torch.isfinite(part).all(1) for part in parts])
    if not finite.all():
        row = int((~finite).nonzero()[0])
        raise ValueError(f"[int4_quantize] weight: row {row} holds NaN or infinity; nothing was quantised.")
    dtype = scales_dtype or (torch.float32 if scheme == "nf4" else torch.bfloat16)
    found = [group_scales(_grouped(part.float(), group_size), scheme, dtype) for part in parts]
    scales = torch.cat([s for s, _ in found])
    zeros = torch.cat([z for _, z in found]) if scheme == "asymmetric" else None
    nested = None
    if double_quant:
        scales, nested = nest_scales(scales)
    used, codes, row = scales if nested is None else nested.expand(scales), [], 0
    for part in parts:
        rows = slice(row, row := row + len(part))
        theirs = None if zeros is None else zeros[rows]
        codes.append(group_codes(_grouped(part.float(), group_size), used[rows], theirs, scheme).flatten(1))
        codes[-1] = pack(codes[-1][:, :columns].contiguous())
    return Int4Weight(torch.cat(codes), scales, zeros, columns, group_size, scheme, nested=nested)


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


def group_codes(groups: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, scheme: str) -> torch.Tensor:
    """The nearest codes, uint8 in the shape of float32 groups [N, G, g]."""
    if scheme == "nf4":
        # Times the reciprocal, as bitsandbytes has it: at a midpoint the last bit decides, and its codes are ours.
        table, units = _nf4(groups.device), groups * (1 / scales.float())[..., None]
        return torch.bucketize(units, (table[1:] + table[:-1]) / 2).to(torch.uint8)
    units = groups / scales.float()[..., None]
    zeros = SYMMETRIC_ZERO if zeros is None else zeros[..., None].float()
    return (units.round() + zeros).clamp(0, 15).to(torch.uint8)


# ---- double quantisation ---------------------------------------------------------------------------------------------


def nest_scales(scales: torch.Tensor) -> tuple[torch.Tensor, NestedScales]:
    """Scales [N, G] float32 -> codes [N, G] uint8 and what makes float32 of them again: QLoRA's double quantisation.

    offset = mean(scales); in blocks of 256 (row-major) scales - offset are divided by the block's largest magnitude and
    become the nearest of 256 values (:func:`dynamic_map`; half-way down). The same bits as bitsandbytes' own kernel for
    GPUs; its CPU kernel looks codes up on a grid and is off by one in about 0.2 % of them.

    Raises:
        ValueError: not a float32 matrix.
    """
    if scales.dtype != torch.float32 or scales.ndim != 2:
        raise ValueError(f"[nest_scales] scales: expected float32 [N, G], got {scales.dtype} {list(scales.shape)}.")
    table, flat = dynamic_map().to(scales.device), scales.flatten()
    offset = flat.mean() if len(flat) else flat.new_zeros(())
    blocks = torch.nn.functional.pad(flat - offset, (0, -len(flat) % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    outer = blocks.abs().amax(1)
    # Scales that are all alike give 0 / 0; any code times 0 is the offset, then.
    units = blocks * (1 / outer.clamp(min=1e-38))[:, None]
    codes = torch.bucketize(units, (table[1:] + table[:-1]) / 2).to(torch.uint8)
    return codes.view(-1)[: len(flat)].view(scales.shape), NestedScales(table, outer, offset)


def dynamic_map() -> torch.Tensor:
    """[256] float32, sorted: the 8-bit "dynamic" data type (Dettmers, arXiv:1511.04561; QLoRA's scales).

    A decade 10^e, e = -6 .. 0, holds 2^(e + 6) values of each sign, in the middles of equal parts of 0.1 to 1 times it;
    0 and 1 come on top.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        middles = (10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        values += middles + [-m for m in middles]
    return torch.tensor(sorted(values))
