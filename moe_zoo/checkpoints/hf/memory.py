"""Memory that weights are read into: taken over by the CPU backend as it is, paged in by the thread that fills it."""

import ctypes
import math
import mmap

import numpy as np

_POPULATE_WRITE = 23  # of madvise, Linux 5.14
_HAS_POPULATE = hasattr(mmap, "MADV_WILLNEED") and hasattr(mmap, "MAP_POPULATE")  # Linux


def empty(shape, dtype: np.dtype) -> np.ndarray:
    """Zeros that take up no memory until they are written, at the start of a page: JAX on a CPU needs 64 bytes to use
    an array as it is.

    In pages of the usual size. numpy would ask for huge ones, which are cleared in half the time if there are any; but
    a virtual machine that has given its free memory back, or a fragmented one, has to make them first, at up to ten
    times the time (measured).
    """
    size = math.prod(shape) * dtype.itemsize
    anonymous = mmap.mmap(-1, max(1, size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(anonymous, np.uint8, size).view(dtype).reshape(shape)


def touch(array: np.ndarray) -> None:
    """Pages in what a contiguous array lies in, all at once instead of fault by fault: a quarter less time."""
    if not _HAS_POPULATE or not array.flags.c_contiguous or array.nbytes < 1 << 20:
        return
    begin = -(-array.ctypes.data // mmap.PAGESIZE) * mmap.PAGESIZE
    size = array.ctypes.data + array.nbytes - begin
    # through ctypes, which lets the other threads run; older systems say no, and fault as they go
    _madvise()(begin, size, _POPULATE_WRITE)


def _madvise():
    call = ctypes.CDLL(None).madvise
    call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return call
