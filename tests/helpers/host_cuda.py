"""CUDA sources whose arithmetic also compiles as C++, so that it is tried where there is no GPU."""

import ctypes
import shutil
import subprocess
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

import pytest


def compile_host(folder: Path, source: str, defines: Mapping[str, int]) -> ctypes.CDLL:
    """A library of ``source``, which may include files of ``subspec/kernels/csrc``."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler to try the CUDA source's arithmetic with")
    name = "_".join(["host", *(f"{key}{value}" for key, value in defines.items())])
    code, library = folder / f"{name}.cpp", folder / f"{name}.so"
    code.write_text(source)
    settings = [f"-D{key}={value}" for key, value in defines.items()]
    include = f"-I{resources.files('subspec.kernels').joinpath('csrc')}"
    options = ["-O1", "-ffp-contract=off", "-shared", "-fPIC", *settings, include]
    subprocess.run([compiler, *options, "-o", str(library), str(code)], check=True)
    return ctypes.CDLL(str(library))
