"""Charts in the page's colours: light and dark, one variable per colour of the plots' palette."""

import re
from xml.etree import ElementTree

from markupsafe import Markup
from matplotlib.figure import Figure

from offline.plot_style import GRID, INK, LESS, LINES, MORE, MUTED, SURFACE, rendered

# fmt: off
_DARK_LINES = ("#5aa9ea", "#f08a4b", "#3fbf95", "#d68bc0", "#c9b83e", "#98a4f5")
_DARK_LESS = ("#28201a", "#382618", "#472c16", "#573113", "#673711", "#773d0f", "#86430c", "#96490a")  # noqa: E501
_DARK_MORE = ("#17222e", "#182c40", "#193652", "#1a4064", "#1c4a75", "#1d5487", "#1e5e99", "#1f68ab")  # noqa: E501
# fmt: on


def _numbered(letter: str, light: tuple[str, ...], dark: tuple[str, ...]) -> dict[str, list[str]]:
    pairs = enumerate(zip(light, dark, strict=True), 1)
    return {f"{letter}{number}": list(colours) for number, colours in pairs}


# name: [light, dark]; "l" and "m" are shades for less and more, "c" are lines.
COLOURS = {
    "ink": [INK, "#e4e7eb"],
    "muted": [MUTED, "#9aa3ae"],
    "grid": [GRID, "#31363d"],
    "surface": [SURFACE, "#16191d"],
    **_numbered("c", LINES, _DARK_LINES),
    **_numbered("l", LESS, _DARK_LESS),
    **_numbered("m", MORE, _DARK_MORE),
}
_NAMES = {light: name for name, (light, _) in COLOURS.items()}
_NUMBER = re.compile(r"-?\d+\.\d{3,}")
_REFERENCE = re.compile(r"url\(#([^)]+)\)")


def style_sheet() -> str:
    """CSS: a variable per colour, and the classes that charts and tokens use."""
    variables = "".join(
        f"--{name}:light-dark({light},{dark});" for name, (light, dark) in COLOURS.items()
    )
    rules = "".join(
        f".f-{name}{{fill:var(--{name})}}.s-{name}{{stroke:var(--{name})}}" for name in COLOURS
    )
    shades = "".join(
        f".{side}{n}{{background:var(--{side}{n})}}" for side in "lm" for n in range(1, 9)
    )
    return f":root{{{variables}}}{rules}{shades}"


def chart(figure: Figure, description: str, prefix: str) -> Markup:
    """The figure as an inline <svg> without style attributes, which the page's policy forbids.

    Args:
        description: for those who cannot see it.
        prefix: keeps the ids of several charts apart.
    """
    figure.set_facecolor("none")
    root = ElementTree.fromstring(rendered(figure, "svg"))
    used = set(_REFERENCE.findall(ElementTree.tostring(root, encoding="unicode")))
    for element in root.iter():
        used |= {v.removeprefix("#") for name, v in element.items() if name.endswith("}href")}
    width = float(root.get("width", "0").removesuffix("pt")) * 4 / 3
    plain = ElementTree.Element("svg")
    plain.attrib = {
        "viewBox": root.get("viewBox", ""),
        "width": f"{width:.0f}",
        "role": "img",
        "aria-label": description,
    }
    for child in root:
        _copy(child, plain, used, prefix)
    return Markup(ElementTree.tostring(plain, encoding="unicode"))


def _copy(
    element: ElementTree.Element, parent: ElementTree.Element, used: set[str], prefix: str
) -> None:
    """Appends a copy without names of files, people or formats, and with classes for colours."""
    tag = element.tag.rpartition("}")[2]
    if tag in ("metadata", "style") or (tag == "path" and not element.get("d", "").strip()):
        return
    copy = ElementTree.SubElement(parent, tag)
    for name, value in element.items():
        name = name.rpartition("}")[2]
        if name == "id":
            if value in used:
                copy.set("id", f"{prefix}-{value}")
        elif name == "href":
            copy.set("href", f"#{prefix}-{value.removeprefix('#')}")
        elif name == "style":
            _spread(value, copy, prefix)
        elif name in ("fill", "stroke"):
            _spread(f"{name}: {value}", copy, prefix)
        elif name == "transform" and value.startswith("rotate(-0 "):
            continue
        else:
            copy.set(name, _tidy(value, prefix))
    if tag == "text":
        copy.text = element.text
    for child in element:
        _copy(child, copy, used, prefix)
    if tag in ("g", "defs") and not len(copy):
        parent.remove(copy)


def _spread(style: str, element: ElementTree.Element, prefix: str) -> None:
    classes = []
    for part in filter(None, (part.strip() for part in style.split(";"))):
        name, _, value = (piece.strip() for piece in part.partition(":"))
        if name in ("fill", "stroke") and value in _NAMES:
            classes.append(f"{name[0]}-{_NAMES[value]}")
        elif name != "font-family":
            element.set(name, _tidy(value, prefix))
    if classes:
        element.set("class", " ".join(classes))


def _tidy(value: str, prefix: str) -> str:
    value = _REFERENCE.sub(rf"url(#{prefix}-\1)", " ".join(value.split()))
    return _NUMBER.sub(lambda match: f"{float(match[0]):.2f}", value)
