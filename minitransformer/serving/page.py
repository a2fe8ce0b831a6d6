"""`/`: a page for the browser that chats and completes through the same interface as every other client."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

from fastapi import APIRouter
from fastapi.responses import Response

router = APIRouter()
PAGE = (files(__package__) / "page.html").read_text(encoding="utf-8")


def security_policy(page: str) -> str:
    """The Content-Security-Policy of `page`: its own script and style, requests to its own server, and nothing else."""

    def hashes(tag: str) -> str:
        contents = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(each.encode()).digest()).decode() for each in contents)
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'"
    )


HEADERS = {
    "Content-Security-Policy": security_policy(PAGE),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@router.get("/", include_in_schema=False)
async def show_page() -> Response:
    """The page, which asks nothing of any other server."""
    return Response(PAGE, headers=HEADERS, media_type="text/html")
