"""Pickles of other projects: nothing in them is run, and none takes more memory than its size explains.

A pickle is a program for a stack machine. Two things make it dangerous: it may call any function by name, which
:func:`load` does not let it, and a few bytes of it may ask for any amount of memory (a place in the memo far behind the
last one, a length far behind the file's end, a copy of the same text over and over), which :func:`scan` and a budget
for copies refuse before it happens. Used for plain data by :func:`load`, and by the readers of weights beside PyTorch's
own unpickler.
"""

from __future__ import annotations

import io
import mmap
import pickle
import pickletools
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

_OPCODES = {ord(each.code): each for each in pickletools.opcodes}
_STOP, _FRAME = pickle.STOP[0], pickle.FRAME[0]
_MEMO = (pickle.LONG_BINPUT[0], pickle.PUT[0])
# Bytes that the stand-ins for NumPy's functions may copy: for each byte of the file, and beyond that.
_COPIED_PER_BYTE, _COPIED_BESIDES = 4, 1 << 20
# Opcodes that put values into a list, dict, set or object that stays where it is on the stack.
_ADDS = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")
# Values once those that are held several times are written out: for each byte of the file, and beyond that.
_VALUES_PER_BYTE, _VALUES_BESIDES = 8, 1_000_000
_SMALL = 1 << 20
# How messages begin about a file that asks for more than data, which is no damage.
_REFUSED = "refused: "


class Scanned(NamedTuple):
    """What a pickle holds, without any of it being built."""

    end: int  # position after its last byte
    names: frozenset[str]  # classes and functions, in the way of protocols up to 3, which is all PyTorch reads
    longest: int  # length of its longest text, at least 255


def scan(content: bytes | mmap.mmap, start: int = 0) -> Scanned:
    """Walk through the opcodes of a pickle; about 80 MB (three million annotated clips) a second.

    Raises :class:`EOFError` if it is cut off or a length in it reaches behind the end, and
    :class:`pickle.UnpicklingError` if it is no pickle, or uses the memo, a table that the unpickler makes as long as
    the largest index, more sparsely than any writer does.
    """
    plain = _plain_opcodes(len(content))
    # Texts of up to 255 bytes are skipped unseen.
    names, longest, place = set[str](), 255, start
    while True:
        # Almost all of a file is skipped here, by the regular expression; what is left is looked at one by one.
        if match := plain.match(content, place):
            place = match.end()
        if place >= len(content):
            raise EOFError("cut off: it has no end")
        code = content[place]
        if code == _STOP:
            return Scanned(place + 1, frozenset(names), longest)
        if code not in _OPCODES:
            raise pickle.UnpicklingError(f"byte {place}: {code:#04x} is no opcode")
        opcode = _OPCODES[code]
        # Where the argument ends: of a fixed size, up to the next line break (or two), or behind a length.
        begin, kind = place + 1, opcode.arg.n if opcode.arg else 0
        end = begin + kind
        if kind == pickletools.UP_TO_NEWLINE:
            end = begin
            for _ in range(2 if opcode.arg is pickletools.stringnl_noescape_pair else 1):
                end = content.find(b"\n", end) + 1 or len(content) + 1
        elif kind < 0:
            width = {pickletools.TAKEN_FROM_ARGUMENT1: 1, pickletools.TAKEN_FROM_ARGUMENT8U: 8}.get(kind, 4)
            end = begin + width + int.from_bytes(content[begin : begin + width], "little")
        if end > len(content):
            raise EOFError(
                f"byte {place}: {opcode.name} asks for {end - begin:,} bytes, but only {len(content) - begin:,} are "
                "left; cut off or damaged"
            )
        argument = content[begin:end] if code in (*_MEMO, pickle.GLOBAL[0], _FRAME) else b""
        if code in _MEMO:
            if code != pickle.PUT[0]:
                index = int.from_bytes(argument, "little")
            elif re.fullmatch(rb"\d{1,18}\n", argument):
                index = int(argument)
            else:
                raise pickle.UnpicklingError(f"byte {place}: the memo index is no number")
            # Each index takes at least one byte to write, so an honest one is below the position in the file.
            if index > place:
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
    most = _VALUES_BESIDES + _VALUES_PER_BYTE * len(content)
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
                # Everything that the opcode takes off the stack becomes part of one value.
                first = marks.pop() if marked else len(stack) - len(opcode.stack_before) + adds
                size = sum(each[0] for each in stack[first:])
                del stack[first:]
                if adds:
                    stack[-1][0] += size
                elif opcode.stack_after:
                    stack.append([1 + size])
            if stack and stack[-1][0] > most:
                raise pickle.UnpicklingError(f"byte {place}: it holds the same values again and again, without end")


def load(path: Path | bytes, what: str, *, arrays: bool = False, encoding: str = "ASCII") -> Any:
    """Texts, bytes, numbers, lists, tuples and dicts; NumPy's scalars become Python's own.

    Args:
        path: the file, or its content.
        what: what it should be, for the message, such as "plain annotations".
        arrays: whether it may be an array of numbers, or hold such arrays in dicts and lists up to four deep, which
            are copied. Arrays of texts and pandas' indices of texts become lists.
        encoding: of texts that Python 2 wrote.

    Raises:
        pickle.UnpicklingError: whatever is wrong with it, in one line without the file's name.
        OSError: it cannot be read.
    """
    with io.BytesIO(path) if isinstance(path, bytes) else path.open("rb") as file, ExitStack() as stack:
        try:
            content: bytes | mmap.mmap
            try:
                content = stack.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            except (OSError, ValueError):  # file systems that map nothing, empty files, and bytes in memory
                content = file.read()
                file.seek(0)
            scan(content)
            check_sharing(content)
            value = _PlainUnpickler(file, _stand_ins(len(content), arrays), what, encoding).load()
        except OSError:
            raise
        except Exception as error:  # a damaged pickle can raise anything
            if str(error).startswith(_REFUSED):
                raise pickle.UnpicklingError(str(error)) from error
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise pickle.UnpicklingError(f"not a readable pickle ({reason})") from error
    return _with_arrays(value, 4, set()) if arrays else value


def _with_arrays(value: Any, depth: int, seen: set[int]) -> Any:
    """The value with NumPy's arrays instead of their stand-ins, replaced in place."""
    if isinstance(value, _Array):
        return value.value
    # Each container once: a list may hold itself a thousand times.
    if isinstance(value, (dict, list)) and depth and id(value) not in seen:
        seen.add(id(value))
        places: Any = value if isinstance(value, dict) else range(len(value))
        for place in places:
            value[place] = _with_arrays(value[place], depth - 1, seen)
    return value


def _stand_ins(size: int, arrays: bool) -> dict[tuple[str, str], Any]:
    """What a file of ``size`` bytes may name, by module and name.

    Made anew for each file, so that none can leave a mark on what the next one is read with.
    """
    # A few opcodes can ask for copies of the same large text over and over; an honest file copies each byte once.
    total = left = _COPIED_PER_BYTE * size + _COPIED_BESIDES

    def spend(copied: int) -> None:
        nonlocal left
        left -= copied
        if left < 0:
            raise ValueError(f"it copies more than {total:,} bytes, which its size does not explain")

    def scalar(dtype: _Dtype, data: bytes) -> Any:
        spend(len(data))
        return np.frombuffer(data, dtype.code, count=1)[0].item()

    def encode(text: str, _: str) -> bytes:  # how protocols up to 2 write bytes
        spend(len(text))
        return text.encode("latin1")

    def from_buffer(data: bytes, dtype: _Dtype, shape: Sequence[int], order: str, *_: Any) -> _Array:
        array = _Array(spend)
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
            # pandas 3 calls it by its public name.
            ("pandas.core.indexes.base", "Index"): "the class that is handed to _new_Index",
            ("pandas", "Index"): "the same",
            ("pandas.core.indexes.base", "_new_Index"): lambda _, state: state["data"],
            ("numpy._core.multiarray", "_reconstruct"): lambda *_: _Array(spend),
            ("numpy._core.numeric", "_frombuffer"): from_buffer,
        }
    return allowed


class _PlainUnpickler(pickle.Unpickler):
    def __init__(self, file: BinaryIO, allowed: dict[tuple[str, str], Any], what: str, encoding: str) -> None:
        super().__init__(file, encoding=encoding)
        self._allowed, self._what = allowed, what

    def find_class(self, module: str, name: str) -> Any:
        """A stand-in, or a refusal."""
        # NumPy 2 renamed its modules; files of both are read.
        stand_in = self._allowed.get((module.replace("numpy.core", "numpy._core"), name))
        if stand_in is None:
            request = " ".join(f"{_REFUSED}it asks for {module}.{name}".split())[:200]
            raise pickle.UnpicklingError(
                f"{request}, which is no part of {self._what} and could run code; nothing in it was run"
            )
        return stand_in

    def persistent_load(self, pid: Any) -> Any:
        """Nothing is outside of these files."""
        raise pickle.UnpicklingError(f"{_REFUSED}it refers to objects outside of the file")


class _Dtype:
    """Stands in for NumPy's, which a made-up state turns into a way to any memory."""

    def __init__(self, code: str, *_: object) -> None:
        # Numbers and text only: a record's fields overlap as its state says. Objects are a list of plain data.
        if not (isinstance(code, str) and re.fullmatch(r"[iuf][1248]|b1|U\d{1,6}|O8?", code)):
            name = code[:20] if isinstance(code, str) else type(code).__name__
            raise ValueError(f"NumPy's type '{name}' is no plain number or text")
        self.code = code

    def __setstate__(self, state: Sequence[Any]) -> None:
        # Of the state only the byte order counts; the rest describes records and sizes, which the code implies.
        if state[1] in ("<", ">"):
            self.code = state[1] + self.code.lstrip("<>")


class _Array:
    """Stands in for NumPy's, whose constructor reserves whatever size it is given."""

    value: np.ndarray | list[Any]

    def __init__(self, spend: Callable[[int], None]) -> None:
        self._spend = spend

    def __setstate__(self, state: Sequence[Any]) -> None:
        _, shape, dtype, is_fortran, data = state
        self.fill(data, dtype, shape, "F" if is_fortran else "C")

    def fill(self, data: bytes, dtype: _Dtype, shape: Sequence[int], order: Any) -> None:
        self._spend(len(data))
        if dtype.code.startswith("O"):
            # Never as an array, which would make it of pointers: pickle hands over a list, bytes are not one.
            if not isinstance(data, list) or not all(isinstance(each, str) for each in data):
                raise ValueError("its array of objects holds no texts")
            self.value = data
            return
        # As many numbers as there are bytes for: a shape that asks for more does not fit them and raises.
        self.value = np.frombuffer(data, dtype.code).reshape(tuple(shape), order=order).copy(order="K")


@cache
def _plain_opcodes(size: int) -> re.Pattern[bytes]:
    """Matches opcodes that need no look, as many as follow one another, in a file of ``size`` bytes.

    Those of fixed size except STOP and FRAME, texts of up to 255 bytes, and memo indices up to about the file's size.
    A loop in Python over millions of opcodes would take longer than the unpickler.
    """
    by_size: dict[int, list[pickletools.OpcodeInfo]] = {}
    for opcode in pickletools.opcodes:
        if ord(opcode.code) not in (_STOP, _FRAME, pickle.LONG_BINPUT[0]):
            by_size.setdefault(opcode.arg.n if opcode.arg else 0, []).append(opcode)

    def any_of(n: int) -> bytes:
        return b"[" + b"".join(re.escape(each.code.encode("latin1")) for each in by_size[n]) + b"]"

    parts = [any_of(n) + b".{%d}" % n for n in by_size if n >= 0]
    # Texts: the opcode, the length in one or four bytes (little-endian), and as many bytes.
    for kind, width in (
        (pickletools.TAKEN_FROM_ARGUMENT1, 1),
        (pickletools.TAKEN_FROM_ARGUMENT4, 4),
        (pickletools.TAKEN_FROM_ARGUMENT4U, 4),
    ):
        zeros = b"\\x00{%d}" % (width - 1) if width > 1 else b""
        texts = [re.escape(bytes([length])) + zeros + b".{%d}" % length for length in range(256)]
        parts.append(any_of(kind) + b"(?:" + b"|".join(texts) + b")")
    # Memo indices of as many bytes as the file's size has, of which the highest is not above the size's.
    width = min(4, (size.bit_length() + 7) // 8)
    top = min(255, size >> 8 * (width - 1)) if width else 0
    parts.append(pickle.LONG_BINPUT + b".{%d}[\\x00-\\x%02x]\\x00{%d}" % (width - 1, top, 4 - width))
    # Possessive: nothing is remembered to go back to.
    return re.compile(b"(?:" + b"|".join(parts) + b")*+", re.DOTALL)
