"""Damaged and hostile variants of files: ``mutate`` is a function of a file's content and a random generator alone.

Half of the changes are of bytes, whatever the file is; the others know its format: cells of a csv, values of JSON and
YAML, opcodes of a pickle, members of a zip archive, boxes of an MP4. No change ever makes a file much larger than
``_LARGEST``, so that a reader that needs much memory or time is to blame for it.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import os
import pickle
import pickletools
import random
import re
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import yaml

_LARGEST = 4 << 20
# Where a change leaves the values that a format allows.
_BORDERS = (
    *(0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 1 << 20, 1 << 26, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 40, -1),
)  # fmt: skip
_TEXTS = (
    *("", " ", "nan", "NULL", "None", "null", "inf", "-inf", "-1", "0", "1e999", "1e-400", "9" * 20, "9" * 5000),
    *("1_000", "true", "True", "on", "012", "12:30:45", "1:2:3:4", "2024-01-01", "..", "../../x", "/etc/passwd"),
    *("\0", "\n", "\r", "\r\n", "\t", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\ufeff", "\x1b[31m", "\ud800"),
    *('"', "'", '""', ",", ";", "|", "#", "[", "]", "{", "}", "[]", "['a', 'b']", "['c', None]", "[1, 2", "{}"),
    *("A" * 5000, "word " * 1500, "[" * 3000, "(" * 3000, "é", "e\u0301", "物", "\U0001f44b", "%s", "%n", "\udc80"),
    *("${oc.env:HOME}", "${train.lr}", "${a.b.c}", "???", "<think>", "<script>", "a/b/c", "C:\\x", "x" * 300 + "/y"),
    *("!!python/object/apply:os.getcwd []", "&a [*a]", "*a", "<<: {}", "- ", ": ", "? ", "| ", "%YAML 9", "---", "~"),
)  # fmt: skip
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 1.5, -0.0, 10**30, 2**31, 2**63, -(2**63), 1e308, float("nan"), float("inf"), 255),
    *([], {}, [[]], [None], {"": None}, [[[[1]]]], ["a", 1, None], {"a": {"b": 1}}, [0] * 500),
)  # fmt: skip
fired = False
"""Whether a file had :func:`fire` called."""


def fire(*_: object) -> None:
    """What no file may bring a reader to call."""
    global fired
    fired = True


def mutate(content: bytes, name: str, rng: random.Random, others: Sequence[bytes] = ()) -> bytes:
    """``content`` of the file ``name`` with one change or a few; ``others`` are files to splice parts of."""
    for _ in range(rng.choice((1, 1, 1, 1, 2, 2, 3, 6))):
        fitting = _of_format(content, name)
        change = rng.choice(fitting) if fitting and rng.random() < 0.6 else None
        try:
            content = change(content, rng) if change else _bytes(content, rng, others)
        except Exception:  # an earlier change has left nothing of the format
            content = _bytes(content, rng, others)
        content = content[:_LARGEST]
    return content


def _of_format(content: bytes, name: str) -> list[Callable[[bytes, random.Random], bytes]]:
    ending = os.path.splitext(name)[1].lower()
    if ending in (".csv", ".tsv", ".txt"):
        return [_csv, _csv, _text]
    if ending in (".json", ".jsonl"):
        return [_json_lines if ending == ".jsonl" else _json, _text]
    if ending in (".yml", ".yaml"):
        return [_yaml, _yaml, _text, _yaml_bomb]
    if ending == ".jinja":
        return [_text]
    if content[:2] == b"PK":
        return [_zip]
    if content[:2] == b"\x1f\x8b":
        return [lambda content, rng: _gzip(content, name.removesuffix(".gz"), rng)]
    if ending in (".pkl", ".pickle"):
        return [_pickle, _pickle, _messages]
    if ending in (".pt", ".pth", ".tar"):
        return [_pickle]
    if ending == ".safetensors":
        return [_safetensors]
    if ending == ".npy":
        return [_npy]
    if ending == ".parquet":
        return [_parquet]
    return [_boxes] if content[4:8] == b"ftyp" else []


# --------------------------------------------------------------------------------------------------
# Bytes
# --------------------------------------------------------------------------------------------------


def _bytes(content: bytes, rng: random.Random, others: Sequence[bytes] = ()) -> bytes:
    """A change that any file can suffer."""
    size = len(content)
    at = rng.randrange(size + 1)
    upto = min(size, at + int(rng.expovariate(1 / 8)) + 1)
    kind = rng.randrange(12)
    if kind == 0 and size:  # one bit
        at = min(at, size - 1)
        return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
    if kind == 1:  # some random bytes
        return content[:at] + rng.randbytes(upto - at) + content[upto:]
    if kind == 2:
        return content[:at] + rng.randbytes(rng.randrange(1, 9)) + content[at:]
    if kind == 3:
        return content[:at] + content[upto:]
    if kind == 4:  # cut off
        return content[:at]
    if kind == 5:  # a part twice, or very often
        part = content[rng.randrange(size + 1) :][: rng.randrange(1, 200)]
        return content[:at] + part * rng.choice((1, 1, 1, 50, 2000)) + content[at:]
    if kind == 6:  # two parts change places
        cuts = sorted(rng.randrange(size + 1) for _ in range(4))
        a, b, c, d, e = (content[i:j] for i, j in zip([0, *cuts], [*cuts, size], strict=True))
        return a + d + c + b + e
    if kind == 7:  # a number at the borders of its type
        width, order = rng.choice((1, 2, 4, 8)), rng.choice(("little", "big"))
        number = (rng.choice(_BORDERS) & (1 << 8 * width) - 1).to_bytes(width, order)  # type: ignore[arg-type]
        return content[:at] + number + content[at + width :]
    if kind == 8:
        return content[:at] + rng.choice(_TEXTS).encode("utf-8", "surrogatepass") + content[at:]
    if kind == 9 and others:
        other = rng.choice(others)
        start = rng.randrange(len(other) + 1)
        return content[:at] + other[start : start + rng.randrange(1, 2000)] + content[upto:]
    if kind == 10:  # another encoding
        text = content.decode("utf-8", "replace")
        return text.encode(rng.choice(("utf-16", "utf-16-le", "latin-1", "utf-8-sig", "cp1252")), "replace")
    if kind == 11:
        return rng.choice((b"", b"\n", b"\0", b"\xff" * 64, b"null", content * 2, content[::-1]))
    return content[:at] + bytes([rng.randrange(256)]) + content[at:]


# --------------------------------------------------------------------------------------------------
# Text
# --------------------------------------------------------------------------------------------------


def _text(content: bytes, rng: random.Random) -> bytes:
    """Lines or words moved, doubled, dropped or replaced."""
    text = content.decode("utf-8", "surrogateescape")
    if rng.random() < 0.5:
        parts, joint = text.split("\n"), rng.choice(("\n", "\n", "\r\n", "\r", "\u2028", "\n\n"))
    else:
        parts, joint = re.split(r"(\W)", text), ""
    at, other = rng.randrange(len(parts)), rng.randrange(len(parts))
    kind = rng.randrange(5)
    if kind == 0:
        parts[at], parts[other] = parts[other], parts[at]
    elif kind == 1:
        parts.insert(at, parts[other])
    elif kind == 2:
        del parts[at]
    else:
        parts[at] = rng.choice(_TEXTS)
    return joint.join(parts).encode("utf-8", "surrogatepass" if "\ud800" in joint.join(parts) else "surrogateescape")


def _csv(content: bytes, rng: random.Random) -> bytes:
    """One cell, row or column of a table."""
    text = content.decode("utf-8-sig", "surrogateescape")
    mark = "\t" if "\t" in text.partition("\n")[0] else ","
    rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=mark)) or [[""]]
    row = rng.choice(rows)
    at, kind = rng.randrange(len(row) or 1), rng.randrange(9)
    if kind <= 2 and row:
        row[at] = rng.choice(_TEXTS)
    elif kind == 3 and row:
        row[at] = rng.choice(rng.choice(rows) or [""])
    elif kind == 4:
        row[at : at + 1] = rng.choice(([], ["", ""], row))
    elif kind == 5:
        rows.insert(rng.randrange(len(rows) + 1), list(row) if rng.random() < 0.5 else [])
    elif kind == 6:
        rows.remove(row)
    elif kind == 7:  # a column out, twice or empty
        column = rng.choice(("drop", "double", "empty"))
        for each in rows:
            if at < len(each):
                each[at : at + 1] = {"drop": [], "double": [each[at]] * 2, "empty": [""]}[column]
    else:
        rng.shuffle(row)
    held = io.StringIO(newline="")
    ends = rng.choice(("\n", "\n", "\r\n", "\r"))
    csv.writer(held, delimiter=rng.choice((mark, mark, mark, ";", "|", "\t")), lineterminator=ends).writerows(rows)
    return held.getvalue().encode("utf-8", "surrogatepass" if "\ud800" in held.getvalue() else "surrogateescape")


def _tree(tree: Any, rng: random.Random) -> Any:
    """A tree of dicts and lists with one value changed."""
    places = list(itertools.islice(_places(tree), 20_000))
    if not places:
        return rng.choice(_VALUES)
    if len(places) == 20_000:
        raise ValueError("aliases of aliases, or many copies, are more than can be walked through")
    inside, key = rng.choice(places)
    kind = rng.randrange(8)
    if kind <= 1:
        inside[key] = rng.choice(_VALUES)
    elif kind <= 3:
        inside[key] = rng.choice(_TEXTS)
    elif kind == 4:
        del inside[key]
    elif kind == 5:
        other, place = rng.choice(places)
        inside[key] = json.loads(json.dumps(other[place]))
    elif kind == 6:
        inside[key] = rng.choice(([inside[key]], {"a": inside[key]}, str(inside[key])[:2000]))
    elif isinstance(inside, dict):
        inside[rng.choice((*_TEXTS, *(str(place) for _, place in places)))] = inside.pop(key)
    else:
        inside.insert(key, rng.choice(_VALUES))
    return tree


def _places(tree: Any) -> Any:
    """Every (container, key) of a tree."""
    for key in tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield tree, key
        yield from _places(tree[key])


def _json(content: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.05:
        return rng.choice((b"[" * 100_000, b'{"a":' * 100_000, b"[" * 500 + b"]" * 500, b"9" * 5000))
    return json.dumps(_tree(json.loads(content), rng), ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")


def _json_lines(content: bytes, rng: random.Random) -> bytes:
    lines = content.split(b"\n")
    at = rng.randrange(len(lines))
    lines[at] = _json(lines[at] or b"{}", rng)
    return b"\n".join(lines)


def _yaml(content: bytes, rng: random.Random) -> bytes:
    tree = _tree(yaml.safe_load(content), rng)
    return yaml.safe_dump(tree, default_flow_style=rng.random() < 0.3, allow_unicode=True).encode("utf-8", "replace")


def _yaml_bomb(content: bytes, rng: random.Random) -> bytes:
    """Aliases of aliases: a few lines that stand for very many values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, rng.choice((3, 9)))]
    return content + "\n".join(["", *lines, ""]).encode()


# --------------------------------------------------------------------------------------------------
# Pickles
# --------------------------------------------------------------------------------------------------


def _call(module: str, name: str, *arguments: str) -> bytes:
    """Opcodes that call a function of a module."""
    words = b"".join(b"X" + len(word).to_bytes(4, "little") + word.encode() for word in arguments)
    return f"c{module}\n{name}\n(".encode() + words + b"tR"


def _doubling(levels: int) -> bytes:
    """Opcodes of a list of two times a list of two times ...: little to hold, endless to print."""
    return b"]" + b"q\x00](h\x00h\x00e" * levels


def _long(opcode: bytes, number: int, width: int) -> bytes:
    return opcode + number.to_bytes(width, "little")


_SNIPPETS = (
    _call("tests.fuzz_mutations", "fire"),
    _call("os", "system", "true"),
    _call("builtins", "eval", "__import__('tests.fuzz_mutations').fuzz_mutations.fire()"),
    _call("builtins", "exec", "import tests.fuzz_mutations as m; m.fire()"),
    _call("numpy", "load", "/dev/null"),
    _call("torch", "load", "/dev/null"),
    _doubling(40),
    b"}" + b")" + b"2\x86" * 40 + b"Ns",  # the same of tuples, which a dict hashes
    *(_long(b"r", 1 << power, 4) for power in (20, 24, 26, 27, 28, 31)),  # a place in the memo
    *(_long(b"\x8e", 1 << power, 8) for power in (27, 31, 33, 40, 63)),  # so many bytes follow
    *(_long(b"\x96", 1 << power, 8) for power in (27, 28, 30, 33, 62)),  # the same, to be changed
    *(_long(b"B", 1 << power, 4) + b"x" for power in (27, 30, 31)),
    *(_long(b"X", 1 << power, 4) + b"x" for power in (27, 30, 31)),
    *(_long(b"\x95", 1 << power, 8) for power in (27, 31, 40)),  # a frame
    *(_long(b"\x8b", 1 << power, 4) for power in (27, 30, 31)),  # digits of a number
    *(b"\x8a\xff" + b"\xff" * 255, b"I" + b"9" * 5000 + b"\n", b"F1e999\n", b"L" + b"9" * 4000 + b"L\n"),
    *(b"(" * 5000, b"]" * 5000, b"Vx\\ud800\n", b"P0\n", b"h\x00", b"q\x00"),
    *(bytes([opcode]) for opcode in b"012RbQsueatldN})]\x81\x85\x86\x87\x88\x92\x93\x94"),
    *(b"ccollections\nOrderedDict\n", b"cnumpy\ndtype\n", b"cnumpy\nndarray\n", b"ctorch._utils\n_rebuild_tensor_v2\n"),
    *(b"c__builtin__\nbytearray\n", b"cbuiltins\ngetattr\n", b"c_codecs\nencode\n", b"ctorch\nFloatStorage\n"),
)  # fmt: skip


def _pickle(content: bytes, rng: random.Random) -> bytes:
    """Opcodes dropped, doubled, moved, added, or with other arguments."""
    if rng.random() < 0.03:
        return b"\x80\x02" + rng.choice(_SNIPPETS[:8]) + b"."
    places, end = [0], 0
    try:
        while True:  # PyTorch's older format is several pickles in a row
            places += [end + place for _, _, place in pickletools.genops(content[end:]) if place]
            end += pickletools_end(content[end:])
            places.append(end)
    except ValueError:
        pass
    cuts = sorted({*places, end})
    ops = [content[a:b] for a, b in itertools.pairwise(cuts)]
    rest = content[cuts[-1] :]
    if not ops:
        raise ValueError("no pickle")
    at, other, kind = rng.randrange(len(ops)), rng.randrange(len(ops)), rng.randrange(8)
    if kind == 0:
        del ops[at]
    elif kind == 1:
        ops.insert(at, ops[other])
    elif kind == 2:
        ops[at], ops[other] = ops[other], ops[at]
    elif kind == 3:
        ops[at : at + 1] = [ops[at]] * rng.choice((2, 100, 5000))
    elif kind == 4:  # the opcode stays, what follows it changes
        ops[at] = ops[at][:1] + _bytes(ops[at][1:], rng)
    elif kind == 5:
        ops[at] = rng.choice(_SNIPPETS)
    else:
        ops.insert(at, rng.choice(_SNIPPETS))
    return b"".join(ops) + rest


def pickletools_end(content: bytes) -> int:
    """Where the pickle that ``content`` begins with ends. Raises :class:`ValueError` if it is none."""
    file = io.BytesIO(content)
    for _ in pickletools.genops(file):
        pass
    return file.tell()


_LIST_OF_BYTES = {
    *("PROTO", "FRAME", "EMPTY_LIST", "MEMOIZE", "MARK", "SHORT_BINBYTES", "BINBYTES", "APPEND", "APPENDS", "STOP")
}


def _messages(content: bytes, rng: random.Random) -> bytes:
    """A pickled list of byte strings, one of which changes: EPIC-KITCHENS' messages, with protobuf's varints."""
    if {op.name for op, _, _ in pickletools.genops(content)} - _LIST_OF_BYTES:
        raise ValueError("no longer a list of byte strings, or one that is not safe to read here")
    items = pickle.loads(content)
    at = rng.randrange(len(items))
    if isinstance(items[at], bytes) and rng.random() < 0.8:
        tags = (b"\x08", b"\x0a", b"\x0d", b"\x10", b"\x12", b"\x1a", b"\x22", b"\x0b", b"\x0c", b"\x80" * 9 + b"\x01")
        place = rng.randrange(len(items[at]) + 1)
        number = rng.choice((b"\xff" * 9 + b"\x01", b"\xff\xff\xff\xff\x0f", b"\xff\xff\xff\xff\x07", b"\0", b"\x7f"))
        added = rng.choice(tags) + rng.choice((number, b"\0\0\xc0\x7f", b"\0\0\x80\xff", b"\x01\xff", b""))
        items[at] = rng.choice((_bytes(items[at], rng), items[at][:place] + added + items[at][place:]))
    else:
        items[at] = rng.choice((None, 1, "x", b"", [], items, b"\xff" * 4000))
    return pickle.dumps(items)


# --------------------------------------------------------------------------------------------------
# Archives and tables of numbers
# --------------------------------------------------------------------------------------------------


def _zip(content: bytes, rng: random.Random) -> bytes:
    """One member changed, renamed, dropped or doubled, with the archive's own checksums right."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(entry.filename, archive.read(entry)) for entry in archive.infolist() if entry.file_size < _LARGEST]
    at = rng.randrange(len(members))
    name, inside = members[at]
    kind = rng.randrange(8)
    if kind == 0:
        del members[at]
    elif kind == 1:
        members[at] = (rng.choice(_TEXTS).replace("\0", "0")[:2000] or name, inside)
    elif kind == 2:
        members.append((name, rng.choice(members)[1]))
    else:
        members[at] = (name, mutate(inside, name, rng))
    held = io.BytesIO()
    method = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(held, "w", method) as archive:
        for each, inside in members:
            archive.writestr(zipfile.ZipInfo(each.encode("utf-8", "replace").decode()), inside)
    return held.getvalue()


def _gzip(content: bytes, name: str, rng: random.Random) -> bytes:
    """What is packed."""
    return gzip.compress(mutate(gzip.decompress(content), name, rng), mtime=0)


def _safetensors(content: bytes, rng: random.Random) -> bytes:
    """The header as JSON, its length right or not."""
    length = int.from_bytes(content[:8], "little")
    header = _json(content[8 : 8 + length], rng)
    declared = len(header) if rng.random() < 0.9 else rng.choice(_BORDERS) & (1 << 64) - 1
    return declared.to_bytes(8, "little") + header + content[8 + length :]


def _npy(content: bytes, rng: random.Random) -> bytes:
    """The header of an array: its type, order or shape."""
    length = int.from_bytes(content[8:10], "little")
    header = content[10 : 10 + length].decode("latin-1")
    shape = rng.choice(("()", "(-1,)", "(3, 3)", "(1000000000, 1000)", "(2, 2, 2)", "(0,)"))
    kind = rng.choice(("<f8", ">f4", "|O", "<U9", "|S1", "V8", "<c16", "<M8[s]", "x"))
    odd = rng.choice(("{}", "(" * 2000, "[]", "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (3,)}"))
    by_shape = re.sub(r"\([^)]*\)", shape, header)
    by_kind = re.sub(r"'descr': *'[^']*'", f"'descr': '{kind}'", header)
    new = rng.choice((by_shape, by_kind, header.replace("False", rng.choice(("True", "None", "[]"))), odd))
    declared = len(new) if rng.random() < 0.9 else rng.randrange(1 << 16)
    return (
        content[:8]
        + (declared & 0xFFFF).to_bytes(2, "little")
        + new.encode("latin-1", "replace")
        + content[10 + length :]
    )


def _parquet(content: bytes, rng: random.Random) -> bytes:
    """The table of contents, which is at the end."""
    length = int.from_bytes(content[-8:-4], "little")
    footer = _bytes(content[-8 - length : -8], rng)
    declared = len(footer) if rng.random() < 0.9 else rng.choice(_BORDERS) & 0xFFFFFFFF
    return content[: -8 - length] + footer + declared.to_bytes(4, "little") + content[-4:]


def _boxes(content: bytes, rng: random.Random) -> bytes:
    """The size, name or one of the numbers of a box of an MP4."""
    names = rb"moov|mvhd|trak|tkhd|edts|elst|mdia|mdhd|hdlr|minf|stbl|stsd|avc1|avcC|stts|ctts|stss|stsc|stsz|stco|mdat"
    at = rng.choice([match.start() for match in re.finditer(names, content)])
    kind = rng.randrange(6)
    if kind == 0:
        size = rng.choice((*_BORDERS, int.from_bytes(content[at - 4 : at], "big") + rng.randrange(-9, 9)))
        return content[: at - 4] + (size & 0xFFFFFFFF).to_bytes(4, "big") + content[at:]
    if kind == 1:
        return content[:at] + rng.choice((b"free", b"udta", b"moov", b"stsd", b"\0\0\0\0")) + content[at + 4 :]
    place = at + 4 + 4 * rng.randrange(12)
    number = rng.choice(_BORDERS) if kind < 4 else rng.randrange(256)
    return content[:place] + (number & 0xFFFFFFFF).to_bytes(4, "big") + content[place + 4 :]
