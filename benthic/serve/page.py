"""The page at ``/``: files that come with the package, under a policy that lets nothing else be loaded or run."""

from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from benthic.serve.errors import ApiError

FOLDER = Path(__file__).parent / "static"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
FILES = {"/": FOLDER / "index.html"} | {
    f"/static/{path.name}": path for path in sorted(FOLDER.iterdir()) if path.suffix in _TYPES
}
"""Every path that is served, and its file: nothing is looked up in a folder at a client's word."""


async def page(request: Request) -> Response:
    """One of :data:`FILES`."""
    file = FILES.get(request.url.path)
    if file is None:
        raise ApiError(404, "no such page", code="not_found")
    headers = {"content-security-policy": _POLICY, "cache-control": "no-cache", "x-frame-options": "DENY"}
    return Response(file.read_bytes(), headers=headers, media_type=_TYPES[file.suffix])
