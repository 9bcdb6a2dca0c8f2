"""Builds the native kernels when the package is installed; all else is in pyproject.toml.

Without a C++ compiler installing succeeds too: `trivium doctor` then says what is lost.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

_BUILD = Path(__file__).parent / "src" / "trivium" / "kernels" / "build.py"


class BuildWithKernels(build_py):
    """The Python files, then the libraries: beside their sources when editable, into the wheel otherwise."""

    def run(self) -> None:
        """Build both."""
        super().run()
        spec = importlib.util.spec_from_file_location("trivium_kernels_build", _BUILD)
        if spec is None or spec.loader is None:
            raise FileNotFoundError(f"{_BUILD}: the sources are incomplete")
        kernels = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(kernels)
        folder = kernels.SOURCES if self.editable_mode else Path(self.build_lib) / "trivium" / "kernels" / "native"
        kernels.build(folder, compiler=os.environ.get("CXX"), jobs=os.cpu_count() or 1)


class NativeDistribution(Distribution):
    """A wheel with libraries in it is for one platform."""

    def has_ext_modules(self) -> bool:
        """Always."""
        return True


setup(cmdclass={"build_py": BuildWithKernels}, distclass=NativeDistribution)
