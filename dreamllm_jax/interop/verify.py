"""Whether a model of ours and a PyTorch directory compute the same: equal inputs through both, tower by tower.

Torch's side are the public classes of transformers and diffusers, on the CPU. The towers take turns, each first in
torch and then here, so that memory holds one tower of one side.
"""

import contextlib
import dataclasses
import functools
import gc
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from dreamllm_jax.data.positions import grid_of, place
from dreamllm_jax.interop.files import import_torch
from dreamllm_jax.interop.sampling import compare_sampling
from dreamllm_jax.interop.source import config_of
from dreamllm_jax.interop.torch_side import torch_side
from dreamllm_jax.model import DreamLLM, DreamLLMConfig, painted_from
from dreamllm_jax.towers.condition import Condition
from dreamllm_jax.towers.registry import ImageDecoderConfig

if TYPE_CHECKING:
    import torch
    from torch import nn

FLOAT32_LIMIT = 1e-5
ROUNDING_FACTOR, BFLOAT16_LIMIT = 2.0, 1e-3

DENOISER, AUTOENCODER = "image_decoder/denoiser", "image_decoder/autoencoder"

Values = dict[str, np.ndarray]  # the inputs, and "tower/output" as they are computed; float32 or int32


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far a tower of ours is from torch's; of several outputs, that of the one nearest to its limit or past it.

    Attributes:
      tower: "language model", "vision encoder", "connector", "denoiser", "autoencoder", "multimodal forward" or
        "scheduler".
      dtype: what ours computed in, "float32" or "bfloat16"; "any" of the scheduler, which has no weights.
      largest: largest absolute difference from torch's float32 result (or float64, see `compare`).
      relative: L2 norm of the difference / L2 norm of that result.
      limit: the relative difference that is allowed.
    """

    tower: str
    dtype: str
    largest: float
    relative: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.relative <= self.limit < math.inf  # infinite where torch's own result is not a number


def compare(
    config: DreamLLMConfig,
    params: Callable[[str], Mapping[str, Any]],
    directory: Path,
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    towers: Mapping[str, Path | None] = MappingProxyType({}),
) -> list[Difference]:
    """Runs every tower that the directory has on the same inputs in torch and here.

    Our weights are first rounded to the type that torch's are stored in, so that an export in bfloat16 is judged by
    what it computes and not by the digits it was not given. In float32 the relative difference may be `FLOAT32_LIMIT`;
    where a model amplifies rounding more than that, ours may be `ROUNDING_FACTOR` times as far from torch's float64
    result as torch's own float32 result is. In bfloat16, weights and computation, it is so with torch's float32 and
    bfloat16 results, plus `BFLOAT16_LIMIT`. On a CPU our float32 products are added up in float64.

    Args:
      config: our model.
      params: gives one part of the parameter tree, such as "image_decoder/denoiser", as a nested dict of numpy arrays
        of any float type.
      directory: a causal language model of transformers; or one that sees (a row of `vision_language.LAYOUTS`; UniLIP
        paints too), our new tokens left aside; or the folders of an image decoder, perhaps that of a vision encoder, of
        diffusers; or a checkpoint of the original program, whose towers' configurations are found as the import finds
        them; or one of OpenUni, a file, or of MetaQuery, whose towers are taken to have our shapes.
      dtypes: "float32", "bfloat16" or both.
      towers: see `dreamllm_modules.loaders`.

    Returns:
      A difference for each tower and type. "multimodal forward" is the logits for one sequence of text and an image
      and, of a checkpoint with dream queries (of the original program, one with all its plugin files), these, and their
      condition. Without a language model there, the connector is compared by itself.
      "scheduler" is what `sampling.compare_sampling` compares, where the directory has one.

    Raises:
      ImportError: PyTorch is not installed.
      ValueError: the directory is none of these; it is of another shape than our model; a tensor is missing,
        unexpected or of the wrong shape.
    """
    import_torch("verifying")
    side = torch_side(config, params, Path(directory), towers)
    config, params, loaders, scheduler = side.config, side.params, side.loaders, side.scheduler
    inputs = _inputs(config)
    theirs = {dtype: dict(inputs) for dtype in ("float32", *dtypes)}
    ours = {dtype: dict(inputs) for dtype in dtypes}
    exact: Values = {}  # torch's float64 results, of the towers that need them
    for tower, (parts, run_theirs, run_ours) in _TOWERS.items():
        if parts[0] in loaders and not (tower == "connector" and "language_model" in loaders):
            loaded, before = {part: loaders[part] for part in parts if part in loaders}, set(theirs["float32"])
            try:
                stored = _run_theirs(run_theirs, config, loaded, theirs)
                _collect(stored)
                _run_ours(run_ours, config, params, stored, ours)
                new = theirs["float32"].keys() - before if "float32" in dtypes else ()
                if any(_relative(ours["float32"][name], theirs["float32"][name]) > FLOAT32_LIMIT for name in new):
                    # From what the towers before gave in float32, so that this one alone is judged.
                    values = {name: theirs["float32"][name] for name in before}
                    _run_theirs(run_theirs, config, loaded, {"float64": values})
                    exact |= {name: values[name] for name in new}
                    _collect(stored)
            except ValueError as error:
                raise ValueError(f"{directory}, {tower}: {error}") from error
    differences = []
    for tower in dict.fromkeys(name.split("/")[0] for name in theirs["float32"] if "/" in name):
        names = [name for name in theirs["float32"] if name.startswith(f"{tower}/")]
        for dtype in dtypes:
            found = [_difference(tower, name, dtype, ours, theirs, exact) for name in names]
            differences.append(_worst(found))
    if scheduler is not None and scheduler.is_file():
        found = compare_sampling(config.image_decoder, scheduler)
        differences.append(_worst([_same("scheduler", *pair) for pair in found.values()]))
    return differences


def _worst(found: Sequence[Difference]) -> Difference:
    return max(found, key=lambda d: (not d.passed, d.relative / d.limit))


def _same(tower: str, got: np.ndarray, want: np.ndarray) -> Difference:
    """Of what depends on no type, and may have another shape; two that are no numbers at all are alike."""
    if np.array_equal(got, want, equal_nan=True):
        return Difference(tower, "any", 0.0, 0.0, FLOAT32_LIMIT)
    if got.shape != want.shape:
        return Difference(tower, "any", math.inf, math.inf, FLOAT32_LIMIT)
    return Difference(tower, "any", float(np.abs(got - want).max()), _relative(got, want), FLOAT32_LIMIT)


def table(differences: Sequence[Difference]) -> str:
    """The differences as aligned text, a line each; the last column says ok or DIFFERS."""
    rows = [("tower", "type", "largest difference", "relative difference", "limit", "verdict")]
    for d in differences:
        figures = (f"{figure:.1e}" for figure in (d.largest, d.relative, d.limit))
        rows.append((d.tower, d.dtype, *figures, "ok" if d.passed else "DIFFERS"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _relative(got: np.ndarray, want: np.ndarray) -> float:
    got, want = got.astype(np.float64), want.astype(np.float64)
    if got.shape != want.shape:
        raise ValueError(f"an output has shape {got.shape} here, but {want.shape} in torch")
    error = float(np.linalg.norm(got - want) / (np.linalg.norm(want) or np.finfo(np.float64).tiny))
    return math.inf if math.isnan(error) else error


def _difference(tower: str, name: str, dtype: str, ours: Mapping, theirs: Mapping, exact: Mapping) -> Difference:
    got, want = ours[dtype][name], theirs["float32"][name]
    if dtype == "bfloat16":
        limit = ROUNDING_FACTOR * _relative(theirs["bfloat16"][name], want) + BFLOAT16_LIMIT
    elif _relative(got, want) <= FLOAT32_LIMIT:
        limit = FLOAT32_LIMIT
    else:
        limit = ROUNDING_FACTOR * _relative(want, exact[name])
        want = exact[name]
    return Difference(tower, dtype, float(np.abs(got - want).max()), _relative(got, want), limit)


def _inputs(config: DreamLLMConfig) -> Values:
    """What both sides are given, at random; images and latents in our layout."""
    rng, ids = np.random.default_rng(0), config.special_tokens
    language, encoder, decoder = config.language_model, config.vision_encoder, config.image_decoder
    text = rng.integers(language.vocab_size, size=min(32, language.max_length))
    half = len(text) // 2
    before = [*ids.begin, *text[:half], *ids.before_patches]
    see = [*ids.begin, *text[:half], *ids.seen(encoder.num_patches)]
    dream = [*text[half:], *ids.painted(config.num_queries)]
    side, multiple = encoder.image_size, decoder.training_size_multiple
    places = np.arange(len(see + dream))
    if language.position_axes > 1:
        places = place(len(places), [(len(before), grid_of(encoder.num_patches, side, side))])
    # Of features there is a square.
    picture = (multiple, multiple) if decoder.encodes_features else (2 * multiple, 3 * multiple)
    width = language.width if decoder.encodes_features == "visual_projector" else encoder.width
    values = {
        "text": [text],
        "document": [see + dream],
        "seen": [see],
        "places": [places],
        "see_slots": [[len(before)]],
        "dream_slots": [[len(see) + len(text) - half + 1]],
        "pixels": rng.normal(size=(1, side, side, 3)),
        "images": rng.uniform(-1, 1, (1, *picture, 3)),
        "features": rng.normal(size=(1, encoder.num_patches, width)),
        "latents": rng.normal(size=(2, *decoder.latent_shape(*picture))),
        # Small ones: the last bit of a sinusoid's frequency, which torch's exponential decides, is multiplied by them.
        "timesteps": [1.3, 17.7],
        "hidden": rng.normal(size=(2, config.num_queries, language.width)),
        "conditions": rng.normal(size=(2, config.num_queries, decoder.condition_width)),
        "pooled": rng.normal(size=(2, decoder.pooled_width)),
        "sizes": [[96.0, 64.0, 16.0, 0.0, 64.0, 64.0], [64.0, 128.0, 0.0, 32.0, 64.0, 64.0]],
    }
    arrays = {name: np.asarray(value) for name, value in values.items()}
    return {name: x.astype(np.float32 if x.dtype.kind == "f" else np.int32) for name, x in arrays.items()}


def _condition(decoder: ImageDecoderConfig, values: Mapping) -> Condition:
    """What its denoiser is given, of arrays or tensors."""
    condition = Condition(values["conditions"], pooled=values["pooled"] if decoder.pooled_width else None)
    return condition.with_sizes(values["sizes"]) if decoder.wants_sizes else condition


# ---- Our side -------------------------------------------------------------------------------------------------------


def _run_ours(run: Callable, config: DreamLLMConfig, params: Callable, stored: Mapping, sides: Mapping) -> None:
    """Adds a tower's outputs to the values of each type; `stored` is what `_run_theirs` returned."""
    tree = {}
    for part, (dtype, count) in stored.items():
        tree[part] = jax.tree.map(lambda leaf, to=dtype: np.asarray(leaf).astype(to, copy=False), params(part))
        if (size := sum(leaf.size for leaf in jax.tree.leaves(tree[part]))) != count:
            raise ValueError(f"{part} has {size:,} parameters here, but {count:,} there")
    for dtype, values in sides.items():
        own = dataclasses.replace(config, dtype=dtype, remat="none")
        with jax.default_matmul_precision(_exact_products()) if dtype == "float32" else contextlib.nullcontext():
            cast = jax.tree.map(lambda leaf, to=dtype: leaf.astype(to, copy=False), tree)
            found = _apply(own, run, unflatten_dict(cast, sep="/"), values)
        values |= {name: np.asarray(array, np.float32) for name, array in found.items()}


def _exact_products() -> str:
    """The precision of float32's products that shows differences of meaning, not of rounding.

    An accelerator takes fewer digits unless told otherwise. A CPU rounds up to 2.8 times as much as torch, unless it
    adds up in float64.
    """
    return "F64_F64_F64" if jax.default_backend() == "cpu" else "float32"


@functools.partial(jax.jit, static_argnums=(0, 1))
def _apply(config: DreamLLMConfig, run: Callable, params: Mapping, values: Mapping) -> dict[str, jax.Array]:
    return run(DreamLLM(config).bind({"params": params}), values)


def _our_vision_encoder(joined: DreamLLM, values: Mapping) -> dict[str, jax.Array]:
    return {"vision encoder/states": joined.vision_encoder(values["pixels"])}


def _our_language_model(joined: DreamLLM, values: Mapping) -> dict[str, jax.Array]:
    def decode(x: jax.Array, places: jax.Array, seen: Sequence = ()) -> jax.Array:
        return joined.decode(x, places, jnp.ones(x.shape[:2], jnp.int32), seen=seen)[0]

    text, places = values["text"], values["places"]
    logits, given = joined.language_model.logits, joined.variables["params"]
    outputs = {"language model/logits": logits(decode(joined.embed(text), jnp.arange(text.shape[1])[None]))}
    if "visual_projector" not in given:
        return outputs
    seen = [(joined.visual_projector(values["vision encoder/states"])[None], values["see_slots"])]
    if "dream_queries" not in given:
        hidden = decode(joined.embed(values["seen"], seen), places[:, : values["seen"].shape[1]])
        return outputs | {"multimodal forward/logits": logits(hidden)}
    slots = values["dream_slots"]
    x = joined.embed(values["document"], seen, [slots])
    outputs["multimodal forward/logits"] = logits(decode(x, places))
    given = painted_from(joined.config, decode(x, places, seen), jnp.ones(x.shape[:2], jnp.int32), slots)
    condition = joined.condition(jax.tree.map(lambda x: x[:, 0], given))
    outputs["multimodal forward/condition"] = condition.sequence[:, -_painted_from(joined.config, values) :]
    if condition.pooled is not None:
        outputs["multimodal forward/pooled"] = condition.pooled
    return outputs


def _our_connector(joined: DreamLLM, values: Mapping) -> dict[str, jax.Array]:
    return {"connector/condition": joined.condition(values["hidden"]).sequence}


def _painted_from(config: DreamLLMConfig, values: Mapping) -> int:
    """How many of the last tokens of the document before `<dream_end>` the condition is made of."""
    before = values["document"].shape[1] - 1 - config.num_queries
    return min(before, config.connector.prompt_tokens) + config.num_queries


def _our_denoiser(joined: DreamLLM, values: Mapping) -> dict[str, jax.Array]:
    condition = _condition(joined.config.image_decoder, values)
    prediction = joined.image_decoder.denoise(values["latents"], values["timesteps"], condition)
    return {"denoiser/prediction": prediction}


def _our_autoencoder(joined: DreamLLM, values: Mapping) -> dict[str, jax.Array]:
    return {
        "autoencoder/stored": joined.image_decoder.stored(
            values["images"], values["features"] if joined.config.image_decoder.encodes_features else None
        ),
        "autoencoder/images": joined.image_decoder.autoencoder.decode(values["latents"]),
    }


# ---- Torch's side ---------------------------------------------------------------------------------------------------


def _run_theirs(run: Callable, config: DreamLLMConfig, loaders: Mapping, sides: Mapping) -> dict[str, tuple[str, int]]:
    """Adds a tower's outputs to the values of each type; returns part -> type it is stored in, parameter count."""
    import torch

    try:
        modules = {part: load().eval() for part, load in loaders.items()}
    except Exception as error:  # of many kinds, as loaders meet files that are not what they should be
        raise ValueError(next(iter(str(error).splitlines()), repr(error))) from error
    stored = {}
    for part, module in modules.items():
        _require_same_settings(part, config, module)
        # By the parameters: other tensors are loaded as float32 from files of any type.
        types = [parameter.dtype for parameter in module.parameters()] or [torch.float32]
        dtype = functools.reduce(torch.promote_types, types)
        stored[part] = str(dtype).removeprefix("torch."), sum(tensor.numel() for tensor in _in_files(module))
    for dtype, values in sides.items():  # float32 comes first: there is no way back from bfloat16
        to = getattr(torch, dtype)
        for module in modules.values():
            for tensor in _in_files(module):  # and no others: torch keeps rotary frequencies in float32
                tensor.data = tensor.data.to(to)
        with torch.inference_mode():
            tensors = {name: torch.from_numpy(array) for name, array in values.items()}
            tensors = {name: x.to(to) if x.is_floating_point() else x.long() for name, x in tensors.items()}
            tensors["timesteps"] = torch.from_numpy(values["timesteps"])  # which pipelines do not round either
            tensors = {name: x.permute(0, 3, 1, 2) if x.ndim == 4 else x for name, x in tensors.items()}
            found = run(modules, tensors, config)
        found = {name: x.permute(0, 2, 3, 1) if x.ndim == 4 else x for name, x in found.items()}
        values |= {name: x.float().numpy() for name, x in found.items()}
    return stored


def _in_files(module: "nn.Module") -> list["torch.Tensor"]:
    """The parameters, and what else of floating point numbers is stored with them, such as a table of positions."""
    stored = module.state_dict().keys()
    buffers = (x for name, x in module.named_buffers() if name in stored and x.is_floating_point())
    return [*module.parameters(), *buffers]


def _collect(stored: Mapping[str, tuple[str, int]]) -> None:
    """Frees torch's modules, which refer to themselves; small ones are not worth the half second that it takes."""
    if sum(count for _, count in stored.values()) > 2**24:
        gc.collect()


def _their_vision_encoder(modules: Mapping, values: Mapping, config: DreamLLMConfig) -> dict[str, "torch.Tensor"]:
    states = config.vision_encoder.run_public(modules["vision_encoder"], values["pixels"])
    return {"vision encoder/states": states}


def _their_language_model(modules: Mapping, values: Mapping, config: DreamLLMConfig) -> dict[str, "torch.Tensor"]:
    language_model = modules["language_model"]
    outputs = {"language model/logits": language_model(values["text"]).logits}
    if "visual_projector" not in modules:
        return outputs
    paints, see = "dream_queries" in modules, int(values["see_slots"])
    seen = modules["visual_projector"](values["vision encoder/states"])
    x = language_model.get_input_embeddings()(values["document" if paints else "seen"])
    x[:, see : see + seen.shape[1]] = seen
    if paints:
        at_queries = slice(int(values["dream_slots"]), int(values["dream_slots"]) + config.num_queries)
        (x[:, at_queries],) = modules["dream_queries"].values()
    places = values["places"][:, : x.shape[1]]
    if places.ndim == 3:
        places = places.permute(2, 0, 1)  # transformers has the axes first
    hidden = language_model.model(inputs_embeds=x, position_ids=places).last_hidden_state
    outputs["multimodal forward/logits"] = language_model.lm_head(hidden)
    if paints:
        if config.connector.sees:
            hidden[:, see : see + seen.shape[1]] = seen
        condition = modules["connector"](hidden[:, at_queries.stop - _painted_from(config, values) : at_queries.stop])
        outputs["multimodal forward/condition"] = condition["sequence"]
        if "pooled" in condition:
            outputs["multimodal forward/pooled"] = condition["pooled"]
    return outputs


def _their_connector(modules: Mapping, values: Mapping, config: DreamLLMConfig) -> dict[str, "torch.Tensor"]:
    return {"connector/condition": modules["connector"](values["hidden"])["sequence"]}


def _their_denoiser(modules: Mapping, values: Mapping, config: DreamLLMConfig) -> dict[str, "torch.Tensor"]:
    given = values["latents"], values["timesteps"], _condition(config.image_decoder, values)
    return {"denoiser/prediction": config.image_decoder.denoiser.run_public(modules[DENOISER], *given)}


def _their_autoencoder(modules: Mapping, values: Mapping, config: DreamLLMConfig) -> dict[str, "torch.Tensor"]:
    run = config.image_decoder.autoencoder.run_public
    given = values["features" if config.image_decoder.encodes_features else "images"]
    found = run(modules[AUTOENCODER], given, values["latents"])
    return {f"autoencoder/{name}": tensor for name, tensor in found.items()}


def _require_same_settings(part: str, config: DreamLLMConfig, module: "nn.Module") -> None:
    tower = config_of(config, part)
    form = getattr(tower, "public", None)
    for name in form.settings if form else ():
        ours, theirs = getattr(tower, name, None), getattr(module.config, name, None)
        theirs = tuple(theirs) if isinstance(theirs, list) else theirs
        if ours != theirs:
            raise ValueError(f"{part.replace('/', '.')}.{name} is {ours} here, but {theirs} there")


# Tower -> its parts, without the first of which there is none; torch's side; ours. The last uses what the first gave;
# where it is there, the connector is compared with it.
_TOWERS = {
    "vision encoder": (["vision_encoder"], _their_vision_encoder, _our_vision_encoder),
    "denoiser": ([DENOISER], _their_denoiser, _our_denoiser),
    "connector": (["connector"], _their_connector, _our_connector),
    "autoencoder": ([AUTOENCODER], _their_autoencoder, _our_autoencoder),
    "language model": (
        ["language_model", "visual_projector", "dream_queries", "connector"],
        _their_language_model,
        _our_language_model,
    ),
}
