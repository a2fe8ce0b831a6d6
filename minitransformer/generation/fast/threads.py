"""One OpenMP thread for small operations, without a change for other threads of the process.

`torch.set_num_threads` is for all of them. OpenMP's own setting belongs to the thread that sets it (OpenMP 5.2, table
2.2, nthreads-var), and so does MKL's.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def run_with_one_thread(function: Callable[..., T], *arguments: Any) -> T:
    """`function(*arguments)` with operations that use one thread, where torch is built with OpenMP."""
    threads, library = torch.get_num_threads(), _library()
    if threads == 1 or library is None:
        return function(*arguments)
    has_mkl = torch.backends.mkl.is_available()
    before = library.MKL_Set_Num_Threads_Local(1) if has_mkl else 0
    library.omp_set_num_threads(1)
    try:
        return function(*arguments)
    finally:
        library.omp_set_num_threads(threads)
        if has_mkl:
            library.MKL_Set_Num_Threads_Local(before)


@cache
def _library() -> ctypes.CDLL | None:
    """The library through which torch calls OpenMP and MKL, or None without one."""
    for path in (Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"):
        library = ctypes.CDLL(str(path))
        names = ["omp_set_num_threads", *(["MKL_Set_Num_Threads_Local"] if torch.backends.mkl.is_available() else [])]
        if all(hasattr(library, name) for name in names):
            return library
    return None
