"""Many items, in batches of alike ones, over all hosts: each computes its share, and all know every result."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
from tqdm import tqdm

from dreamllm_jax.parallel.distributed import gather

T = TypeVar("T")


def compute(
    function: Callable[[Sequence[T]], Sequence[Any]], items: Sequence[T], *, batch: int, length: Callable[[T], int]
) -> list[Any]:
    """The results of all items, in their order; all hosts must call it.

    Args:
      function: of a batch of items to a result each, which must not depend on the others; results are what JSON knows
        (a tuple comes back as a list). A batch that is not full is filled up with its last item, for shapes' sake.
      batch: items at a time on each host.
      length: by which items are put together, the longest first: what does not fit the memory fails at once.
    """
    order = sorted(range(len(items)), key=lambda index: length(items[index]), reverse=True)
    batches = [order[start : start + batch] for start in range(0, len(order), batch)]
    mine: dict[int, Any] = {}
    for some in tqdm(batches[jax.process_index() :: jax.process_count()], disable=jax.process_index() > 0):
        filled = [*some, *[some[-1]] * (batch - len(some))]
        mine |= dict(zip(some, function([items[index] for index in filled]), strict=False))
    found = {int(index): result for share in gather(mine) for index, result in share.items()}
    return [found[index] for index in range(len(items))]
