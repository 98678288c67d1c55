"""Pickles of other projects: nothing in them is run, and none takes more memory than its size explains.

A pickle is a program for a stack machine. Two things make it dangerous: it may call any function by name, which
:func:`load` does not let it, and a few bytes of it may ask for any amount of memory (a place in the memo far behind the
last one, a length far behind the file's end, a copy of the same text over and over), which :func:`scan` and a budget
for copies refuse before it happens. Used for plain data by :func:`load`, and by the readers of weights beside PyTorch's
own unpickler.
"""

from __future__ import annotations

import mmap
import pickle
import pickletools
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

_OPCODES = {ord(each.code): each for each in pickletools.opcodes}
_STOP, _FRAME = pickle.STOP[0], pickle.FRAME[0]
_MEMO = (pickle.LONG_BINPUT[0], pickle.PUT[0])
# Copies that stand-ins for NumPy's functions make, in bytes for each byte of the file and beyond that.
_COPIES, _MORE_COPIES = 4, 1 << 20


# What puts values into a list, dict, set or object that stays where it is.
_ADDS = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")
# Values, for each byte of the file and beyond that, once what is held several times is written out.
_SHARED, _SHARED_PER_BYTE = 1_000_000, 8
_SMALL = 1 << 20


@dataclass(frozen=True)
class Scanned:
    """What a pickle holds, without any of it being built."""

    end: int
    """Position after its last byte."""
    names: frozenset[str]
    """The classes and functions that it names in the way of protocols up to 3, which is all PyTorch reads."""
    longest: int
    """Length of its longest text, at least 255."""


def scan(content: bytes | mmap.mmap, start: int = 0) -> Scanned:
    """Walk through the opcodes of a pickle; about 80 MB (three million annotated clips) a second.

    Raises :class:`EOFError` if it is cut off or a length in it reaches behind the end, and
    :class:`pickle.UnpicklingError` if it is no pickle, or uses the memo, a table that the unpickler makes as long as
    the largest index, more sparsely than any writer does.
    """
    plain = _run_of_plain_opcodes(len(content))
    names, longest, place = set[str](), 255, start
    while True:
        found = plain.match(content, place)
        place = found.end() if found else place
        if place >= len(content):
            raise EOFError("cut off: it has no end")
        code = content[place]
        if code == _STOP:
            return Scanned(place + 1, frozenset(names), longest)
        if code not in _OPCODES:
            raise pickle.UnpicklingError(f"byte {place}: {code:#04x} is no opcode")
        opcode = _OPCODES[code]
        begin, end = place + 1, _end_of_argument(content, place, opcode)
        if end > len(content):
            asked = f"byte {place}: {opcode.name} asks for {end - begin:,} bytes"
            raise EOFError(f"{asked}, but only {len(content) - begin:,} are left; cut off or damaged")
        argument = content[begin:end] if code in (*_MEMO, pickle.GLOBAL[0], _FRAME) else b""
        if code in _MEMO:
            index = _memo_index(argument, place) if code == pickle.PUT[0] else int.from_bytes(argument, "little")
            if index > place:  # each index takes at least one byte to write
                raise pickle.UnpicklingError(f"byte {place}: memo index {index:,}, more than there can be")
        elif code == pickle.GLOBAL[0]:
            names.add(argument.decode("utf-8", "replace").strip().replace("\n", "."))
        elif code == _FRAME and int.from_bytes(argument, "little") > len(content) - end:
            raise EOFError(f"byte {place}: a frame is longer than what is left; cut off or damaged")
        longest = max(longest, end - begin)
        place = end


def check_sharing(content: bytes | mmap.mmap) -> None:
    """Refuse a pickle whose values hold one another again and again, without building any of them.

    A list of twice a list of twice a list ... takes few bytes, but printing it (in a message, say) or hashing it never
    ends. Each value's size is what it would be if nothing were shared. It takes a second for a megabyte, and larger
    pickles are passed over: they are lists of many clips or the like. Raises :class:`pickle.UnpicklingError`.
    """
    if len(content) > _SMALL:
        return
    # A size is in a list of its own, so that what the memo holds grows with the value.
    stack, marks, memo = list[list[int]](), list[int](), dict[int, list[int]]()
    content = bytes(content)
    most = _SHARED + _SHARED_PER_BYTE * len(content)
    with suppress(IndexError, KeyError, ValueError):  # opcodes that do not fit: the unpickler gets no further either
        for opcode, argument, place in pickletools.genops(content):
            name, marked = opcode.name, pickletools.markobject in opcode.stack_before
            if name == "MARK":
                marks.append(len(stack))
            elif "PUT" in name or name == "MEMOIZE":
                memo[len(memo) if argument is None else int(argument)] = stack[-1]
            elif "GET" in name:
                stack.append(memo[int(argument or 0)])
            elif name == "DUP":
                stack.append(stack[-1])
            else:
                adds = name in _ADDS
                first = marks.pop() if marked else len(stack) - len(opcode.stack_before) + adds
                size = sum(each[0] for each in stack[first:])
                del stack[first:]
                if adds:
                    stack[-1][0] += size
                elif opcode.stack_after:
                    stack.append([1 + size])
            if stack and stack[-1][0] > most:
                raise pickle.UnpicklingError(f"byte {place}: it holds the same values again and again, without end")


def load(path: Path, what: str, *, arrays: bool = False, encoding: str = "ASCII") -> Any:
    """Texts, bytes, numbers, lists, tuples and dicts; NumPy's scalars become Python's own.

    Args:
        path: the file.
        what: what it should be, for the message, such as "plain annotations".
        arrays: whether it may be an array of numbers (and nothing around it), which is copied.
        encoding: of texts that Python 2 wrote.

    Raises:
        pickle.UnpicklingError: whatever is wrong with it, in one line without the file's name.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        try:
            allowed = _stand_ins(_COPIES * _scan_file(file) + _MORE_COPIES, arrays)
            value = _PlainUnpickler(file, allowed, what, encoding).load()
        except (_Refused, OSError):
            raise
        except Exception as error:  # a damaged pickle can raise anything
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise pickle.UnpicklingError(f"not a readable pickle ({reason})") from error
    return value.value if isinstance(value, _Array) else value


def _scan_file(file: BinaryIO) -> int:
    """Scan an open file from its beginning, where it is left; its size."""
    try:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _scan_whole(content)
    except (OSError, ValueError):  # file systems that map nothing, and empty files
        whole = file.read()
        file.seek(0)
        return _scan_whole(whole)


def _scan_whole(content: bytes | mmap.mmap) -> int:
    scan(content)
    check_sharing(content)
    return len(content)


class _Refused(pickle.UnpicklingError):
    """It asks for more than data."""


class _PlainUnpickler(pickle.Unpickler):
    def __init__(self, file: Any, allowed: dict[tuple[str, str], Any], what: str, encoding: str) -> None:
        super().__init__(file, encoding=encoding)
        self._allowed, self._what = allowed, what

    def find_class(self, module: str, name: str) -> Any:
        """A stand-in, or a refusal."""
        found = self._allowed.get((module.replace("numpy.core", "numpy._core"), name))
        if found is None:
            asks = " ".join(f"refused: it asks for {module}.{name}".split())[:200]
            raise _Refused(f"{asks}, which is no part of {self._what} and could run code; nothing in it was run")
        return found

    def persistent_load(self, pid: Any) -> Any:
        """Nothing is outside of these files."""
        raise _Refused("refused: it refers to objects outside of the file")


class _Dtype:
    """Stands in for NumPy's, which a made-up state turns into a way to any memory."""

    def __init__(self, code: str, *_: object) -> None:
        if not (isinstance(code, str) and re.fullmatch(r"[iuf][1248]|b1|U\d{1,6}", code)):
            name = code[:20] if isinstance(code, str) else type(code).__name__
            raise ValueError(f"NumPy's type '{name}' is no plain number or text")
        self.code = code

    def __setstate__(self, state: Sequence[Any]) -> None:
        if state[1] in ("<", ">"):
            self.code = state[1] + self.code.lstrip("<>")


class _Array:
    """Stands in for NumPy's, whose constructor reserves whatever size it is given."""

    value: np.ndarray

    def __init__(self, copied: Callable[[int], None]) -> None:
        self._copied = copied

    def __setstate__(self, state: Sequence[Any]) -> None:
        _, shape, dtype, is_fortran, data = state
        self.fill(data, dtype, shape, "F" if is_fortran else "C")

    def fill(self, data: bytes, dtype: _Dtype, shape: Sequence[int], order: Any) -> None:
        self._copied(len(data))
        self.value = np.frombuffer(data, dtype.code).reshape(tuple(shape), order=order).copy(order="K")


def _stand_ins(budget: int, arrays: bool) -> dict[tuple[str, str], Any]:
    """What a file may name; made anew for each, so that none can leave a mark on what the next one is read with."""
    left = budget

    def copied(size: int) -> None:
        nonlocal left
        left -= size
        if left < 0:
            raise ValueError(f"it copies more than {budget:,} bytes, which its size does not explain")

    def scalar(dtype: _Dtype, data: bytes) -> Any:
        copied(len(data))
        return np.frombuffer(data, dtype.code, count=1)[0].item()

    def encode(text: str, _: str) -> bytes:
        """How protocols up to 2 spell bytes."""
        copied(len(text))
        return text.encode("latin1")

    def from_buffer(data: bytes, dtype: _Dtype, shape: Sequence[int], order: str, *_: Any) -> _Array:
        array = _Array(copied)
        array.fill(data, dtype, shape, order if order in ("C", "F") else "C")
        return array

    allowed: dict[tuple[str, str], Any] = {
        ("numpy", "dtype"): _Dtype,
        ("numpy._core.multiarray", "scalar"): scalar,
        ("_codecs", "encode"): encode,
    }
    if arrays:
        allowed |= {
            ("numpy", "ndarray"): "the class that is handed to _reconstruct",
            ("numpy._core.multiarray", "_reconstruct"): lambda *_: _Array(copied),
            ("numpy._core.numeric", "_frombuffer"): from_buffer,
        }
    return allowed


@cache
def _run_of_plain_opcodes(size: int) -> re.Pattern[bytes]:
    """Matches opcodes that need no look, as many as follow one another, in a file of ``size`` bytes.

    Those of fixed size except STOP and FRAME, texts of up to 255 bytes, and memo indices up to about the file's size.
    A loop in Python over millions of opcodes would take longer than the unpickler.
    """

    def either(opcodes: list[pickletools.OpcodeInfo]) -> bytes:
        return b"[" + b"".join(re.escape(each.code.encode("latin1")) for each in opcodes) + b"]"

    def sized(length_bytes: int) -> bytes:
        zeros = b"\\x00{%d}" % (length_bytes - 1) if length_bytes > 1 else b""
        texts = [re.escape(bytes([length])) + zeros + b".{%d}" % length for length in range(256)]
        return b"(?:" + b"|".join(texts) + b")"

    by_size: dict[int, list[pickletools.OpcodeInfo]] = {}
    for opcode in pickletools.opcodes:
        if ord(opcode.code) not in (_STOP, _FRAME, pickle.LONG_BINPUT[0]):
            by_size.setdefault(opcode.arg.n if opcode.arg else 0, []).append(opcode)
    parts = [either(opcodes) + b".{%d}" % n for n, opcodes in by_size.items() if n >= 0]
    parts.append(either(by_size[pickletools.TAKEN_FROM_ARGUMENT1]) + sized(1))
    for kind in (pickletools.TAKEN_FROM_ARGUMENT4, pickletools.TAKEN_FROM_ARGUMENT4U):
        parts.append(either(by_size[kind]) + sized(4))
    used = min(4, (size.bit_length() + 7) // 8)
    top = min(255, size >> 8 * (used - 1)) if used else 0
    parts.append(pickle.LONG_BINPUT + b".{%d}[\\x00-\\x%02x]\\x00{%d}" % (used - 1, top, 4 - used))
    # Possessive: nothing is remembered to go back to.
    return re.compile(b"(?:" + b"|".join(parts) + b")*+", re.DOTALL)


def _end_of_argument(content: bytes | mmap.mmap, place: int, opcode: pickletools.OpcodeInfo) -> int:
    """Where the argument of the opcode at ``place`` ends, which may be behind the content's end."""
    begin, kind = place + 1, opcode.arg.n if opcode.arg else 0
    if kind >= 0:
        return begin + kind
    if kind == pickletools.UP_TO_NEWLINE:
        for _ in range(2 if opcode.arg is pickletools.stringnl_noescape_pair else 1):
            begin = content.find(b"\n", begin) + 1
            if not begin:
                return len(content) + 1
        return begin
    widths = {pickletools.TAKEN_FROM_ARGUMENT1: 1, pickletools.TAKEN_FROM_ARGUMENT8U: 8}
    width = widths.get(kind, 4)
    return begin + width + int.from_bytes(content[begin : begin + width], "little")


def _memo_index(argument: bytes, place: int) -> int:
    if not re.fullmatch(rb"\d{1,18}\n", argument):
        raise pickle.UnpicklingError(f"byte {place}: the memo index is no number")
    return int(argument)
