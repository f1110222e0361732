"""Values as Java or JavaScript source literals: what the arguments of those categories are.

Upstream's checker reads a literal back with a converter of its own, which knows only some spellings. So a literal is
the first spelling of a value that the converter reads back as that value, or the plainest where there is none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from backends.environments.bfcl import upstream

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


def source_literal(category: str, parameter: Mapping[str, Any], value: Any) -> Any:
    """`value` for a parameter described by upstream's document; unchanged where arguments are plain JSON."""
    convert = upstream.literal_converter(category)
    if convert is None:
        return value
    kind = parameter.get("type", "any")
    element = parameter.get("items", {}).get("type")
    spell = _java if category == "simple_java" else _javascript
    spellings = list(spell(value))
    return next((text for text in spellings if convert(text, kind, element) == value), spellings[0])


def _scalar(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _quoted(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else _scalar(value)


def _long(value: Any) -> str:
    return f"{value}L"


def _java(value: Any) -> Iterator[str]:
    match value:
        case list():
            for element in (_quoted, _scalar, _long):
                listed = ", ".join(map(element, value))
                yield f"new ArrayList<>(Arrays.asList({listed}))"
                yield f"new Object[]{{{listed}}}"
        case dict():
            puts = " ".join(f'put("{key}", {_quoted(held)});' for key, held in value.items())
            yield f"new HashMap<String, Object>() {{{{ {puts} }}}}"
        case _:
            yield _scalar(value)
            yield _long(value)
            yield f"{value}f"


def _javascript(value: Any) -> Iterator[str]:
    match value:
        case list():
            yield f"[{', '.join(map(_quoted, value))}]"
            yield f"[{', '.join(map(_scalar, value))}]"
        case dict():
            fields = ", ".join(f"{key}: {_field(held)}" for key, held in value.items())
            yield f"{{{fields}}}"
        case _:
            yield _scalar(value)
            yield f"{value}n"


def _field(value: Any) -> str:
    return next(_javascript(value)) if isinstance(value, list | dict) else _quoted(value)
