"""Where the packages lie; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["fastvid", "fastvid.*"]), "fastvid_kernels", "fastvid_kernels.cpu"],
    # kernels/ itself is never a package: Hugging Face's `kernels` has that name, and transformers looks for it.
    package_data={
        "fastvid": ["py.typed"],
        "fastvid.data": ["*.jinja"],
        "fastvid.serving": ["*.css", "*.html", "*.js"],
        "fastvid.weights": ["*.md"],
        "fastvid_kernels": ["py.typed"],
        "fastvid_kernels.cpu": ["*.cpp", "*.h"],
    },
    package_dir={"fastvid_kernels": "kernels/fastvid_kernels"},
)
