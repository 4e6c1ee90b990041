"""A hook of MkDocs: formulas become MathML when the site is built, so that pages load nothing from elsewhere."""

import re
from typing import Any

from latex2mathml.converter import convert

FORMULA = re.compile(r"\$\$\n(.+?)\n\$\$|\\\((.+?)\\\)", re.DOTALL)


def on_page_markdown(markdown: str, **_: Any) -> str:
    def to_mathml(match: re.Match[str]) -> str:
        block, inline = match.groups()
        return convert(block, display="block") if block else f"<span>{convert(inline, display='inline')}</span>"

    return FORMULA.sub(to_mathml, markdown)
