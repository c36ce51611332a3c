"""FLOPs of a tower, counted along its forward pass: what `experiment.flops` adds up.

A matrix product or convolution counts 2 FLOPs a multiply-accumulate; a convolution's taps on padding do not count.
"""

import dataclasses
from collections.abc import Callable

import jax

from dreamllm_jax.layers import full_attention_tpu
from dreamllm_jax.layers.attention import MAX_SCORES
from dreamllm_jax.layers.lora import LORA_A, LORA_B, LoraConfig, chosen
from dreamllm_jax.layers.spaced_heads import Spacing


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs of a part of a step.

    Attributes:
      model: forward and backward.
      masked: the part of `model` whose attention scores a causal mask throws away.
      products: executed by XLA's own products and convolutions.
      kernels: executed by attention kernels, which XLA cannot look into.
    """

    model: float = 0.0
    masked: float = 0.0
    products: float = 0.0
    kernels: float = 0.0

    @property
    def executed(self) -> float:
        return self.products + self.kernels

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def __mul__(self, times: float) -> "Flops":
        return Flops(*(value * times for value in dataclasses.astuple(self)))


class Tally:
    """Adds up the products along a tower.

    `live` says whether what has been computed so far depends on a trained weight, so that gradients go back to it;
    `forward` is what the forward pass has executed, outside of kernels.

    Args:
      trained: whether the tower's parameter at a path is.
      platform, dtype: what the program is compiled for and computes in: whether there are attention kernels.
    """

    def __init__(
        self, trained: Callable[[str], bool], live: bool = False, platform: str = "tpu", dtype: str = "bfloat16"
    ):
        self.trained, self.live, self.platform, self.dtype = trained, live, platform, dtype
        self.forward, self.total = 0.0, Flops()

    def part(self, name: str, live: bool = False) -> "Tally":
        """An empty tally of a part of the tower, whose parameters' paths begin with its name."""
        return Tally(lambda path: self.trained(f"{name}/{path}"), live, self.platform, self.dtype)

    def beside(self, live: bool = False) -> "Tally":
        """An empty tally of the same tower, for what runs beside its way."""
        return Tally(self.trained, live, self.platform, self.dtype)

    def product(self, path: str, flops: float, live: bool | None = None) -> None:
        """A product of activations (of the tower so far, or as `live` says) with the weight at `path`."""
        live, trained = self.live if live is None else live, self.trained(path)
        self.forward += flops
        self.total += Flops(model=flops * (1 + live + trained), products=flops * (1 + live + trained))
        self.live |= live or trained

    def linear(
        self,
        path: str,
        vectors: float,
        inputs: int,
        outputs: int,
        lora: LoraConfig | None = None,
        live: bool | None = None,
    ) -> None:
        """A linear layer of so many vectors, and its adapter if it has one; `live` as of `product`."""
        before = self.live if live is None else live
        self.product(f"{path}/kernel", dense(vectors, inputs, outputs), live=before)
        if lora := chosen(lora, path.rpartition("/")[2]):
            self.product(f"{path}/{LORA_A}", dense(vectors, inputs, lora.rank), live=before)
            inside = before or self.trained(f"{path}/{LORA_A}")
            self.product(f"{path}/{LORA_B}", dense(vectors, lora.rank, outputs), live=inside)

    def attention(
        self,
        batch: int,
        queries: int,
        keys: int | tuple[int, ...],
        width: int,
        keys_live: bool,
        causal: bool = False,
        heads: int | Spacing = 0,
        again: bool = False,
    ) -> None:
        """Scores and their product with the values; keys may be those of several sequences.

        The backward pass has four products: towards weights, values, queries and keys. A kernel, if there is one (for
        `heads`, in bfloat16), computes all of them and the scores again, of whole blocks of queries and of zeros after
        heads; and, if what it gave is not kept (`again`), that before. Without a kernel many scores are taken in
        chunks, computed again in the backward pass.
        """
        parts = (keys,) if isinstance(keys, int) else keys
        keys = sum(parts)
        one = 2.0 * batch * queries * keys * width
        flops = one * (2 + (self.live or keys_live) + 2 * keys_live + self.live)
        self.live |= keys_live
        masked = flops * (1 - 1 / queries) / 2 if causal else 0.0
        count, lanes = (heads.count, heads.count * heads.width) if isinstance(heads, Spacing) else (heads, width)
        q, *k = (jax.ShapeDtypeStruct((batch, length, lanes), "bfloat16") for length in (queries, *parts))
        kernels = self.platform == "tpu" and self.dtype == "bfloat16"
        if kernels and count and full_attention_tpu.supported(q, tuple(k), count):
            executed = 2.0 * batch * full_attention_tpu.computed(queries) * keys * lanes
            self.total += Flops(flops, masked, kernels=executed * (2 + (5 + 2 * again) * self.live))
        else:
            self.forward += 2 * one
            self.total += Flops(flops, masked, flops)
            self.recompute(one * (queries * keys > MAX_SCORES))

    def causal_kernel(self, batch: float, length: int, width: int, share: float) -> None:
        """The same by `layers.splash`, which computes a `share` of it.

        Its backward pass computes the scores again, as a fifth product.
        """
        square = 2.0 * batch * length**2 * width
        flops = square * (2 + 4 * self.live)
        self.total += Flops(flops, flops * (1 - 1 / length) / 2, kernels=share * square * (2 + 5 * self.live))

    def recompute(self, flops: float) -> None:
        """Executes products again, if there is a backward pass."""
        self.total += Flops(products=flops * self.live)


def dense(tokens: float, inputs: int, outputs: int) -> float:
    """Of a product of so many vectors with a matrix."""
    return 2.0 * tokens * inputs * outputs


def convolution(
    images: int,
    size: tuple[int, int],
    inputs: int,
    outputs: int,
    kernel: int = 3,
    stride: int = 1,
    padding: tuple[int, int] = (1, 1),
) -> float:
    """Of images of this height and width: pairs of an output and a tap on the input, in either dimension."""
    pairs = 1
    for side in size:
        positions = range(0, side + sum(padding) - kernel + 1, stride)
        pairs *= sum(padding[0] <= start + tap < padding[0] + side for start in positions for tap in range(kernel))
    return 2.0 * images * pairs * inputs * outputs
