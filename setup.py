"""Build of the compiled extension: CMake through scikit-build-core's setuptools plugin. No torch is needed.

Everything else is in pyproject.toml; what is compiled, and how, in CMakeLists.txt.
"""

from setuptools import setup

setup(cmake_source_dir=".")
