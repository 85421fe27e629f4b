"""Gives functions of a loaded library other names: writes a shared object with one jump per function, in memory.

PyPI's OpenBLAS prefixes its names (`scipy_cblas_sgemm`), but MLX calls `cblas_sgemm`. The dynamic linker finds names in the symbol
table of an ELF file, so this module writes one: header, program headers, symbols, and a jump for each symbol.
"""

import ctypes
import os
import struct
from collections.abc import Mapping

from .integers import round_up

_MACHINES = {
    "x86_64": (62, lambda to: struct.pack("<HQ3sxxx", 0xBB49, to, b"\x41\xff\xe3")),  # movabs r11, to; jmp r11
    "aarch64": (183, lambda to: struct.pack("<IIQ", 0x58000050, 0xD61F0200, to)),  # ldr x16, to; br x16
}
"""ELF's number of a machine, and 16 bytes of code that jump to an address and change no argument."""

_HEADER, _PROGRAM, _SYMBOL, _JUMP = 64, 56, 24, 16  # bytes
_PAGE = 1 << 16  # the largest page of these machines
_LOAD, _DYNAMIC, _STACK = 1, 2, 0x6474E551
_EXECUTE, _WRITE, _READ = 1, 2, 4


def give_names(addresses: Mapping[str, int]) -> ctypes.CDLL:
    """Loads a library whose function `name` jumps to `addresses[name]`; libraries loaded later find it before their own.

    Raises:
        OSError: the system cannot load it.
    """
    file = os.memfd_create("mlxlora-shim")
    try:
        os.write(file, image(addresses, os.uname().machine))
        return ctypes.CDLL(f"/proc/self/fd/{file}", mode=ctypes.RTLD_GLOBAL)
    finally:
        os.close(file)


def image(addresses: Mapping[str, int], machine: str) -> bytes:
    """The bytes of that library. They contain addresses, so they are valid in this process only.

    Raises:
        OSError: unknown `machine`.

    >>> image({"f": 0x1000}, "aarch64")[:4]
    b'\\x7fELF'
    """
    if machine not in _MACHINES:
        raise OSError(f"no jumps are known for {machine}")
    number, jump = _MACHINES[machine]
    names = b"\0" + b"".join(name.encode() + b"\0" for name in addresses)
    hashes = _one_bucket(len(addresses))
    at_hashes = _HEADER + 4 * _PROGRAM
    at_symbols = round_up(at_hashes + len(hashes), 8)
    at_names = at_symbols + _SYMBOL * (len(addresses) + 1)
    at_jumps = round_up(at_names + len(names), _JUMP)
    end = at_jumps + _JUMP * len(addresses)
    dynamic = _dynamic(hashes=at_hashes, symbols=at_symbols, names=at_names, size=len(names))
    data = round_up(end, _PAGE)
    programs = (
        _program(_LOAD, _READ | _EXECUTE, 0, end, _PAGE)
        + _program(_LOAD, _READ | _WRITE, data, len(dynamic), _PAGE)  # glibc before 2.35 writes to it
        + _program(_DYNAMIC, _READ | _WRITE, data, len(dynamic), 8)
        + _program(_STACK, _READ | _WRITE, 0, 0, 16)
    )
    parts = {
        0: _header(number) + programs,
        at_hashes: hashes,
        at_symbols: _symbols(list(addresses), at_jumps),
        at_names: names,
        at_jumps: b"".join(map(jump, addresses.values())),
        data: dynamic,
    }
    whole = bytearray(data + len(dynamic))
    for start, part in parts.items():
        whole[start : start + len(part)] = part
    return bytes(whole)


def _header(machine: int) -> bytes:
    """An ELF header: 64 bits, little-endian, a shared object with 4 program headers and no sections."""
    ident = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)
    return ident + struct.pack("<HHIQQQIHHHHHH", 3, machine, 1, 0, _HEADER, 0, 0, _HEADER, _PROGRAM, 4, 0, 0, 0)


def _program(kind: int, flags: int, at: int, size: int, align: int) -> bytes:
    return struct.pack("<IIQQQQQQ", kind, flags, at, at, at, size, size, align)


def _one_bucket(count: int) -> bytes:
    """DT_HASH with one bucket that chains all symbols: a search compares all names, which are few."""
    chain = [0, *range(2, count + 1), 0][: count + 1]
    return struct.pack(f"<{3 + len(chain)}I", 1, len(chain), 1, *chain)


def _symbols(names: list[str], jumps: int) -> bytes:
    """A null symbol, then a global function for each name, in the order of the jumps."""
    table, name_at = bytes(_SYMBOL), 1
    for index, name in enumerate(names):
        table += struct.pack("<IBBHQQ", name_at, 0x12, 0, 1, jumps + _JUMP * index, _JUMP)
        name_at += len(name) + 1
    return table


def _dynamic(*, hashes: int, symbols: int, names: int, size: int) -> bytes:
    """DT_HASH, DT_STRTAB, DT_SYMTAB, DT_STRSZ, DT_SYMENT and the end."""
    entries = ((4, hashes), (5, names), (6, symbols), (10, size), (11, _SYMBOL), (0, 0))
    return b"".join(struct.pack("<QQ", tag, value) for tag, value in entries)
