"""DreamLLM's joint loss composed of the public PyTorch classes, one document at a time: our own reference.

It knows nothing of rows, slots or padding: every document is a sequence of its own.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from dreamllm_jax.interop.names import to_torch
from dreamllm_jax.interop.torch_modules import public_class
from dreamllm_jax.model import DreamLLMConfig
from dreamllm_jax.objectives.joint import Draws, JointConfig
from tests.tiny import TinyDocument, told_sizes

CLIP_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
CLIP_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])


def _projector(config, width_in: int, width_out: int, bias: bool) -> nn.ModuleDict:
    layers = [nn.Linear(width_in, width_out, bias)]
    for _ in range(1, config.depth):
        layers += [nn.GELU(), nn.Linear(width_out, width_out, bias)]
    modules = {"projector": layers[0] if config.kind == "linear" else nn.Sequential(*layers)}
    if config.post_layernorm:
        modules["post_layernorm"] = nn.LayerNorm(width_out, eps=config.layer_norm_eps)
    return nn.ModuleDict(modules)


def _project(projector: nn.ModuleDict, x: torch.Tensor) -> torch.Tensor:
    for name, part in projector.items():
        x = x if name == "pooled_projector" else part(x)
    return x


def _ours(name: str) -> str:
    """A public class's parameter name without the inner module that our tree does not have."""
    name = name.replace("language_model.model.", "language_model.").replace("encoder.vision_model.", "encoder.")
    return name.replace("dream_queries.embedding", "dream_queries.weight")


class TorchDreamLLM(nn.Module):
    """The towers under the names of our parameter tree, holding our weights."""

    def __init__(self, config: DreamLLMConfig, params: dict):
        super().__init__()
        self.config = config
        language, clip, decoder = config.language_model, config.vision_encoder, config.image_decoder
        vae, unet = decoder.autoencoder, decoder.denoiser
        width = language.hidden_size
        causal_lm = public_class(language.public)
        told = causal_lm.config_class(**language.to_public(), attn_implementation="eager")
        self.language_model = causal_lm(told)
        self.vision_encoder = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=clip.hidden_size,
                intermediate_size=clip.intermediate_size,
                num_hidden_layers=clip.num_hidden_layers,
                num_attention_heads=clip.num_attention_heads,
                image_size=clip.image_size,
                patch_size=clip.patch_size,
                hidden_act=clip.hidden_act,
                attn_implementation="eager",
            )
        )
        self.visual_projector = _projector(config.visual_projector, clip.hidden_size, width, bias=True)
        self.dream_queries = nn.ParameterDict({"embedding": torch.zeros(config.num_queries, width)})
        self.connector = _projector(config.connector, width, unet.cross_attention_dim, bias=False)
        if unet.pooled_width:
            pooled = _projector(config.connector, width, unet.pooled_width, config.connector.pooled_bias)
            self.connector["pooled_projector"] = pooled["projector"]
        autoencoder = AutoencoderKL(
            block_out_channels=vae.block_out_channels,
            down_block_types=vae.down_block_types,
            up_block_types=vae.up_block_types,
            layers_per_block=vae.layers_per_block,
            norm_num_groups=vae.norm_num_groups,
            latent_channels=vae.latent_channels,
        )
        denoiser = UNet2DConditionModel(**unet.to_public())
        self.image_decoder = nn.ModuleDict({"autoencoder": autoencoder, "denoiser": denoiser})
        schedule = config.image_decoder.schedule
        self.scheduler = DDPMScheduler(
            num_train_timesteps=schedule.num_train_timesteps,
            beta_start=schedule.beta_start,
            beta_end=schedule.beta_end,
            beta_schedule=schedule.beta_schedule,
            prediction_type=schedule.prediction_type,
        )
        tensors = {
            name: torch.tensor(np.ascontiguousarray(array))
            for part, tree in params.items()
            for name, array in to_torch({part: tree}).items()
        }
        if language.tie_word_embeddings:
            tensors["language_model.lm_head.weight"] = tensors["language_model.embed_tokens.weight"]
        self._public = {_ours(name): name for name in self.state_dict()}
        self.load_state_dict({self._public[name]: tensor for name, tensor in tensors.items()})

    def gradients(self) -> dict[str, np.ndarray]:
        """Gradients under the names of our parameter tree; zero where none arrived."""
        return {
            _ours(name): np.zeros(p.shape, np.float32) if p.grad is None else p.grad.numpy()
            for name, p in self.named_parameters()
        }

    def _hidden(self, tokens: torch.Tensor, inserts: Sequence[tuple[int, torch.Tensor]]) -> torch.Tensor:
        x = self.language_model.get_input_embeddings()(tokens)
        for slot, features in inserts:
            x = torch.cat([x[:slot], features, x[slot + len(features) :]])
        return self.language_model.model(inputs_embeds=x[None]).last_hidden_state[0]

    def _see(self, image: np.ndarray) -> torch.Tensor:
        pixels = (torch.tensor(image).float() / 255 - CLIP_MEAN) / CLIP_STD
        states = self.vision_encoder(pixels.permute(2, 0, 1)[None], output_hidden_states=True).hidden_states
        return _project(self.visual_projector, states[self.config.vision_encoder.select_layer][0, 1:])

    def _null(self, objective: JointConfig) -> torch.Tensor:
        tokens = torch.tensor(self.config.special_tokens.null_document(self.config.num_queries))
        inserts = [(2, self.dream_queries["embedding"])] if objective.null_condition == "queries" else []
        return self._hidden(tokens, inserts)[2 : 2 + self.config.num_queries]

    def joint_loss(self, objective: JointConfig, documents: Sequence[TinyDocument], draws: Sequence[Draws]):
        """The joint loss of documents; `draws` has one entry an image to dream, in order."""
        draws = iter(draws)
        nll, weight, errors = torch.zeros(()), 0.0, []
        for document in documents:
            queries = self.dream_queries["embedding"]
            inserts = [(slot, self._see(image)) for slot, image in document.see]
            inserts += [(slot, queries) for slot, _ in document.dream]
            tokens = torch.tensor(document.tokens).long()
            hidden = self._hidden(tokens, inserts)
            losses = F.cross_entropy(self.language_model.lm_head(hidden[:-1]), tokens[1:], reduction="none")
            weights = torch.tensor(document.weights)[1:]
            nll, weight = nll + (losses * weights).sum(), weight + weights.sum()
            for slot, image in document.dream:
                condition = hidden[slot : slot + self.config.num_queries]
                errors.append(self._error(objective, condition, image, next(draws)))
        lm_loss, dm_loss = nll / weight, torch.stack(errors).mean()
        total = objective.lm_weight * lm_loss + objective.dm_weight * dm_loss
        scale = {
            "none": 1.0,
            "l1_norm": objective.lm_weight + objective.dm_weight,
            "l2_norm": (objective.lm_weight**2 + objective.dm_weight**2) ** 0.5,
        }[objective.scaling]
        return total / scale, lm_loss, dm_loss

    def _error(self, objective: JointConfig, condition: torch.Tensor, image: np.ndarray, draw: Draws):
        def latent(array) -> torch.Tensor:
            return torch.tensor(np.asarray(array)).permute(2, 0, 1)[None]

        training, drawn = self.config.image_decoder.training, draw.decoder
        if draw.drop is not None and bool(draw.drop):
            condition = self._null(objective)
        if objective.detach_condition:
            condition = condition.detach()
        added = None
        if "pooled_projector" in self.connector:  # DreamLLM's head for Stable Diffusion XL
            pooled = self.connector["pooled_projector"](condition.mean(0))[None]
            added = {"text_embeds": pooled, "time_ids": torch.tensor(told_sizes(image))[None]}
        condition = _project(self.connector, condition)[None]
        pixels = (torch.tensor(image).float() / 127.5 - 1).permute(2, 0, 1)[None]
        posterior = self.image_decoder["autoencoder"].encode(pixels).latent_dist
        latents = (
            posterior.mean + posterior.std * latent(drawn.posterior_noise)
        ) * self.config.image_decoder.autoencoder.scaling_factor
        timestep = torch.tensor([int(drawn.timesteps)])
        noise = latent(drawn.noise)
        if training.noise_offset:
            noise = noise + training.noise_offset * latent(drawn.offset_noise)
        given = noise
        if training.input_perturbation:
            given = noise + training.input_perturbation * latent(drawn.perturbation)
        noisy = self.scheduler.add_noise(latents, given, timestep)
        velocity = self.config.image_decoder.schedule.prediction_type == "v_prediction"
        target = self.scheduler.get_velocity(latents, noise, timestep) if velocity else noise
        predicted = self.image_decoder["denoiser"](noisy, timestep, condition, added_cond_kwargs=added).sample
        error = F.mse_loss(predicted, target)
        if training.snr_gamma is not None:
            alpha = self.scheduler.alphas_cumprod[timestep]
            snr = alpha / (1 - alpha) + (1 if velocity else 0)
            error = error * (torch.clamp(snr, max=training.snr_gamma) / snr)[0]
        return error
