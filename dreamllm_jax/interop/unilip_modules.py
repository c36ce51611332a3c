"""PyTorch's side of a comparison with a checkpoint of UniLIP: compositions of public classes in its program's place."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreamllm_jax.interop import vision_language_modules
from dreamllm_jax.interop.torch_modules import public_class, require_same_tensors
from dreamllm_jax.interop.unilip import AUTOENCODER, DENOISER, PREFIXES, QUERIES
from dreamllm_jax.interop.vision_language_modules import stored_tensors
from dreamllm_jax.model import DreamLLMConfig
from dreamllm_jax.towers.autoencoders.unilip import UnilipAutoencoderConfig
from dreamllm_jax.towers.image_decoders.sana_transformer import SanaTransformerConfig

if TYPE_CHECKING:
    from torch import nn


def loaders(
    config: DreamLLMConfig, directory: Path, settings: Mapping[str, Any]
) -> dict[str, Callable[[], "nn.Module"]]:
    """Part -> what loads its torch module. Errors as of `torch_modules.pretrained`."""
    from torch import nn

    def own(module: Callable[[], nn.Module], prefixes: Mapping[str, str]) -> Callable[[], nn.Module]:
        """What loads a module: the beginnings of names in the file -> those in the module."""

        def load() -> nn.Module:
            stored, made = {}, module()
            for name, tensor in stored_tensors(directory).items():
                for prefix, instead in prefixes.items():
                    if name.startswith(prefix):
                        stored[instead + name.removeprefix(prefix)] = tensor
            named = made.state_dict()
            shapes = [(name, stored[name].shape, named[name].shape) for name in named.keys() & stored.keys()]
            require_same_tensors(directory, named.keys() - stored.keys(), stored.keys() - named.keys(), shapes)
            made.load_state_dict(stored, assign=True)
            return made

        return load

    decoder = config.image_decoder
    return vision_language_modules.loaders(config, directory, settings) | {
        "dream_queries": lambda: nn.ParameterDict({"weight": stored_tensors(directory)[QUERIES][0]}),
        "connector": own(lambda: connector(config), {PREFIXES["layers"]: "", PREFIXES["projector"]: "projector."}),
        DENOISER: own(lambda: denoiser(decoder.denoiser), {PREFIXES["denoiser"]: ""}),
        AUTOENCODER: own(lambda: autoencoder(decoder.autoencoder), {PREFIXES["autoencoder"]: ""}),
    }


def connector(config: DreamLLMConfig) -> "nn.Module":
    """Layers of a `Qwen2Model` that see each other in both directions, its norm, and a linear layer."""
    import torch
    from torch import nn

    language, layers = config.language_model, config.connector.num_hidden_layers
    settings = language.to_public() | {"num_hidden_layers": layers, "vocab_size": 1}
    form = language.public
    causal = public_class(form)
    model = causal(causal.config_class(**settings, attn_implementation="eager")).model

    class Connector(nn.Module):
        """What is read and the queries, f[N, T, E] -> {"sequence": f[N, T, C]}."""

        def __init__(self):
            super().__init__()
            self.layers, self.norm, self.whole = model.layers, model.norm, [model]  # without the embedding
            self.projector = nn.Linear(language.width, config.image_decoder.condition_width)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            mask = x.new_zeros(len(x), 1, x.shape[1], x.shape[1])
            (whole,) = self.whole
            x = whole(inputs_embeds=x, attention_mask=mask, use_cache=False).last_hidden_state
            return {"sequence": self.projector(x)}

    return Connector()


def denoiser(config: SanaTransformerConfig) -> "nn.Module":
    """diffusers' SANA, its table of positions rounded as the program's weights are."""
    import torch

    module = public_class(config.public)(**config.to_public())
    if config.narrow_positions:
        module.patch_embed.pos_embed = module.patch_embed.pos_embed.to(torch.bfloat16).float()
    return module


def autoencoder(config: UnilipAutoencoderConfig) -> "nn.Module":
    """Perceptrons, and the decoder of diffusers' `AutoencoderDC`."""
    import torch
    from torch import nn

    width, channels = config.feature_width, config.latent_channels

    class Block(nn.Module):
        """x plus a perceptron of it."""

        def __init__(self):
            super().__init__()
            norm, linear = nn.LayerNorm(width, eps=1e-6), nn.Linear
            self.mlp = nn.Sequential(norm, linear(width, width), nn.GELU(), linear(width, width))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.mlp(x)

    class Autoencoder(nn.Module):
        """Features -> unscaled latents -> pictures."""

        def __init__(self):
            super().__init__()
            self.down_blocks = nn.ModuleList(Block() for _ in range(config.blocks))
            layers = nn.Linear(width, channels), nn.GELU(), nn.Linear(channels, channels)
            self.down_mlp = nn.Sequential(nn.LayerNorm(width), *layers)
            self.decoder = public_class(config.decoder.public)(**config.decoder.to_public()).decoder

        def encode(self, features: torch.Tensor) -> torch.Tensor:
            for block in self.down_blocks:
                features = block(features)
            side = round(features.shape[1] ** 0.5)
            return self.down_mlp(features).transpose(1, 2).unflatten(2, (side, side))

        def decode(self, latents: torch.Tensor) -> torch.Tensor:
            size = [side * config.downscale for side in latents.shape[2:]]
            return nn.functional.interpolate(self.decoder(latents), size, mode="bilinear", align_corners=False)

    return Autoencoder()
