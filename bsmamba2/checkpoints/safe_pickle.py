"""Safe unpickling: read `torch.save` files without running or importing anything that they name.

Only containers, numbers, text and tensors are rebuilt. Every other object (NumPy values, paths, a whole model, a call
of `os.system`) becomes a `Skipped`. Time and memory are bounded by the size of the file.

Formats: the zip archive of torch 1.6 and later, and the sequence of pickles that older versions wrote.
"""

from __future__ import annotations

import io
import math
import pickletools
import re
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FunctionType
from typing import Any, BinaryIO

import torch
from torch import Tensor

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


class Skipped:
    """Placeholder for an object that is not rebuilt; `name` identifies it."""

    def __init__(self, name: str) -> None:
        self.name = name


class _Storage(Skipped):
    def __init__(self, content: Tensor, dtype: torch.dtype) -> None:
        super().__init__("a storage without a tensor")
        self.content, self.dtype = content, dtype


def load_pickle(source: Path | BinaryIO) -> Any:
    """Unpickle a `torch.save` file safely, with every tensor on the CPU; objects of other kinds become `Skipped`.

    Args:
        source: a path, or a seekable file that is open for reading.

    Raises:
        ValueError: when the file is truncated or damaged (the CRC-32 checksums are verified), would unpack to far more
            than its own size, or is not from `torch.save`.
        OSError: when the file cannot be opened.
    """
    if isinstance(source, Path):
        with source.open("rb") as file:
            return load_pickle(file)
    try:
        return _load_zip(source) if zipfile.is_zipfile(source) else _load_legacy(source)
    except _Refused:
        raise
    except Exception as error:  # bad bytes raise a dozen kinds, including OSError for a negative offset
        reason = f"{type(error).__name__}: {error!s:.200}".splitlines()[0]
        raise ValueError(f"is truncated or damaged ({reason}): get it again") from error


class _Refused(ValueError):
    """A fault whose message reaches the user unchanged."""


def _load_zip(file: BinaryIO) -> Any:
    length = file.seek(0, io.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        unpacked = sum(entry.file_size for entry in entries.values())
        if unpacked > 4 * length + (1 << 20):
            raise _Refused(f"would unpack from {length:,} to {unpacked:,} bytes: save it again with torch.save")
        name = next((name for name in entries if re.fullmatch("([^/]*/)?data[.]pkl", name)), None)
        if name is None:
            raise _Refused(f"is truncated or damaged, or a zip archive without data.pkl ({len(entries)} entries)")
        root = name.removesuffix("data.pkl")
        if f"{root}constants.pkl" in entries:
            raise _Refused("is a TorchScript archive: save the model's state_dict() with torch.save")
        order = entries.get(f"{root}byteorder")
        if order and _read_entry(archive, order) != sys.byteorder.encode():
            raise _Refused("was saved on a machine of the opposite byte order: convert it there to safetensors")

        def read_storage(key: str, _: int) -> Tensor:
            return _as_tensor(_read_entry(archive, entries[f"{root}data/{key}"]))

        return _Machine(io.BytesIO(_read_entry(archive, entries[name])), read_storage).run()


def _read_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    """Read an entry and check its CRC-32; never reads more bytes than its header states."""
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise _Refused("is compressed as torch.save never does: save it again with torch.save")
    with archive.open(entry) as part:
        return part.read(entry.file_size)


def _load_legacy(file: BinaryIO) -> Any:
    """Read pickles of a magic number, a version, the machine, the object and the storage keys, then the storages."""
    file.seek(0)
    content = io.BytesIO(file.read())  # bounds all reads; reading 2^40 bytes from a file would allocate them
    free = len(content.getbuffer())

    def reserve(_: str, nbytes: int) -> Tensor:  # tensors are views of the storages, filled below
        nonlocal free
        free -= nbytes
        if nbytes < 0 or free < 0:
            raise EOFError("the file ends before its tensors do")
        return torch.zeros(nbytes, dtype=torch.uint8)

    machines = [_Machine(content, reserve) for _ in range(5)]
    magic, _, _, found, keys = (machine.run() for machine in machines)
    if magic != LEGACY_MAGIC:
        raise _Refused("is truncated or damaged, or not from torch.save: save a state dict with torch.save")
    for key in keys:
        storage, _ = machines[3].storages[key], content.read(8)  # the number of elements, as in the pickle
        if len(data := content.read(len(storage))) < len(storage):  # copy_ would repeat a single byte
            raise EOFError("the file ends before its tensors do")
        storage.copy_(_as_tensor(data))
    return found


def _as_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> object:
    """Rebuild a tensor as a view of a storage; strides of 0 cannot make it larger, and as_strided checks bounds."""
    if type(size) is not tuple or type(stride) is not tuple:
        return Skipped("a tensor without a size")
    flat = storage.content.view(storage.dtype)
    lengths = (offset, *size, *stride) if len(size) + len(stride) <= 128 else ("too many",)
    if not all(type(length) is int and 0 <= length < 1 << 48 for length in lengths) or math.prod(size) > flat.numel():
        return Skipped("a tensor larger than its storage")
    tensor = flat.as_strided(size, stride, offset)
    bits = rest[2] if len(rest) > 2 and type(rest[2]) is dict else {}  # after requires_grad and hooks
    tensor = tensor.conj() if bits.get("conj") else tensor  # a view, as `x.conj()` and `x.imag` are
    return torch._neg_view(tensor) if bits.get("neg") else tensor


def _rebuild_from_type(function: Any, _: object, arguments: Any, *__: object) -> object:
    is_call = isinstance(function, FunctionType) and type(arguments) is tuple and len(arguments) <= 16
    return function(*arguments) if is_call else Skipped("a tensor subclass")


_FUNCTIONS: Mapping[tuple[str, str], Callable[..., object]] = {
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): lambda storage, offset, size, stride, grad, hooks, dtype, *bits: (
        _rebuild_tensor(_Storage(storage.content, dtype), offset, size, stride, grad, hooks, *bits)
    ),
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    ("torch._utils", "_rebuild_parameter_with_state"): lambda data, *_: data,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
    ("collections", "OrderedDict"): lambda *_: {},
    ("collections", "defaultdict"): lambda *_: {},
}
_STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128, "ComplexFloatStorage": torch.complex64, "UntypedStorage": torch.uint8,
    "QInt8Storage": torch.int8, "QUInt8Storage": torch.uint8, "QInt32Storage": torch.int32,
}  # fmt: skip


def _find_global(module: object, name: object) -> object:
    """Resolve a global to a data type, a tensor-rebuilding function or a placeholder; nothing is imported."""
    if not isinstance(module, str) or not isinstance(name, str):
        return Skipped("a global without a name")
    if (module, name) in _FUNCTIONS:
        return _FUNCTIONS[module, name]
    if module in ("torch", "torch.cuda", "torch.storage"):
        found = _STORAGES.get(name, vars(torch).get(name))
        if isinstance(found, torch.dtype):
            return found
    return Skipped(f"{module:.100}.{name:.100}")


class _Machine:
    """Pickle's stack machine without classes and sets; only `_FUNCTIONS` are called. `pickletools` decodes the opcodes.

    Python's unpickler would execute any call, allocate 32 GB for a memo index of 2^31, and hash nested tuples in
    exponential time.
    """

    def __init__(self, content: BinaryIO, read_storage: Callable[[str, int], Tensor]) -> None:
        self.content, self.read_storage = content, read_storage
        self.storages: dict[str, Tensor] = {}
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """Run until the opcode STOP, and return the object."""
        for opcode, argument, _ in pickletools.genops(self.content):
            self._step(opcode, argument)
        return self.stack.pop()

    def _step(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        stack, memo = self.stack, self.memo
        match opcode.name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "MARK":
                self.marks.append(len(stack))
            case "POP" if self.marks and self.marks[-1] == len(stack):
                self.marks.pop()
            case "POP" | "BUILD":
                stack.pop()
            case "POP_MARK" | "ADDITEMS":
                self._since_mark()
            case "DUP":
                stack.append(stack[-1])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                if not 0 <= argument < 1 << 32:
                    raise ValueError("a memo index out of range")
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
            case "EMPTY_LIST" | "EMPTY_TUPLE" | "EMPTY_DICT":
                stack.append({"LIST": [], "TUPLE": (), "DICT": {}}[opcode.name[6:]])
            case "EMPTY_SET":
                stack.append(Skipped("a set"))
            case "LIST" | "TUPLE":
                stack.append({"LIST": list, "TUPLE": tuple}[opcode.name](self._since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self._pop(int(opcode.name[5:]))))
            case "DICT":
                items = self._since_mark()
                stack.append({})
                self._add(items)
            case "APPEND" | "SETITEM":
                self._add(self._pop(1 if opcode.name == "APPEND" else 2))
            case "APPENDS" | "SETITEMS":
                self._add(self._since_mark())
            case "GLOBAL" | "STACK_GLOBAL":
                stack.append(_find_global(*(argument.split(" ", 1) if argument else self._pop(2))))
            case "REDUCE":
                self._call(*self._pop(2))
            case "NEWOBJ" | "NEWOBJ_EX":
                self._skip(self._pop(2 if opcode.name == "NEWOBJ" else 3))
            case "OBJ" | "FROZENSET" | "INST":
                self._skip(self._since_mark())
            case "BINPERSID":
                self._storage(stack.pop())
            case _ if opcode.arg is not None and not opcode.stack_before and opcode.name[:3] not in ("EXT", "PER"):
                stack.append(argument)  # a number, text or bytes
            case _:
                raise ValueError(f"opcode {opcode.name}")

    def _pop(self, count: int) -> list[Any]:
        values = self.stack[-count:]
        del self.stack[-count:]
        if len(values) < count:
            raise IndexError("stack is empty")
        return values

    def _since_mark(self) -> list[Any]:
        mark = self.marks.pop()
        values = self.stack[mark:]
        del self.stack[mark:]
        return values

    def _skip(self, values: list[Any]) -> None:
        self.stack.append(Skipped(values[0].name if values and isinstance(values[0], Skipped) else "an object"))

    def _call(self, function: object, arguments: Any) -> None:
        if not isinstance(function, FunctionType) or type(arguments) is not tuple or len(arguments) > 16:
            self._skip([function])
            return
        try:  # always one of _FUNCTIONS
            self.stack.append(function(*arguments))
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            self.stack.append(Skipped(f"a tensor that cannot be rebuilt ({type(error).__name__})"))

    def _add(self, items: list[Any]) -> None:
        """Add items to a list or dict; only keys whose hashes cannot be made to collide: text and small integers."""
        target = self.stack[-1]
        if type(target) is list:
            target.extend(items)
        elif type(target) is dict:
            pairs = zip(items[::2], items[1::2], strict=True)
            target.update((k, v) for k, v in pairs if isinstance(k, str) or (isinstance(k, int) and abs(k) < 1 << 40))

    def _storage(self, reference: object) -> None:
        match reference:
            case ("storage", torch.dtype() as dtype, str() as key, _, int() as count, *_):
                nbytes = count * dtype.itemsize
                if key not in self.storages:
                    self.storages[key] = self.read_storage(key, nbytes)
                if not 0 <= nbytes <= len(self.storages[key]):
                    raise EOFError("a tensor is cut short")
                self.stack.append(_Storage(self.storages[key][:nbytes], dtype))
            case _:
                self.stack.append(Skipped("a persistent object"))
