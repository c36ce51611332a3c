"""What the pages that are written have in common: how they look, and images inside them."""

import base64
import html
import io

from matplotlib.figure import Figure

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 980px; margin: 2em auto; padding: 0 1em; color: #222; }
h1, h2 { font-weight: 600; } .figures { display: flex; gap: 2em; flex-wrap: wrap; } .figures b { font-size: 1.6em; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(210px, 1fr)); gap: 14px; }
.pair { border: 1px solid #ddd; border-radius: 8px; padding: 10px; } .pair.wrong { border-color: #c33; }
img { width: 90px; height: 90px; image-rendering: pixelated; background: #fff; border: 1px solid #eee; }
.story { border-left: 4px solid #ddd; padding-left: 1em; } .story img { width: 128px; height: 128px; display: block; }
small { color: #777; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 12px; border-bottom: 1px solid #e4e4e4; text-align: right; white-space: nowrap; }
thead th { vertical-align: bottom; white-space: normal; color: #555; }
th:first-child { text-align: left; font-weight: 600; } th { font-weight: 500; }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 5px; margin-right: 8px; }
"""


def embedded(data: bytes, kind: str) -> str:
    """A file's content as an address."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def figure_image(figure: Figure, alt: str) -> str:
    """An <img> that holds a figure as SVG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    source = embedded(buffer.getvalue(), "image/svg+xml")
    return f'<img style="width:100%;height:auto" alt="{html.escape(alt)}" src="{source}">'
