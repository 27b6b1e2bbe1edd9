"""An adapter's card as HTML that is safe to show: markdown of strangers in, no markup of theirs out. Knows no page."""

import re
from collections.abc import MutableMapping, Sequence
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from markupsafe import Markup

_MAX_CHARACTERS = 200_000
_FRONT_MATTER = re.compile(r"\A---\s*\n.*?\n---\s*(?:\n|\Z)", re.DOTALL)
_SAFE_LINK = re.compile(r"(?:https?://|mailto:|#)", re.IGNORECASE)
# The page has headings of its own above those of the card.
_LOWERED = {"h1": "h3", "h2": "h4", "h3": "h5", "h4": "h6", "h5": "h6", "h6": "h6"}


class _Renderer(RendererHTML):
    """Links that lead nowhere unseen, headings below the page's, and no image: those would call other hosts."""

    def image(self, tokens: Sequence[Token], idx: int, options: Any, env: MutableMapping[str, Any]) -> str:
        del options, env
        return str(Markup('<span class="quiet">[image: {}]</span>').format(tokens[idx].content))

    def link_open(self, tokens: Sequence[Token], idx: int, options: Any, env: MutableMapping[str, Any]) -> str:
        tokens[idx].attrSet("rel", "nofollow noopener noreferrer ugc")
        return self.renderToken(tokens, idx, options, env)

    def heading_open(self, tokens: Sequence[Token], idx: int, options: Any, env: MutableMapping[str, Any]) -> str:
        tokens[idx].tag = _LOWERED[tokens[idx].tag]
        return self.renderToken(tokens, idx, options, env)

    heading_close = heading_open

    def table_open(self, tokens: Sequence[Token], idx: int, options: Any, env: MutableMapping[str, Any]) -> str:
        return '<div class="scroll" tabindex="0">' + self.renderToken(tokens, idx, options, env)

    def table_close(self, tokens: Sequence[Token], idx: int, options: Any, env: MutableMapping[str, Any]) -> str:
        return self.renderToken(tokens, idx, options, env) + "</div>"

    # Alignment would come as a style attribute, which the pages' policy refuses.
    def th_open(self, tokens: Sequence[Token], idx: int, options: Any, env: MutableMapping[str, Any]) -> str:
        tokens[idx].attrs.pop("style", None)
        return self.renderToken(tokens, idx, options, env)

    td_open = th_open


class _Markdown(MarkdownIt):
    """CommonMark and tables; raw HTML is text, and links go to the web or to a heading."""

    def __init__(self) -> None:
        super().__init__("commonmark", {"html": False}, renderer_cls=_Renderer)
        self.enable(["table", "strikethrough"])

    def validateLink(self, url: str) -> bool:  # noqa: N802
        return _SAFE_LINK.match(url.strip()) is not None and super().validateLink(url)


_MARKDOWN = _Markdown()


def card_html(card: str) -> Markup:
    """Render a card without its front matter; what is beyond all reason in length is cut."""
    body = _FRONT_MATTER.sub("", card.replace("\r\n", "\n"), count=1)[:_MAX_CHARACTERS]
    # Safe: the renderer escapes all text, and no rule above gives out what it was given.
    return Markup(_MARKDOWN.render(body))  # noqa: S704
