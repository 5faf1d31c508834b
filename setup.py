"""Packaging. Versions that are known to work together are in constraints.txt."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "megatron_irl/__init__.py").read_text())[1]

setup(
    name="megatron-irl",
    version=VERSION,
    description="Reward learning from demonstrations on Megatron-Core (SFT, SPIN, IRFT, RFT)",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.12",
    packages=find_packages(include=["megatron_irl", "megatron_irl.*"]),
    package_data={"megatron_irl.run": ["*.html"]},
    entry_points={"console_scripts": ["megatron-irl=megatron_irl.cli:main"]},
    install_requires=[
        "torch>=2.9",
        "megatron-core>=0.19.2,<0.20",
        "einops",  # needed by megatron-core at run time, not declared by it
        "psutil",  # likewise, by its checkpoint writer
        "tqdm",  # likewise, by its inference engine
        "transformers>=4.57",
        "safetensors",
        "sentencepiece",
        "protobuf",  # transformers reads SentencePiece models through it
        "numpy",
        "pyarrow",
        "datasets",  # folders of save_to_disk
        "pyyaml",
        "jinja2",
        "matplotlib",
        "tensorboard",
        "wandb",
    ],
    extras_require={
        # Apex is not here: PyPI's "apex" is an unrelated web toolkit. NVIDIA's Apex and a
        # Transformer Engine built for the GPU come with NVIDIA's PyTorch container.
        "gpu": ["transformer-engine[pytorch]>=2.9", "flash-attn>=2.7.3"],
        # For ``evaluate --tasks``. Not in dev: it brings scikit-learn, SciPy and fifteen thousand
        # task files, and minutes of installing; the tests that need it are skipped without it.
        "lm-eval": ["lm-eval>=0.4.13"],
        "demo": ["gguf", "reasoning-gym", "accelerate"],
        "dev": [
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "hypothesis",
            "pandas",
            "peft",
            "trl",
            "ruff",
            "pyright",
            "gguf",
            "reasoning-gym",
            "accelerate",
        ],
    },
)
