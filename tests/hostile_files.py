"""Small files that ask for a lot of memory, and a process that reads them with little.

    python -m tests.hostile_files READER PATH [READER PATH ...]

prints for each the reader's message, its CPU seconds and by how much the process grew.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import resource
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

from egohod.data.config import SourceConfig

MORE_MEMORY = 2 << 30


def limit_memory() -> None:
    """At most ``MORE_MEMORY`` on top of what this process has reserved by now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MORE_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def length(count: int, width: int) -> bytes:
    return count.to_bytes(width, "little")


def text(content: bytes) -> bytes:
    return b"X" + length(len(content), 4) + content


def doubled(times: int) -> bytes:
    """A tuple of two of a tuple of two of ...: a few bytes a level, and twice as much to print."""
    return b")" + b"2\x86" * times


def multiplied(count: int, times: int) -> bytes:
    """A list of the same list over and over, of the same list over and over, ..."""
    return b"]q\x000" + (b"](" + b"h\x00" * count + b"eq\x000") * times + b"h\x00"


SIZES = {
    "a memo index of a billion": b"\x80\x02]r" + length(1 << 30, 4) + b".",
    "a memo index as text": b"(lp1073741823\n.",
    "a text of 4 GB": b"\x80\x02X" + length(2**32 - 2, 4) + b"abc.",
    "a text of a TB": b"\x80\x04\x8d" + length(1 << 40, 8) + b"abc.",
    "bytes of a TB": b"\x80\x04\x8e" + length(1 << 40, 8) + b"abc.",
    "a byte array of a TB": b"\x80\x05\x96" + length(1 << 40, 8) + b"abc.",
    "a number of 2 GB": b"\x80\x02\x8b" + length(2**31 - 1, 4) + b"abc.",
    "a frame of a TB": b"\x80\x04\x95" + length(1 << 40, 8) + b"].",
}
"""Pickles with a length or an index far beyond their content."""

DTYPE = b"cnumpy\ndtype\nX\x02\x00\x00\x00f8\x89\x88\x87R"
ENTRY = b"(" + text(b"v") + b"K\x00K\x02"

ANNOTATIONS = SIZES | {
    "a time of tuples": b"\x80\x02](" + text(b"v") + doubled(40) + b"K\x02" + text(b"cuts") + b"ta.",
    "a text of tuples": b"\x80\x02]" + ENTRY + doubled(40) + b"ta.",
    "a text of lists of one list": b"\x80\x02]" + ENTRY + multiplied(100, 8) + b"ta.",
    "a text of lists of one long list": b"\x80\x02]" + ENTRY + multiplied(50_000, 3) + b"ta.",
    "a key of tuples": b"\x80\x02}" + doubled(40) + b"Ns.",
    "an entry of tuples": b"\x80\x02]" + doubled(40) + b"a.",
    "a text many times": b"\x80\x02]q\x00(" + text(b"a" * 400_000) + b"q\x01" + (ENTRY + b"h\x01t") * 40_000 + b"e.",
    "a type that grows": b"\x80\x02]" + text(b"<" * 200_000) + b"q\x010" + DTYPE + b"(h\x01h\x01tb" * 40_000 + b"a.",
    "copies of bytes": b"\x80\x02](c_codecs\nencode\nq\x01"
    + (text(b"a" * 400_000) + b"q\x02" + text(b"latin1") + b"q\x03\x86R")
    + b"h\x01h\x02h\x03\x86R" * 20_000
    + b"e.",
}

MATRICES = SIZES | {
    "an array of a TB": b"\x80\x02cnumpy\nndarray\n(\x8a\x06" + length(1 << 40, 6) + b"t\x85R.",
    "a filled array": b"\x80\x02cnumpy._core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(\x8a\x05"
    + length(1 << 33, 5)
    + b"tX\x01\x00\x00\x00btR.",
    "arrays of one text": b"\x80\x02](c_codecs\nencode\n" + text(b"a" * 80_000) + text(b"latin1") + b"\x86Rq\x01"
    b"cnumpy._core.numeric\n_frombuffer\nq\x02"
    + DTYPE
    + b"q\x03"
    + (b"h\x02(h\x01h\x03M\x10\x27\x85" + text(b"C") + b"tR") * 40_000
    + b"e.",
}

TENSOR = (
    b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"
)


def tensor(offset: int, size: int, stride: int) -> bytes:
    def number(value: int) -> bytes:
        return b"\x8a\x08" + length(value, 8)

    parts = number(offset) + number(size) + b"\x85" + number(stride) + b"\x85"
    return TENSOR + parts + b"\x89ccollections\nOrderedDict\n)RtR"


def state(value: bytes, name: bytes = b"visual.conv1.weight") -> bytes:
    return b"\x80\x02}" + text(name) + value + b"s."


SAVED = SIZES | {
    "a byte array made": b"\x80\x02c__builtin__\nbytearray\n\x8a\x05" + length(1 << 35, 5) + b"\x85R.",
    "copies of bytes": b"\x80\x02](c_codecs\nencode\nq\x01"
    + (text(b"a" * 400_000) + b"q\x02" + text(b"latin1") + b"q\x03\x86R")
    + b"h\x01h\x02h\x03\x86R" * 20_000
    + b"e.",
    "a key of tuples": b"\x80\x02}" + doubled(40) + b"Ns.",
    "a call of a list of lists": b"\x80\x02" + multiplied(2, 40) + b")R.",
    "a tensor beyond its storage": state(tensor(0, 1 << 36, 1)),
    "a tensor that starts beyond it": state(tensor(1 << 36, 1, 1)),
    "a tensor that strides beyond it": state(tensor(0, 2, 1 << 36)),
}
"""Contents of PyTorch's files."""


def saved_file(content: bytes, archive_of_code: bool = False, compress: bool = False) -> bytes:
    """A zip as ``torch.save`` writes it around a pickle, with one storage of four numbers."""
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED) as archive:
        parts = {"data.pkl": content, "byteorder": b"little", "data/0": bytes(16), "version": b"3\n"}
        for name, part in (parts | ({"code/model.py": b""} if archive_of_code else {})).items():
            archive.writestr(f"archive/{name}", part)
    return held.getvalue()


def older_file(content: bytes) -> bytes:
    """The same in the format before zip, where a storage's description has one more part."""
    content = content.replace(b"K\x04tQ", b"K\x04NtQ")
    head = [pickle.dumps(each, 2) for each in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    return b"".join([*head, content, pickle.dumps(["0"], 2), length(4, 8), bytes(16)])


def write_training(folder: Path, content: bytes) -> Path:
    """A checkpoint folder whose manifest has the hash of its hostile training state."""
    from safetensors.torch import save_file

    folder.mkdir()
    save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
    (folder / "training.pt").write_bytes(content)
    names = ("model.safetensors", "training.pt")
    sums = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    manifest = {"step": 1, "sha256": sums, "identity": {}, "metrics": {}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def _readers() -> dict[str, Callable[[Path], object]]:
    # Its imports within a function are not what is timed.
    import torchvision.models.detection  # noqa: F401

    from egohod.data import detections
    from egohod.data.formats import read_raw
    from egohod.data.formats.ek100 import read_relevancy
    from egohod.hod.detectors.torchvision_boxes import TorchvisionBoxes
    from egohod.model.checkpoints import read_weights
    from egohod.training.checkpoint import open_checkpoint

    return {
        "annotations": lambda path: read_raw(SourceConfig(metadata=str(path), root=".")),
        "detections": lambda path: detections.read_epic(path, 30.0),
        "relevancy": read_relevancy,
        "weights": read_weights,
        "boxes": lambda path: TorchvisionBoxes(str(path), {1: "hand"}),
        "training": open_checkpoint,
    }


def main(arguments: list[str]) -> None:
    from egohod.errors import UserError

    readers = _readers()
    limit_memory()
    results = []
    for reader, path in zip(arguments[::2], arguments[1::2], strict=True):
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        try:
            readers[reader](Path(path))
            message = "read"
        except UserError as error:
            message = str(error)
        except BaseException as error:
            message = f"not a UserError: {error!r}"[:1000]
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        results.append({"message": message, "seconds": time.process_time() - start, "grown_mb": grown})
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1:])
