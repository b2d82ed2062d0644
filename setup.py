"""The native extension; everything else about the package is in pyproject.toml.

Without a compiler the install succeeds all the same; jsparse then computes with XLA, and says so when it first does.
"""

import os
import sys
from glob import glob

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class BuildNative(build_ext):
    """`build_ext` that finds XLA's headers in jaxlib and says in a line what is lost where it cannot build."""

    def build_extension(self, ext):
        try:
            import jaxlib

            ext.include_dirs.append(f"{jaxlib.__path__[0]}/include")
            super().build_extension(ext)
        except Exception as error:
            for stale in glob("cpu_kernels/_native*.so"):
                os.remove(stale)
            reason = str(error).partition("\n")[0]
            print(f"jsparse: the native CPU kernels were not built, XLA will be used: {reason}", file=sys.stderr)


setup(
    cmdclass={"build_ext": BuildNative},
    ext_modules=[
        Extension(
            "cpu_kernels._native",
            sources=sorted(glob("cpu_kernels/native/*.cc")),
            depends=sorted(glob("cpu_kernels/native/*.h") + glob("cpu_kernels/native/**/*.inc", recursive=True)),
            extra_compile_args=["-std=c++17", "-O3", "-ffp-contract=fast", "-fvisibility=hidden", "-Wno-psabi"],
            define_macros=[("Py_LIMITED_API", "0x030B0000")],
            py_limited_api=True,
            optional=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
