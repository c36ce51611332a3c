"""What is called otherwise now, so that whoever uses an old name is told the new one."""

# Parts of a model, and the flags that give them, were named after their first towers.
PARTS = {
    "llama": "language_model",
    "clip": "vision_encoder",
    "diffusion": "image_decoder",
    "unet": "image_decoder/denoiser",
    "vae": "image_decoder/autoencoder",
    "queries": "dream_queries",
    "condition_projector": "connector",
}
# Settings and arguments of configurations, by their whole paths.
SETTINGS = {
    **{f"config.model.{name}": f"config.model.{part.replace('/', '.')}" for name, part in PARTS.items()},
    "config.model.schedule": "config.model.image_decoder.schedule",
    **{
        f"config.objective.{name}": f"config.model.image_decoder.training.{name}"
        for name in ("noise_offset", "input_perturbation", "snr_gamma", "snr_velocity")
    },
    "argument.diffusion": "argument.decoder",
}
