"""Build the library that stands in for the CUDA runtime, see README.md."""

import importlib.util
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

SOURCES = Path(__file__).parent
# What PyTorch needs of the CUDA runtime, cuBLAS and the driver
NEEDED = re.compile(r" U (\w+)@libcu(?:dart|blas|blasLt)\.so| U (cu[A-Z]\w+)$", re.MULTILINE)
PRODUCT = re.compile("^cublas.*(gemm|gemv|dot|LtMatmul$)", re.IGNORECASE)  # counted as one launch


def obstacle() -> str | None:
    """Return why the library cannot be built here, or None."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        return f"needs Linux on x86-64, found {sys.platform} on {platform.machine()}"
    if (torch.version.cuda or "").split(".")[0] != "13":
        return f"needs PyTorch for CUDA 13, found {torch.__version__}"
    missing = [tool for tool in ("cc", "nm") if not shutil.which(tool)]
    if missing:
        return f"needs {' and '.join(missing)}"
    return None if include() else "needs the package nvidia-cuda-runtime with its headers"


def include() -> Path | None:
    """Return the folder of driver_types.h in NVIDIA's packages, or None."""
    spec = importlib.util.find_spec("nvidia")
    folders = [] if spec is None else [Path(path) / "cu13/include" for path in spec.submodule_search_locations]
    return next((folder for folder in folders if (folder / "driver_types.h").is_file()), None)


def build(folder) -> Path:
    """Build the library in a folder and return its path. `obstacle()` must be None."""
    libraries = (Path(torch.__file__).parent / "lib").glob("*.so")
    symbols = subprocess.run(["nm", "-D", "--undefined-only", *libraries], capture_output=True, text=True).stdout
    names = {max(found) for found in NEEDED.findall(symbols)}
    body = {name: "nullgpu_launch()" if PRODUCT.search(name) else "0" for name in sorted(names)}
    stubs = [f"__attribute__((weak)) int {name}() {{ return {value}; }}\n" for name, value in body.items()]
    source, library = Path(folder) / "stubs.c", Path(folder) / "libnullgpu.so"
    source.write_text("int nullgpu_launch(void);\n" + "".join(stubs))
    major, minor = map(int, torch.version.cuda.split("."))
    # Before C23, int f() may be called with any arguments.
    options = ["-shared", "-fPIC", "-O1", "-w", "-std=gnu17", f"-I{include()}", f"-I{SOURCES}"]
    options += [f"-DNULLGPU_VERSION={1000 * major + 10 * minor}"]
    options += ["-Wl,-soname,libcuda.so.1"]  # PyTorch opens the driver by this name and finds the preloaded library
    subprocess.run(["cc", *options, "-o", library, SOURCES / "runtime.c", source], check=True)
    return library


if __name__ == "__main__":
    sys.exit(obstacle()) if obstacle() else print(build(sys.argv[1]))
