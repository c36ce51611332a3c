"""What generation leaves in a directory: `results.jsonl`, files, and `index.html`, a page to look at them all."""

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dreamllm_jax.common.directories import is_remote, require_free
from dreamllm_jax.data import images
from dreamllm_jax.data.document import Segment, Text

RESULTS, INDEX = "results.jsonl", "index.html"
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2em auto; padding: 0 1em; color: #222; }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); gap: 16px; }
article { border: 1px solid #ddd; border-radius: 8px; padding: 12px; overflow-wrap: anywhere; }
img { max-width: 100%; } small { color: #777; overflow-wrap: anywhere; } article p { white-space: pre-wrap; }
.prompt { color: #147; }
"""


class Results:
    """A directory that receives results one after the other; the page is written at the end.

    Args:
      directory: is made; must not hold anything yet.
      settings: what all results have in common, told in the page and in every line.

    Raises:
      FileExistsError, ValueError: there is something in the directory, or it is not a local one.
    """

    def __init__(self, directory: Path, settings: Mapping[str, Any]):
        if is_remote(directory):
            raise ValueError(f"results are written to a local directory, which can then be copied to {directory}")
        require_free(directory)
        self._directory, self._settings = Path(directory), dict(settings)
        self._directory.mkdir(parents=True, exist_ok=True)
        self._articles: list[str] = []

    def __enter__(self) -> "Results":
        return self

    def __exit__(self, *_) -> None:
        if not self._articles:  # nothing was made: the directory stays free
            return
        told = ", ".join(f"{name} {value}" for name, value in self._settings.items())
        (self._directory / INDEX).write_text(
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>Results</title><style>{_STYLE}</style></head>"
            f"<body><p><small>{html.escape(told)}</small></p><main>{''.join(self._articles)}</main></body></html>\n"
        )

    def add(self, prompt: Sequence[Segment], result: Sequence[Segment], seed: int) -> str:
        """Keeps one result, a sequence of texts and images; the name it has in the directory."""
        number = len(self._articles)
        name = f"{number:04}"
        asked, told = self._listed(prompt, f"{name}-prompt"), self._listed(result, name)
        line = {"prompt": asked, "result": told, "seed": seed, "settings": self._settings}
        with (self._directory / RESULTS).open("a") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._articles.append(
            f'<article><div class="prompt">{_shown(asked)}</div>{_shown(told)}<small>seed {seed}</small></article>'
        )
        return name

    def _listed(self, segments: Sequence[Segment], name: str) -> list[dict[str, str]]:
        listed, images_before = [], 0
        for segment in segments:
            if isinstance(segment, Text):
                listed.append({"text": segment.text})
                continue
            file = f"{name}-{images_before}.png" if images_before else f"{name}.png"
            (self._directory / file).write_bytes(images.to_png(images.decode(segment.data)))
            listed.append({"image": file})
            images_before += 1
        return listed


def _shown(listed: Sequence[Mapping[str, str]]) -> str:
    return "".join(
        f"<p>{html.escape(item['text'])}</p>" if "text" in item else f'<p><img src="{item["image"]}" alt=""></p>'
        for item in listed
    )
