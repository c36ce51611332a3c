"""Times the same step as `joint_step`, in PyTorch: transformers and diffusers, SDPA, torch.compile, bfloat16.

    python -m benchmarks.joint_step_torch --size=1b --rows=4

Each row holds one document, so that its attention is plainly causal: PyTorch's fastest case.
"""

import time

import diffusers
import torch
import transformers

from benchmarks import torch_models
from benchmarks.shapes import experiment, parser, random_batch, report
from benchmarks.torch_models import DEVICE, wait
from dreamllm_jax.towers.vision_encoders.clip import MEAN, STD


class JointStep(torch.nn.Module):
    """The joint loss of rows whose slots are all filled and stand at the same places."""

    def __init__(self, settings, batch):
        super().__init__()
        model, self.rows = settings.model, settings.rows
        llama, clip, unet, vae = (
            model.language_model,
            model.vision_encoder,
            model.image_decoder.denoiser,
            model.image_decoder.autoencoder,
        )
        self.llama = torch_models.llama(llama)
        self.llama.config.use_cache = False
        self.llama.gradient_checkpointing_enable()
        self.visual_projector = torch.nn.Linear(clip.hidden_size, llama.hidden_size)
        self.connector = torch.nn.Linear(llama.hidden_size, unet.cross_attention_dim, bias=False)
        self.queries = torch.nn.Parameter(0.02 * torch.randn(model.num_queries, llama.hidden_size))
        frozen = torch.nn.ModuleDict()
        frozen["vision_encoder"] = transformers.CLIPVisionModel(
            transformers.CLIPVisionConfig(
                hidden_size=clip.hidden_size,
                intermediate_size=clip.intermediate_size,
                num_hidden_layers=clip.depth,  # no layer beyond the hidden state that is read
                num_attention_heads=clip.num_attention_heads,
                image_size=clip.image_size,
                patch_size=clip.patch_size,
                attn_implementation="sdpa",
            )
        )
        frozen["unet"] = torch_models.unet(unet)
        frozen["vae"] = diffusers.AutoencoderKL(
            block_out_channels=vae.block_out_channels,
            down_block_types=vae.down_block_types,
            up_block_types=vae.up_block_types,
            layers_per_block=vae.layers_per_block,
            latent_channels=vae.latent_channels,
        )
        del frozen["vae"].decoder
        self.frozen = frozen.to(torch.bfloat16).requires_grad_(False).eval()
        self.scaling = vae.scaling_factor
        alphas = diffusers.DDPMScheduler(
            num_train_timesteps=model.image_decoder.schedule.num_train_timesteps,
            beta_start=model.image_decoder.schedule.beta_start,
            beta_end=model.image_decoder.schedule.beta_end,
            beta_schedule="scaled_linear",
        ).alphas_cumprod
        self.register_buffer("alphas", alphas)
        for name in ("see", "dream"):
            slots = torch.as_tensor(getattr(batch, name)[0].at[0]).long()
            tokens = clip.num_patches if name == "see" else model.num_queries
            self.register_buffer(f"{name}_index", (slots[:, None] + torch.arange(tokens)).flatten())
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None])
        self.register_buffer("std", torch.tensor(STD)[:, None, None])

    def features(self, images):
        pixels = (images.permute(0, 3, 1, 2) / 255 - self.mean) / self.std
        return self.frozen["vision_encoder"](pixels.to(torch.bfloat16)).last_hidden_state[:, 1:]

    def latents(self, images):
        pixels = (images.permute(0, 3, 1, 2) / 127.5 - 1).to(torch.bfloat16)
        return self.frozen["vae"].encode(pixels).latent_dist.sample().float() * self.scaling

    def forward(self, tokens, weights, see_images, dream_images):
        rows = tokens.shape[0]
        with torch.no_grad():
            features, latents = self.features(see_images), self.latents(dream_images)
        x = self.llama.model.embed_tokens(tokens)
        x = x.index_copy(1, self.see_index, self.visual_projector(features).reshape(rows, -1, x.shape[-1]).to(x.dtype))
        queries = self.queries.repeat(self.rows.dream_slots, 1).expand(rows, -1, -1)
        x = x.index_copy(1, self.dream_index, queries.to(x.dtype))
        hidden = self.llama.model(inputs_embeds=x).last_hidden_state
        logits = self.llama.lm_head(hidden[:, :-1]).float()
        nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        lm_loss = (nll * weights[:, 1:].flatten()).sum() / weights.sum()

        condition = hidden[:, self.dream_index].reshape(len(dream_images), -1, hidden.shape[-1])
        condition = self.connector(condition)
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, len(self.alphas), (len(latents),), device=latents.device)
        alphas = self.alphas[timesteps][:, None, None, None]
        noisy = alphas.sqrt() * latents + (1 - alphas).sqrt() * noise
        predicted = self.frozen["unet"](noisy.to(torch.bfloat16), timesteps, condition).sample
        return lm_loss + 10 * torch.nn.functional.mse_loss(predicted.float(), noise)


def main() -> None:
    flags = parser(__doc__.splitlines()[0])
    flags.add_argument("--no_compile", action="store_true", help="without torch.compile")
    arguments = flags.parse_args()
    settings = experiment(arguments)
    batch = random_batch(settings)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    with torch.device(DEVICE):
        model = JointStep(settings, batch).to(DEVICE)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0, fused=DEVICE == "cuda")
    forward = model if arguments.no_compile else torch.compile(model)
    inputs = [
        torch.as_tensor(x).to(DEVICE)
        for x in (
            batch.tokens.astype("int64"),
            batch.loss_weights,
            batch.see[0].images.reshape(-1, *batch.see[0].images.shape[2:]),
            batch.dream[0].images.reshape(-1, *batch.dream[0].images.shape[2:]),
        )
    ]

    def step():
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = forward(*inputs)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    began = time.monotonic()
    for _ in range(2):
        loss = step()
    wait()
    compile_seconds, began = time.monotonic() - began, time.monotonic()
    for _ in range(arguments.steps):
        loss = step()
    wait()
    seconds = (time.monotonic() - began) / arguments.steps
    cuda = DEVICE == "cuda"
    measured = {
        "program": "torch",
        "torch": torch.__version__,
        "loss": loss.item(),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else 0,
        "compile_seconds": compile_seconds,
    }
    report(arguments, settings, torch.cuda.get_device_name() if cuda else "cpu", 1, seconds, **measured)


if __name__ == "__main__":
    main()
