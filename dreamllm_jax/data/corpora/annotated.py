"""Tables whose texts may stand in files of their own, which OpenUni's lists name beside the images."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, Self

from etils import epath

from dreamllm_jax.data.corpora import pictures
from dreamllm_jax.data.corpora.records import Dropped, Part, field, first, has_field, read_image, read_text, setting
from dreamllm_jax.data.document import Text

ANNOTATION = "annotation"  # the field that names such a file
_SUFFIXES = (".json", ".txt", ".caption")


@dataclasses.dataclass(frozen=True)
class AnnotatedTable(pictures.ImageTable):
    """A format of tables that name images and, as `annotation`, a file with the text: JSON, or nothing but the text."""

    annotations: str = setting("", "directory of the texts' files, as files or in tars; default that of the images")
    told: pictures.Pictures | None = None

    def prepare(self, scratch: epath.Path) -> Self:
        made = super().prepare(scratch)
        if not (root := self.annotations or self.images):
            return made
        told = pictures.make(root, scratch, suffixes=_SUFFIXES, what="annotations")
        return dataclasses.replace(made, told=told)

    def text_of(self, row: Mapping[str, Any], names: Sequence[str], part: Part) -> Text | Dropped:
        """The text of a row, or of the file that it names: the first field of these names that says something."""
        if not has_field(row, ANNOTATION):
            return read_text(first(row, names))
        name = field(row, ANNOTATION)
        found = self.told.read(name) if self.told else read_image(epath.Path(part.path).parent, name)
        if isinstance(found, Dropped):
            return Dropped("no_text") if found.reason == "no_image" else found
        if not str(name).lower().endswith(".json"):
            return read_text(found.data)
        try:
            fields = json.loads(found.data)
        except (ValueError, RecursionError):
            return Dropped("not_json")
        return read_text(first(fields, names)) if isinstance(fields, dict) else Dropped("fields")
