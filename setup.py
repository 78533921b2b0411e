"""Where the packages lie; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=find_packages(include=["fastvid", "fastvid.*"]) + ["fastvid_kernels"],
    # kernels/ itself is never a package: Hugging Face's `kernels` has that name, and transformers looks for it.
    package_data={package: ["*.cpp", "*.h"] for package in ("fastvid.model", "fastvid_kernels")},
    package_dir={"fastvid_kernels": "kernels/fastvid_kernels"},
)
