"""Where the packages lie; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=find_packages(include=["fastvid", "fastvid.*"]) + ["fastvid_kernels"],
    # kernels/ itself is never a package: Hugging Face's `kernels` has that name, and transformers looks for it.
    package_data={
        "fastvid": ["py.typed"],
        "fastvid.model": ["*.cpp", "*.h"],
        "fastvid_kernels": ["*.cpp", "*.h", "py.typed"],
    },
    package_dir={"fastvid_kernels": "kernels/fastvid_kernels"},
)
