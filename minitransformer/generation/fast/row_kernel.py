"""Products of a few rows with stored weights, in C++ that is compiled once for a machine (`row_product.cpp`)."""

from __future__ import annotations

import hashlib
import platform
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from minitransformer.toolchain import cache_folder, find_compiler

SOURCE = Path(__file__).with_name("row_product.cpp")
LEVELS = {"AVX2": ["-march=x86-64-v3"], "AVX512": ["-march=x86-64-v4"]}
"""flags by what torch says a processor can do; others compile for every processor of their kind"""
# Not -ffast-math: a library that was linked with it lets the whole process take subnormal numbers for 0.
FLAGS = ["-std=c++20", "-O3", "-ffp-contract=fast", "-fPIC", "-shared", "-DTORCH_TARGET_VERSION=0x020a000000000000"]


class CannotCompile(Exception):
    """Why there is no kernel, as a clause that follows "as"."""


def prepare(report: Callable[[str], None]) -> None:
    """Load `torch.ops.minitransformer.row_product`, compiled first if it never was, which `report` announces.

    Raises `CannotCompile`.
    """
    _load(_built(report))


@cache
def _load(library: Path) -> None:
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise CannotCompile(f"{library} cannot be loaded ({str(error).splitlines()[0]})") from None


def _built(report: Callable[[str], None]) -> Path:
    """The library for this source, torch version and processor, which are hashed into its name."""
    capability = torch.backends.cpu.get_cpu_capability()
    what = SOURCE.read_bytes() + repr((FLAGS, torch.__version__, platform.platform(), capability)).encode()
    folder = cache_folder()
    library = folder / f"row_product-{hashlib.sha256(what).hexdigest()[:16]}.so"
    if not library.exists():
        compiler = find_compiler()
        if compiler is None:
            raise CannotCompile("there is no C++ compiler, g++ or clang++")
        report(f"compiling a kernel with {compiler}, once for this machine: a few seconds")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                made = Path(scratch) / library.name
                _compile(compiler, [*FLAGS, *LEVELS.get(capability, [])], made)
                made.replace(library)  # atomic, so that no process loads a part of it
        except OSError as error:
            raise CannotCompile(f"{folder} cannot be written ({error.strerror})") from None
    return library


def _compile(compiler: str, flags: list[str], library: Path) -> None:
    root = Path(torch.__file__).parent
    links = [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]
    command = [compiler, *flags, f"-I{root / 'include'}", str(SOURCE), "-o", str(library), *links]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), f"exit code {done.returncode}")
        raise CannotCompile(f"{compiler} cannot compile it ({first})")
