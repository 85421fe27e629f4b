"""Functions of a loaded library under other names: a shared object of a few jumps, written here, in memory.

PyPI's OpenBLAS prefixes its names (`scipy_cblas_sgemm`) while MLX calls `cblas_sgemm`. What gives a name to an address is a
symbol table that the dynamic linker reads, and that is an ELF file: header, program headers, symbols, one jump each.
"""

import ctypes
import os
import struct
from collections.abc import Mapping

_MACHINES = {
    "x86_64": (62, lambda to: struct.pack("<HQ3sxxx", 0xBB49, to, b"\x41\xff\xe3")),  # movabs r11, to; jmp r11
    "aarch64": (183, lambda to: struct.pack("<IIQ", 0x58000050, 0xD61F0200, to)),  # ldr x16, to; br x16
}
"""ELF's number of a machine, and 16 bytes that jump to an address without touching an argument."""

_HEADER, _PROGRAM, _SYMBOL, _JUMP = 64, 56, 24, 16  # bytes
_PAGE = 1 << 16  # the largest page of these machines
_LOAD, _DYNAMIC, _STACK = 1, 2, 0x6474E551
_EXECUTE, _WRITE, _READ = 1, 2, 4


def give_names(addresses: Mapping[str, int]) -> ctypes.CDLL:
    """Loads a library whose function `name` jumps to `addresses[name]`; libraries loaded later find it before their own.

    Raises:
        OSError: the system does not load it.
    """
    file = os.memfd_create("mlxlora-shim")
    try:
        os.write(file, image(addresses, os.uname().machine))
        return ctypes.CDLL(f"/proc/self/fd/{file}", mode=ctypes.RTLD_GLOBAL)
    finally:
        os.close(file)


def image(addresses: Mapping[str, int], machine: str) -> bytes:
    """The bytes of that library, for this process alone: addresses are written into it.

    Raises:
        OSError: `machine` is not known.

    >>> image({"f": 0x1000}, "aarch64")[:4]
    b'\\x7fELF'
    """
    if machine not in _MACHINES:
        raise OSError(f"no jumps are known for {machine}")
    number, jump = _MACHINES[machine]
    names = b"\0" + b"".join(name.encode() + b"\0" for name in addresses)
    hashes = _one_bucket(len(addresses))
    at_hashes = _HEADER + 4 * _PROGRAM
    at_symbols = _up(at_hashes + len(hashes), 8)
    at_names = at_symbols + _SYMBOL * (len(addresses) + 1)
    at_jumps = _up(at_names + len(names), _JUMP)
    end = at_jumps + _JUMP * len(addresses)
    dynamic = _dynamic(hashes=at_hashes, symbols=at_symbols, names=at_names, size=len(names))
    data = _up(end, _PAGE)
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
    """ELF, 64 bits, little-endian, a shared object with 4 program headers and no sections."""
    ident = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)
    return ident + struct.pack("<HHIQQQIHHHHHH", 3, machine, 1, 0, _HEADER, 0, 0, _HEADER, _PROGRAM, 4, 0, 0, 0)


def _program(kind: int, flags: int, at: int, size: int, align: int) -> bytes:
    return struct.pack("<IIQQQQQQ", kind, flags, at, at, at, size, size, align)


def _one_bucket(count: int) -> bytes:
    """DT_HASH where symbol 1 leads to 2 and so on: a search compares all the names, of which there are few."""
    chain = [0, *range(2, count + 1), 0][: count + 1]
    return struct.pack(f"<{3 + len(chain)}I", 1, len(chain), 1, *chain)


def _symbols(names: list[str], jumps: int) -> bytes:
    """A null symbol, then global functions, in the order of their names and of their jumps."""
    table, name_at = bytes(_SYMBOL), 1
    for index, name in enumerate(names):
        table += struct.pack("<IBBHQQ", name_at, 0x12, 0, 1, jumps + _JUMP * index, _JUMP)
        name_at += len(name) + 1
    return table


def _dynamic(*, hashes: int, symbols: int, names: int, size: int) -> bytes:
    """DT_HASH, DT_STRTAB, DT_SYMTAB, DT_STRSZ, DT_SYMENT and the end."""
    entries = ((4, hashes), (5, names), (6, symbols), (10, size), (11, _SYMBOL), (0, 0))
    return b"".join(struct.pack("<QQ", tag, value) for tag, value in entries)


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
