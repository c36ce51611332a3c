"""Reading prompts and writing text with a key-value cache.

Legend: B rows, T prompt tokens, S cache entries, E language model's width, V vocabulary, M new tokens.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, UInt8, UInt32

from dreamllm_jax.data.batch import Batch
from dreamllm_jax.data.document import Segment
from dreamllm_jax.data.positions import grid_of, place
from dreamllm_jax.data.tokenizer import Tokenizer
from dreamllm_jax.generation.prompts import bucket, encode_prompts, require_fits
from dreamllm_jax.model import DreamLLM
from dreamllm_jax.parallel.collectives import replicate
from dreamllm_jax.towers.condition import Hidden

STRETCH = 32  # tokens that all rows write before anything else is looked at: one program for budgets of any size


@struct.dataclass
class Reading:
    """What the rows have read so far: keys and values, which tokens; and the logits of their next tokens.

    `recent` has the hidden states of the last tokens, and which there are, for a connector that is given the prompt's.
    `position` is the next token's, of a language model whose positions have three axes; others count what they read.
    A vocabulary may be larger than the tokenizer's, which has the first `known` ids: the others are never written.
    """

    cache: Any
    logits: Float[Array, "B V"]
    seen: Bool[Array, "B V"]
    recent: tuple[Float[Array, "B P E"], Bool[Array, "B P"]] | None = None
    position: Int[Array, " B"] | None = None
    known: int | None = struct.field(pytree_node=False, default=None)

    @property
    def length(self) -> Int[Array, " B"]:
        return self.cache.length


@struct.dataclass
class Sampling:
    """How each row's next token is chosen.

    Attributes:
      temperature: 0 for the most probable token.
      top_k: among so many of the most probable tokens; 0 for all.
      top_p: among the most probable tokens that together have this probability (Holtzman et al. 2020).
      repetition_penalty: of tokens that were read or written before (Keskar et al. 2019); 1 for none.
      seed: of the row's draws, which depend on it and on the token's position alone.
    """

    temperature: Float[Array, " B"]
    top_k: Int[Array, " B"]
    top_p: Float[Array, " B"]
    repetition_penalty: Float[Array, " B"]
    seed: UInt32[Array, " B"]

    @classmethod
    def of(
        cls,
        seeds: Sequence[int],
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
    ) -> "Sampling":
        """The same settings for all rows, a seed for each.

        Raises:
          ValueError: a setting out of its range.
        """
        if temperature < 0 or top_k < 0 or not 0 < top_p <= 1 or repetition_penalty <= 0:
            raise ValueError(
                "temperature and top_k must not be negative, top_p in (0, 1], repetition_penalty positive; got "
                f"{temperature}, {top_k}, {top_p}, {repetition_penalty}"
            )
        full = functools.partial(jnp.full, len(seeds))
        return cls(
            full(temperature, jnp.float32),
            full(top_k, jnp.int32),
            full(top_p, jnp.float32),
            full(repetition_penalty, jnp.float32),
            jnp.asarray(seeds, jnp.uint32),
        )


def choose(reading: Reading, sampling: Sampling | None) -> Int[Array, " B"]:
    """The rows' next tokens, penalised, cut and drawn in the order of transformers' processors."""
    logits = reading.logits
    if sampling is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    penalty = sampling.repetition_penalty[:, None]
    logits = jnp.where(reading.seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    greedy = jnp.argmax(logits, axis=-1)

    def drawn():
        keys = jax.vmap(lambda seed, at: jax.random.fold_in(jax.random.key(seed), at))(sampling.seed, reading.length)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
        order = jnp.argsort(logits, axis=-1, descending=True)
        scale = jnp.where(sampling.temperature == 0, 1.0, sampling.temperature)
        ranked = jnp.take_along_axis(logits, order, axis=-1) / scale[:, None]
        allowed = jnp.where(sampling.top_k == 0, logits.shape[1], sampling.top_k)
        ranked = jnp.where(jnp.arange(logits.shape[1]) < allowed[:, None], ranked, -jnp.inf)
        probabilities = jax.nn.softmax(ranked, axis=-1)
        more_probable = jnp.cumsum(probabilities, axis=-1) - probabilities
        ranked = jnp.where(more_probable < sampling.top_p[:, None], ranked, -jnp.inf)
        best = jnp.argmax(ranked + jnp.take_along_axis(noise, order, axis=-1), axis=-1)
        return jnp.take_along_axis(order, best[:, None], axis=-1)[:, 0]

    token = jax.lax.cond(jnp.any(sampling.temperature > 0), drawn, lambda: greedy)
    return jnp.where(sampling.temperature > 0, token, greedy).astype(jnp.int32)


def _advance(
    model: DreamLLM, params: dict, reading: Reading, embeddings: Array, counts: Array, seen=(), steps: Any = None
) -> tuple:
    """The rows read those embeddings that count (padding is on the right): hidden states and Reading.

    Args:
      steps: i32[T, 3] or i32[B, T, 3] from the next position to each token's, on its axes; None for text.
    """
    segment_ids = jnp.broadcast_to(counts, embeddings.shape[:2]).astype(jnp.int32)
    position = reading.length if reading.position is None else reading.position
    if steps is None:
        positions = largest = position[:, None] + jnp.arange(segment_ids.shape[1])
    else:
        positions = position[:, None, None] + steps
        largest = positions.max(axis=2)
    after = jnp.max(jnp.where(segment_ids > 0, largest + 1, position[:, None]), axis=1)
    joined = model.bind({"params": params})
    hidden, cache = joined.decode(embeddings, positions, segment_ids, reading.cache, seen)
    count = jnp.sum(segment_ids, axis=1)
    final = jnp.take_along_axis(hidden, jnp.maximum(count - 1, 0)[:, None, None], axis=1)
    logits = joined.language_model.logits(final)[:, 0]
    if reading.known is not None:
        logits = jnp.where(jnp.arange(logits.shape[1]) < reading.known, logits, -jnp.inf)
    recent = reading.recent
    if recent is not None:
        states = jnp.concatenate([recent[0], hidden], axis=1)
        there = jnp.concatenate([recent[1], segment_ids > 0], axis=1)
        last = jnp.argsort(there, axis=1, stable=True)[:, -recent[0].shape[1] :]
        recent = jnp.take_along_axis(states, last[..., None], axis=1), jnp.take_along_axis(there, last, axis=1)
    logits = jnp.where((count > 0)[:, None], logits, reading.logits)
    position = None if reading.position is None else after
    return hidden, reading.replace(cache=cache, logits=logits, recent=recent, position=position)


@functools.partial(jax.jit, static_argnames=("model", "cache_length", "known"))
def read_prompts(
    model: DreamLLM,
    params: dict,
    prompts: Batch,
    cache_length: int,
    known: int | None = None,
    seeds: UInt32[Array, " B"] | None = None,
) -> Reading:
    """Reads prompts of any lengths, with images to see.

    Args:
      prompts: one document a row from position 0, padded on the right with segment 0.
      cache_length: room for prompt and continuation (S).
      known: ids that the tokenizer has; None for all of the vocabulary.
      seeds: of the rows: image i of one was painted with seed + i; what dream queries that are drawn anew need.
    """
    rows, joined, read = len(prompts.tokens), model.bind({"params": params}), []
    for slots in prompts.see:
        features = joined.see(slots.images.reshape(-1, *slots.images.shape[2:]))
        read.append((features.reshape(*slots.at.shape, *features.shape[1:]), slots.at))
    drawn: list[Array] = []
    if model.config.dream_queries.redrawn and prompts.dream:
        (painted,) = prompts.dream
        numbers = jnp.arange(painted.at.shape[1], dtype=jnp.uint32)
        drawn = [_drawn(model, (jnp.zeros(rows, jnp.uint32) if seeds is None else seeds)[:, None] + numbers)]
    embeddings = joined.embed(prompts.tokens, read, [slots.at for slots in prompts.dream], drawn)
    vocabulary = model.config.language_model.vocab_size
    cache = model.config.language_model.cache(rows, cache_length, jnp.dtype(model.config.dtype))
    ids = model.config.special_tokens
    around = jnp.asarray([*ids.seen(1), ids.dream_end])  # never written, so never penalised
    within = (prompts.segment_ids != 0) & ~jnp.isin(prompts.tokens, around)
    seen = jnp.zeros((rows, vocabulary), bool).at[jnp.arange(rows)[:, None], prompts.tokens].max(within)
    recent, tokens = None, model.config.connector.prompt_tokens
    if tokens:
        states = jnp.zeros((rows, tokens, embeddings.shape[-1]), embeddings.dtype)
        recent = states, jnp.zeros(states.shape[:2], bool)
    steps, position = None, None
    if model.config.language_model.position_axes > 1:
        steps, position = prompts.positions, jnp.zeros(rows, jnp.int32)
    empty = Reading(cache, jnp.zeros((rows, vocabulary), jnp.float32), seen, recent, position, known)
    return _advance(model, params, empty, embeddings, prompts.segment_ids != 0, read, steps)[1]


def begin(
    model: DreamLLM,
    params: dict,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[Segment]],
    new: int,
    template: str = "",
    allowed: int | None = None,
    writes: bool = True,
    asked: bool = False,
    seeds: Array | None = None,
) -> Reading:
    """Reads how documents begin, with room for `new` tokens; other arguments and errors as of `prompts.encode_prompts`.

    Args:
      writes: text is to follow; where documents begin with no token it can follow nothing but some.
      seeds: see `read_prompts`.

    Raises:
      ValueError: the documents could become longer than the model can read, or than is `allowed`; or there is nothing
        to go on with.
    """
    batch = encode_prompts(prompts, tokenizer, model.config, template, asked)
    if writes and not batch.segment_ids[:, 0].all():
        raise ValueError("a prompt is empty, and this model's documents begin with no token of their own: begin it")
    length = require_fits(model.config, batch, new, allowed) + STRETCH  # the last stretch may be longer, only to be cut
    return read_prompts(model, params, batch, bucket(length, 64), tokenizer.vocab_size, seeds)


@functools.partial(jax.jit, static_argnames=("model", "max_tokens", "stop"), donate_argnames=("reading",))
def write(
    model: DreamLLM,
    params: dict,
    reading: Reading,
    max_tokens: int,
    stop: tuple[int, ...],
    sampling: Sampling | None = None,
    active: Bool[Array, " B"] | None = None,
) -> tuple[Int[Array, "B M"], Int[Array, " B"], Reading]:
    """Continues every row until a stop token, which is written and read too.

    Args:
      sampling: how tokens are chosen; None for the most probable ones.
      active: the rows to continue; None for all. The others write and read nothing.

    Returns:
      Token ids (padded with the pad token), how many each row wrote, and what the rows have now read.
    """
    rows = reading.logits.shape[0]
    tokens = jnp.full((rows, max_tokens), model.config.special_tokens.pad, jnp.int32)
    stops = jnp.asarray(stop, jnp.int32)

    def unfinished(state):
        step, _, _, done, _ = state
        return (step < max_tokens) & ~jnp.all(done)

    def body(state):
        step, tokens, count, done, reading = state
        token = choose(reading, sampling)
        tokens = tokens.at[:, step].set(jnp.where(done, tokens[:, step], token))
        reading = read_tokens(model, params, reading, token, ~done)
        return step + 1, tokens, count + ~done, done | jnp.isin(token, stops), reading

    done = jnp.zeros(rows, bool) if active is None else ~active
    start = (0, tokens, jnp.zeros(rows, jnp.int32), done, reading)
    _, tokens, count, _, reading = jax.lax.while_loop(unfinished, body, start)
    return *replicate((tokens, count)), reading


def read_tokens(
    model: DreamLLM, params: dict, reading: Reading, tokens: Int[Array, " B"], active: Bool[Array, " B"]
) -> Reading:
    """The active rows read one token each."""
    embeddings = model.bind({"params": params}).embed(tokens[:, None])
    _, advanced = _advance(model, params, reading, embeddings, active[:, None])
    rows = jnp.arange(len(tokens))
    return advanced.replace(seen=advanced.seen.at[rows, tokens].max(active))


@functools.partial(jax.jit, static_argnames=("model", "size"), donate_argnames=("reading",))
def read_image(
    model: DreamLLM,
    params: dict,
    reading: Reading,
    images: UInt8[Array, "B ..."],
    active: Bool[Array, " B"] | None = None,
    size: tuple[int, int] | None = None,
) -> Reading:
    """Every row, or every active one, reads an image, `<im_start> patches <im_end>`, as the encoder preprocesses it.

    Args:
      size: height and width of the images, where the encoder takes them apart.
    """
    ids = model.config.special_tokens
    joined = model.bind({"params": params})
    seen = joined.see(images)
    patches, first = seen.shape[1], len(ids.before_patches)
    tokens = jnp.asarray(ids.seen(patches), jnp.int32)
    tokens = jnp.broadcast_to(tokens, (images.shape[0], len(tokens)))
    slots = jnp.full((images.shape[0], 1), first, jnp.int32)
    read = [(seen[:, None], slots)]
    counts = True if active is None else active[:, None]
    steps = None
    if model.config.language_model.position_axes > 1:
        steps = place(tokens.shape[1], [(first, grid_of(patches, *(size or images.shape[1:3])))])
    return _advance(model, params, reading, joined.embed(tokens, read), counts, read, steps)[1]


@functools.partial(jax.jit, static_argnames=("model", "announced"), donate_argnames=("reading",))
def read_queries(
    model: DreamLLM,
    params: dict,
    reading: Reading,
    announced: bool = False,
    active: Bool[Array, " B"] | None = None,
    seeds: UInt32[Array, " B"] | None = None,
) -> tuple[Float[Array, "B Q E"] | Hidden, Reading]:
    """Every row reads `<dream_start> queries <dream_end>`: the hidden states to paint an image from.

    Args:
      announced: the rows have read `<dream_start>` already.
      active: the rows that do; None for all. What is returned for the others has no meaning.
      seeds: of the images, which queries that are drawn anew are a function of.
    """
    ids, queries = model.config.special_tokens, model.config.num_queries
    start = 0 if announced else 1
    tokens = ids.painted(queries)[1 - start :]
    tokens = jnp.broadcast_to(jnp.asarray(tokens, jnp.int32), (reading.logits.shape[0], len(tokens)))
    slots = jnp.full((tokens.shape[0], 1), start, jnp.int32)
    drawn = [_drawn(model, seeds[:, None])] if model.config.dream_queries.redrawn else []
    embeddings = model.bind({"params": params}).embed(tokens, dream_slots=[slots], drawn=drawn)
    recent = reading.recent
    hidden, reading = _advance(model, params, reading, embeddings, True if active is None else active[:, None])
    first, hidden = hidden[:, :1], hidden[:, start : start + queries]
    if recent is not None:
        if not announced:
            begun = first, jnp.ones(first.shape[:2], bool)
            recent = [jnp.concatenate([old[:, 1:], new], axis=1) for old, new in zip(recent, begun, strict=True)]
        hidden = Hidden(hidden, *recent)
    return hidden, reading


def _drawn(model: DreamLLM, seeds: UInt32[Array, "B S"]) -> Float[Array, "B S Q E"]:
    """Dream queries that are drawn anew, of pictures by their seeds."""
    config = model.config
    return jax.vmap(jax.vmap(lambda seed: config.dream_queries.of_seed(seed, config.queries_shape)))(seeds)
