"""Pages that need no server: a template with its pictures inside."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def html(package: str, template: str, filters: dict[str, Callable[..., Any]] | None = None, **values: Any) -> str:
    """A page. What values say is escaped, and the filter `base64` puts a picture in, by its path.

    Args:
        package: Whose folder `templates` has the template.
        template: Its name.
        filters: Further filters of the template, by name.
        values: What the template shows.
    """
    pages = Environment(
        loader=PackageLoader(package),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    pages.filters["base64"] = lambda path: base64.b64encode(path.read_bytes()).decode()
    pages.filters.update(filters or {})
    return pages.get_template(template).render(**values)
