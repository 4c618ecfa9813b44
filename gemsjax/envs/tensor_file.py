"""Reads one plain tensor out of a PyTorch `.pt` file without PyTorch and without running the program inside the file.

Such a file is a zip archive: raw numbers under `data/`, and `data.pkl`, a small program in Python's object
serialisation that says which numbers form the tensor. Loading that program the ordinary way can run any code; here it
is only read: `pickletools` lists its opcodes, and the few that a plain tensor needs are followed on a stack of our own.
Everything else is refused. Called by `envs.catalogue`.
"""

from __future__ import annotations

import math
import pickletools
import zipfile
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemsjax.errors import DataError

REBUILD = "torch._utils _rebuild_tensor_v2"
NO_HOOKS = "collections OrderedDict"
STORAGES = {"torch FloatStorage": "f4", "torch DoubleStorage": "f8", "torch HalfStorage": "f2"}
MAX_PROGRAM = 4096
"""Bytes; the program of one plain tensor is about 150."""


# Not named tuples: a program can build tuples, and must not be able to build one of these.


@dataclass(frozen=True)
class _Global:
    name: str


@dataclass(frozen=True)
class _Storage:
    dtype: str
    entry: str
    length: int


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Refused(Exception):  # noqa: N818 - turned into a DataError that names the file
    """What was found that does not belong to a plain tensor."""


def read_tensor(path: str | Path) -> np.ndarray:
    """The tensor in a `.pt` file written by `torch.save(tensor, path)`, strides and offset applied.

    Returns:
      An array of its shape, of type float16, float32 or float64.

    Raises:
      DataError: the file is damaged, or is anything else than one dense floating-point tensor (a module, a parameter, a
        dictionary, a file of the format before PyTorch 1.6); the message names what was found.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _read(archive)
    except Exception as error:  # a damaged archive fails in many ways
        raise DataError(
            f"{path}: is not one plain dense tensor as torch.save writes it: {error}. "
            "Save the tensor alone (torch.save(tensor.detach().cpu(), path)), or as .npy"
        ) from error


def _read(archive: zipfile.ZipFile) -> np.ndarray:
    programs = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(programs) != 1:
        raise _Refused(f"{len(programs)} entries named data.pkl")
    root = programs[0].removesuffix("data.pkl")
    tensor = _follow(_entry(archive, programs[0], range(MAX_PROGRAM + 1)))
    order = "little"  # archives older than PyTorch 2.1 do not say
    if root + "byteorder" in archive.namelist():
        order = _entry(archive, root + "byteorder", range(16)).decode("ascii", "replace")
    if order not in ("little", "big"):
        raise _Refused(f"byte order {order!r}")
    dtype = np.dtype(tensor.storage.dtype).newbyteorder("<" if order == "little" else ">")
    size = tensor.storage.length * dtype.itemsize
    raw = _entry(archive, f"{root}data/{tensor.storage.entry}", (size,))
    return _strided(np.frombuffer(raw, dtype).astype(dtype.newbyteorder("=")), tensor)


def _entry(archive: zipfile.ZipFile, name: str, sizes: Container[int]) -> bytes:
    """The bytes of an entry of one of the accepted sizes (checked first: few bytes can claim to hold any number)."""
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED:
        raise _Refused(f"a compressed entry {name}")
    if info.file_size not in sizes:
        raise _Refused(f"an entry {name} of {info.file_size} bytes")
    return archive.read(name)


def _strided(numbers: np.ndarray, tensor: _Tensor) -> np.ndarray:
    """The numbers that the tensor's offset, shape and strides point at, copied."""
    if 0 in tensor.shape or math.prod(tensor.shape) > numbers.size:
        raise _Refused(f"shape {tensor.shape} out of {numbers.size} numbers")
    steps = [(size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True)]
    if tensor.offset + sum(steps) >= numbers.size:
        raise _Refused(f"position {tensor.offset + sum(steps)} out of {numbers.size} numbers")
    strides = [stride * numbers.itemsize if step else 0 for stride, step in zip(tensor.strides, steps, strict=True)]
    return np.lib.stride_tricks.as_strided(numbers[tensor.offset :], tensor.shape, strides).copy()


# -- the program -------------------------------------------------------------------------------------------------------


def _follow(program: bytes) -> _Tensor:
    """What the program describes, if that is one plain tensor."""
    stack: list[Any] = []
    memo: dict[Any, Any] = {}
    for opcode, argument, _ in pickletools.genops(program):
        if opcode.name == "STOP":
            break
        if opcode.name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif opcode.name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif opcode.name in _OPERATIONS:
            _OPERATIONS[opcode.name](stack, argument)
        else:
            raise _Refused(f"opcode {opcode.name}")
    match stack:
        case [_Tensor() as tensor]:
            return tensor
    raise _Refused("something else than a tensor")


_MARK = object()


def _pop(stack: list[Any], count: int) -> tuple[Any, ...]:
    if len(stack) < count:
        raise _Refused("an incomplete program")
    taken = tuple(stack[len(stack) - count :])
    del stack[len(stack) - count :]
    return taken


def _global(stack: list[Any], name: str) -> None:
    if name not in (REBUILD, NO_HOOKS, *STORAGES):
        raise _Refused(f"global {name!r}")
    stack.append(_Global(name))


def _tuple(stack: list[Any], _argument: Any) -> None:
    taken = _pop(stack, stack[::-1].index(_MARK))
    stack[-1] = taken


# No message below shows an argument: a short program can build a tuple whose text would fill the memory.


def _storage(stack: list[Any], _argument: Any) -> None:
    match stack.pop():
        case ("storage", _Global(name=kind), str(entry), str(), int(length)) if kind in STORAGES and entry.isdecimal():
            stack.append(_Storage(STORAGES[kind], entry, length))
        case _:
            raise _Refused("a storage that is not one of " + ", ".join(STORAGES))


def _call(stack: list[Any], _argument: Any) -> None:
    match _pop(stack, 2):
        case (_Global(name=name), ()) if name == NO_HOOKS:
            stack.append(_Global(""))
        case (
            _Global(name=name),
            (_Storage() as storage, int(offset), tuple(shape), tuple(strides), bool(), _Global(name="")),
        ) if name == REBUILD:
            counts = (storage.length, offset, *shape, *strides)
            if not all(type(count) is int and count >= 0 for count in counts):
                raise _Refused("a shape, stride or offset that is not a whole number of at least 0")
            stack.append(_Tensor(storage, offset, shape, strides))
        case (_Global(name=name), _):
            raise _Refused(f"a call of {name!r} with other arguments than a plain tensor has")
        case _:
            raise _Refused("a call of something that is not a function")


def _make_tuple(count: int) -> Callable[[list[Any], Any], None]:
    return lambda stack, _argument: stack.append(_pop(stack, count))


_OPERATIONS: dict[str, Callable[[list[Any], Any], None]] = {
    "PROTO": lambda stack, argument: None,
    "GLOBAL": _global,
    "MARK": lambda stack, argument: stack.append(_MARK),
    **dict.fromkeys(("BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1"), list.append),
    "NEWTRUE": lambda stack, argument: stack.append(True),
    "NEWFALSE": lambda stack, argument: stack.append(False),
    "EMPTY_TUPLE": _make_tuple(0),
    "TUPLE": _tuple,
    "TUPLE1": _make_tuple(1),
    "TUPLE2": _make_tuple(2),
    "TUPLE3": _make_tuple(3),
    "BINPERSID": _storage,
    "REDUCE": _call,
}
