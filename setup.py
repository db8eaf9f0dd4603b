"""Placeholder written first so that vadit.kernels can be imported; the kernel layer replaces it."""
from setuptools import setup

setup(
    name="vadit",
    version="0.1.0",
    packages=["vadit", "vadit.recipes", "vadit.models", "vadit.objectives", "vadit.data", "vadit.train", "vadit.eval", "vadit.demo", "vadit.kernels"],
    package_dir={"vadit": "vadit", "vadit.kernels": "kernels/ops"},
    entry_points={"console_scripts": ["vadit=vadit.cli:main"]},
)
