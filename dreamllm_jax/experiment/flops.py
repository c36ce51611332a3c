"""FLOPs of one training step, from the configuration alone.

Counted are matrix products and convolutions, 2 FLOPs a multiply-accumulate, of the whole batch on all chips together; a
convolution's taps on padding do not count. The backward pass has a product for the gradient of every trained weight,
and one for the gradient of every input that depends on a trained weight: through frozen layers gradients pass on their
way to trained ones, and nothing flows into the layers before the first of them.

Two totals differ:

    model       what the mathematics asks for, without recomputation, attention over the full square of queries and
                keys. Model FLOPs utilisation is defined on it (PaLM, arXiv 2204.02311, appendix B):
                MFU = model FLOPs / (seconds * chips * peak FLOP/s)
    executed    what the compiled program computes: recomputation (`model.remat`, chunks of attention) and rotary
                embedding's product with a permutation included; without the tiles above the diagonal that a causal
                attention kernel skips
"""

from dreamllm_jax.data.batch import SlotGroup
from dreamllm_jax.experiment.experiment import Experiment
from dreamllm_jax.layers.flops import Flops, Tally
from dreamllm_jax.model import DreamLLMConfig


def model_flops(experiment: Experiment) -> float:
    """Model FLOPs of one step: see the module."""
    return sum(part.model for part in step_flops(experiment).values())


def step_flops(experiment: Experiment, platform: str = "tpu") -> dict[str, Flops]:
    """FLOPs of one step by part.

    `vision_encoder` includes the visual projector, and the teacher's of both, `connector` the part before the image
    decoder's own parts, `head` is the product with the vocabulary. Slots for images count whether filled or not, though
    the program skips chunks that are empty on every chip.

    Args:
      platform: what the step is compiled for; "tpu" has attention kernels.
    """
    whole = Tally(experiment.parameters.trained, platform=platform, dtype=experiment.model.dtype)
    return {"joint": _joint, "reconstruction": _reconstruction}[experiment.objective.kind](experiment, whole)


def _joint(experiment: Experiment, whole: Tally) -> dict[str, Flops]:
    model, rows, objective = experiment.model, experiment.rows, experiment.objective
    language_model, shape, trained = model.language_model, experiment.row_shape, whole.trained
    paints, learns_text = objective.dm_weight > 0, objective.lm_weight > 0
    flops: dict[str, Flops] = {}

    # What is read.
    features_live = False
    for group in shape.see:
        encoder, images = whole.part("vision_encoder"), rows.per_step * group.slots
        if not group.stored:
            model.vision_encoder.flops(encoder, images, group.height, group.width, model.remat != "none")
        projector = whole.part("visual_projector", encoder.live)
        model.visual_projector.flops(projector, images, group.tokens, model.vision_encoder.width, language_model.width)
        _add(flops, {"vision_encoder": encoder.total + projector.total})
        features_live |= projector.live

    # The language model, and its document without a prompt.
    live = trained("language_model/embed_tokens/embedding") or features_live
    live |= bool(shape.dream) and trained("dream_queries/embedding") and not model.dream_queries.redrawn
    painted = bool(shape.dream) and paints
    hidden = whole.part("language_model", live)
    reached = learns_text or (painted and not objective.detach_condition)  # by a gradient
    language_model.flops(hidden, rows.per_step, rows.length, model.remat, reached)
    _add(flops, {"language_model": hidden.total})
    if painted and objective.drop_prob:
        null, length = whole.part("language_model", live), len(model.special_tokens.null_document(model.num_queries))
        language_model.flops(null, rows.microbatches, length, model.remat, not objective.detach_condition)
        _add(flops, {"language_model": null.total})
    if learns_text:
        head = whole.part("language_model", hidden.live)
        language_model.head_flops(head, rows.per_step * rows.length)
        _add(flops, {"head": head.total})

    # What is painted.
    for group in shape.dream if paints else ():
        decoder, images = model.image_decoder, rows.per_step * group.slots
        connector = whole.part("connector", hidden.live and not objective.detach_condition)
        widths = language_model.width, decoder.condition_width, decoder.pooled_width
        model.connector.flops(connector, images, model.num_queries, *widths, model.remat != "none")
        _add(flops, {"connector": connector.total})
        if decoder.encodes_features and not group.stored:
            target = Tally(lambda _: False, platform=whole.platform, dtype=whole.dtype)  # no gradient goes there
            projected = decoder.encodes_features == "visual_projector"
            _add(flops, {"vision_encoder": _seen(model, target, images, group, projected).total})
        of_decoder = decoder.flops(
            whole.part("image_decoder"),
            images,
            group.height,
            group.width,
            model.connector.condition_tokens(model.num_queries),
            connector.live,
            bool(group.stored),
        )
        _add(flops, of_decoder)
    return flops


def _reconstruction(experiment: Experiment, whole: Tally) -> dict[str, Flops]:
    model, flops = experiment.model, {}
    for group in experiment.row_shape.dream:
        images = experiment.rows.per_step * group.slots
        encoder = whole.part("vision_encoder")
        model.vision_encoder.flops(encoder, images, group.height, group.width, model.remat != "none")
        projector = whole.part("visual_projector", encoder.live)
        tokens, widths = _features(model, group)
        model.visual_projector.flops(projector, images, tokens, *widths)
        _add(flops, {"vision_encoder": encoder.total + projector.total})
        if model.teacher:
            taught = Tally(lambda _: False, platform=whole.platform, dtype=whole.dtype)
            _add(flops, {"vision_encoder": _seen(model, taught, images, group, True).total})
        size, tally = (group.height, group.width), whole.part("image_decoder")
        _add(flops, model.image_decoder.reconstruction_flops(tally, images, *size, projector.live))
    return flops


def _features(model: DreamLLMConfig, group: SlotGroup) -> tuple[int, tuple[int, int]]:
    """How many features the vision encoder makes of an image to paint, and widths into and out of the projector."""
    widths = model.vision_encoder.width, model.language_model.width
    return model.vision_encoder.tokens(group.height, group.width), widths


def _seen(model: DreamLLMConfig, tally: Tally, images: int, group: SlotGroup, projected: bool) -> Tally:
    """The tally, with the way of so many images to their features, perhaps through the visual projector."""
    model.vision_encoder.flops(tally, images, group.height, group.width, model.remat != "none")
    if projected:
        tokens, widths = _features(model, group)
        model.visual_projector.flops(tally, images, tokens, *widths)
    return tally


def _add(flops: dict[str, Flops], more: dict[str, Flops]) -> None:
    for name, part in more.items():
        flops[name] = flops.get(name, Flops()) + part
