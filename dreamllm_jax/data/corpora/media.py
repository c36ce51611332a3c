"""How records call their files of pictures, videos and sounds, where it is not as a format has it."""

import re
from collections.abc import Mapping
from typing import Any

_FILES = r"(_?(paths?|files?|names?|urls?|lists?|bytes|base64|data))?"  # `video_path`, `imageFile`
IMAGES = re.compile(rf"(images?|imgs?|pics?|pictures?|photos?|pixel_?values){_FILES}", re.IGNORECASE)
OTHERS = re.compile(rf"(videos?|audios?|sounds?|speech(es)?|frames?|point_?clouds?|points?){_FILES}", re.IGNORECASE)


def tells(row: Mapping[str, Any], names: re.Pattern[str]) -> bool:
    """Whether a field of such a name tells of a file; `"image": null`, and numbers, do not."""
    return any(
        value and not isinstance(value, bool | int | float) and names.fullmatch(name) for name, value in row.items()
    )
