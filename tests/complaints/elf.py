# SPDX-License-Identifier: Apache-2.0
"""What a shared library asks of its loader, read from the file itself: no tool needed, nothing executed."""

from __future__ import annotations

import struct
from pathlib import Path

DYNAMIC, NEEDED, STRTAB, RPATH, RUNPATH, STRSZ, SYMTAB, LOAD = 2, 1, 5, 15, 29, 10, 6, 1


class Elf:
    """needed: names of the libraries it links; undefined: names of the symbols that others must bring."""

    def __init__(self, path: str | Path):
        self.data = Path(path).read_bytes()
        assert self.data[:5] == b"\x7fELF\x02", f"{path} is no 64-bit ELF file"
        (offset,), (size, count) = self._at("<Q", 32), self._at("<HH", 54)
        headers = [self._at("<IIQQQQQQ", offset + i * size) for i in range(count)]
        self.segments = [(h[3], h[2], h[5]) for h in headers if h[0] == LOAD]  # address, offset, size
        dynamic = next(h for h in headers if h[0] == DYNAMIC)
        entries = [self._at("<qQ", dynamic[2] + i) for i in range(0, dynamic[5], 16)]
        values = dict(entries)
        self.strings = self._offset(values[STRTAB])
        self.needed = [self._name(v) for tag, v in entries if tag == NEEDED]
        self.search = [self._name(v) for tag, v in entries if tag in (RPATH, RUNPATH)]
        self.undefined = self._undefined(self._offset(values[SYMTAB]))

    def _at(self, form: str, offset: int):
        return struct.unpack_from(form, self.data, offset)

    def _offset(self, address: int) -> int:
        start, offset, _ = next(s for s in self.segments if s[0] <= address < s[0] + s[2])
        return address - start + offset

    def _name(self, at: int) -> str:
        begin = self.strings + at
        return self.data[begin : self.data.index(b"\0", begin)].decode()

    def _undefined(self, table: int) -> list[str]:
        """The symbol table has no length of its own; the string table follows it in every linker's layout."""
        end = self.strings if self.strings > table else len(self.data)
        symbols = [self._at("<IBBHQQ", at) for at in range(table, end - 23, 24)]
        return [self._name(name) for name, _, _, section, *_ in symbols if section == 0 and name]
