"""The memory of a card that is not there: torch's device ``npu``, with addresses that nobody on the host can read.

Tensors on it have an address in memory that is mapped and may not be touched, so that the system ends a process which takes it
for the host's. What the card has at that address lies elsewhere, and only operators of torch and the fake driver look there. An
operator that is given tensors of a card and of the host fails, as it does on a card.

It is torch's own way to add a device (``PrivateUse1``), which serves one device in a process and cannot be taken back: a worker
installs it, and never the process of pytest.
"""
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree, backend_registration

#: Bytes that a card has in one process. Nothing is given back.
SIZE = 1 << 30
#: A card's allocator aligns to so many bytes.
ALIGNMENT = 512
_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
#: What only makes another tensor of the same memory: the host's own, which looks at no memory.
_VIEWS = ("as_strided", "view", "_reshape_alias")


def _why_not() -> str:
    """Why this process cannot install the device, or an empty string."""
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        return f"torch {torch.__version__} takes no device that is written in Python"
    name = torch._C._get_privateuse1_backend_name()
    return "" if name == "privateuseone" else f"torch has a device {name}"


#: Why there is no such memory in this process, before anything has installed it.
MISSING = _why_not()


class HostMemory:
    """Where ``MISSING`` says why: the host's own memory, which anybody can read."""

    def address_on_host(self, address: int) -> int:
        """The same."""
        return address

    def on_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same."""
        return tensor


class FakeMemory:
    """Installs the device ``npu`` with the module ``torch.npu``. One object in a process.

    ``before_operator`` is called before torch computes anything there, and may raise.
    """

    def __init__(self, module: object, before_operator: Callable[[], None] = lambda: None) -> None:
        self._before_operator = before_operator
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._forbidden, self._content = (mmap.mmap(-1, SIZE, flags=private) for _ in range(2))
        self._begin, self._inside = (ctypes.addressof(ctypes.c_char.from_buffer(one)) for one in (self._forbidden, self._content))
        protect = ctypes.CDLL(None, use_errno=True).mprotect
        assert protect(ctypes.c_void_p(self._begin), ctypes.c_size_t(SIZE), 0) == 0
        self._used = 0
        backend_registration._setup_privateuseone_for_python_backend("npu", backend_module=module)
        self._library = torch.library.Library("aten", "IMPL")
        for name in _VIEWS:
            self._implement(name, functools.partial(getattr(torch.ops.aten, name).default.redispatch, _CPU))
        self._implement("empty.memory_format", self._empty)
        self._implement("empty_strided", self._empty_strided)
        self._implement("_copy_from", self._copy)
        self._others = torch.library.Library("_", "IMPL")
        self._others.fallback(self._computed, "PrivateUse1")

    def address_on_host(self, address: int) -> int:
        """Where that lies which the card has at an address of its own."""
        assert self._begin <= address < self._begin + self._used, "this is no address of the card's"
        return self._inside + address - self._begin

    def on_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """The memory of a card's tensor, as a tensor of the host."""
        storage = tensor.untyped_storage()
        if not storage.nbytes():
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        offset, count = storage.data_ptr() - self._begin, storage.nbytes() // tensor.itemsize
        whole = torch.frombuffer(self._content, dtype=tensor.dtype, offset=offset, count=count)
        return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def _implement(self, name: str, function: Any) -> None:
        self._library.impl(name, function, "PrivateUse1")

    def _empty(self, size: list[int], *, dtype: Any = None, device: Any = None, **_: Any) -> torch.Tensor:
        return self._empty_strided(size, torch.empty(size, device="meta").stride(), dtype=dtype, device=device)

    def _empty_strided(self, size: Any, stride: Any, *, dtype: Any = None, device: Any = None, **_: Any) -> torch.Tensor:
        dtype = dtype or torch.get_default_dtype()
        count = 0 if 0 in size else 1 + sum((extent - 1) * step for extent, step in zip(size, stride, strict=True))
        nbytes = count * dtype.itemsize
        if self._used + nbytes > SIZE:
            raise torch.OutOfMemoryError("NPU out of memory: error code is 207001")
        address = self._begin + self._used
        self._used += nbytes + -nbytes % ALIGNMENT
        return _tensor_at(address, nbytes, device).view(dtype).as_strided(size, stride)

    def _copy(self, source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        self._host_of(target).copy_(self._host_of(source))
        return target

    def _host_of(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.on_host(tensor) if tensor.device.type == "npu" else tensor

    def _computed(self, operator: Any, *arguments: Any, **keywords: Any) -> Any:
        """Any other operator: what the host computes on the card's memory; results that are new lie on the card."""
        self._before_operator()
        leaves, form = _pytree.tree_flatten((arguments, keywords))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        # A scalar of the host's is a number to an operator.
        devices = {tensor.device for tensor in tensors if tensor.device.type == "npu" or tensor.dim()}
        if len(devices) > 1:
            raise RuntimeError(f"{operator}: expected all tensors to be on one device, found {sorted(map(str, devices))}")
        on_host = [self._host_of(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        given = {id(new): old for new, old in zip(on_host, leaves, strict=True) if isinstance(old, torch.Tensor)}
        device = next(tensor.device for tensor in tensors if tensor.device.type == "npu")

        def placed(result: Any) -> Any:
            if not isinstance(result, torch.Tensor):
                return result
            return given[id(result)] if id(result) in given else result.to(device)

        host_arguments, host_keywords = _pytree.tree_unflatten(on_host, form)
        return _pytree.tree_map(placed, operator(*host_arguments, **host_keywords))


class _Described(ctypes.Structure):
    """A tensor of DLPack's, version 0, with its owner's fields behind it (``DLManagedTensor``)."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_index", ctypes.c_int32),
        ("dimensions", ctypes.c_int32),
        ("dtype_code", ctypes.c_uint8),
        ("dtype_bits", ctypes.c_uint8),
        ("dtype_lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


#: torch keeps no copy of a description, and says nothing when it is done with one that has no deleter.
_DESCRIBED: list[_Described] = []
#: DLPack's name of a device that it does not know.
_EXTENSION = 12
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


def _tensor_at(address: int, nbytes: int, device: torch.device) -> torch.Tensor:
    """Bytes of a card's."""
    shape, strides = (ctypes.c_int64 * 1)(nbytes), (ctypes.c_int64 * 1)(1)
    described = _Described(address, _EXTENSION, device.index or 0, 1, 1, 8, 1, shape, strides, 0, None, None)
    _DESCRIBED.append(described)
    return torch.utils.dlpack.from_dlpack(_new_capsule(ctypes.addressof(described), b"dltensor", None))
