"""What public networks see in pictures, for FID and CLIP score; their weights are local files, and torch runs them."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dreamllm_jax.data import images

Features = Callable[[np.ndarray], np.ndarray]  # u8[N, H, W, 3] -> f32[N, D]
Similarity = Callable[[Sequence[np.ndarray], Sequence[str]], np.ndarray]  # u8[H, W, 3] each, captions -> f32[N]


def inception(file: str | Path) -> Features:
    """The network in a TorchScript file, such as `inception-2015-12-05.pt`.

    That is the Inception of the FID paper as NVIDIA's StyleGAN and clean-fid use it: it resizes by itself and gives
    2048 features. Any other is taken that gives features f32[N, D] of pixels u8[N, 3, H, W] with
    `return_features=True`.

    Raises:
      FileNotFoundError, ValueError, ImportError: there is none, it cannot be read, or torch is not installed.
    """
    torch = _torch()
    if not Path(file).is_file():
        raise FileNotFoundError(f"the weights {file} are missing")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the weights are published in this form
            network = torch.jit.load(str(file), map_location="cpu").eval()
    except RuntimeError as error:
        raise ValueError(f"{file} is not a TorchScript file: {str(error).splitlines()[0]}") from None

    def features(pixels: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return network(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()), return_features=True).float().numpy()

    return features


def of_files(files: Sequence[Path], features: Features, size: int = 0, batch: int = 32) -> np.ndarray:
    """Features f32[N, D] of pictures in files.

    Args:
      size: their shorter side is made so long and the centre cropped, where the pictures are not alike; 0 for not.

    Raises:
      ImageError: one of them cannot be decoded.
      ValueError: they are of different sizes.
    """
    found = []
    for start in tqdm(range(0, len(files), batch), unit=f"{batch} pictures"):
        pictures = [images.decode_named(file.read_bytes(), file) for file in files[start : start + batch]]
        pixels = [images.paint_pixels(one, size, size) if size else np.asarray(one) for one in pictures]
        if len({one.shape for one in pixels}) > 1:
            raise ValueError(f"{files[start]} and those after it are of different sizes: give --size")
        found.append(features(np.stack(pixels)))
    return np.concatenate(found)


def clip_similarity(directory: str | Path) -> Similarity:
    """The cosines between pictures and their captions, by the CLIP in a local folder of transformers.

    Raises:
      FileNotFoundError, ImportError: there is none, or torch is not installed.
    """
    torch = _torch()
    if not (Path(directory) / "config.json").is_file():
        raise FileNotFoundError(f"{directory} has no config.json: it is not a CLIP as transformers keeps it")
    from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

    model = CLIPModel.from_pretrained(directory, local_files_only=True).eval()
    processor = CLIPImageProcessorPil.from_pretrained(directory, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    longest = model.config.text_config.max_position_embeddings

    def similarity(pixels: Sequence[np.ndarray], captions: Sequence[str]) -> np.ndarray:
        seen = processor(images=list(pixels), return_tensors="pt")
        read = tokenizer(list(captions), padding=True, truncation=True, max_length=longest, return_tensors="pt")
        with torch.no_grad():
            found = model(**read, **seen)
        return (found.text_embeds * found.image_embeds).sum(-1).numpy()

    return similarity


def _torch():
    try:
        import torch
    except ModuleNotFoundError:
        raise ImportError("FID and CLIP score run their networks in torch: pip install 'dreamllm_jax[torch]'") from None
    return torch
