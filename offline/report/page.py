"""The page: templates, style and script in one file that loads nothing."""

import base64
import hashlib
import re
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from grains_vllm import __version__
from offline.plot_points import MEASURES, POSITIONS, Sweep
from offline.plot_style import layers_text
from offline.report import facts, figures, numbers, remarks
from offline.report.comparison import comparison
from offline.report.examples import examples
from offline.report.inputs import Inputs
from offline.report.shares import shares
from offline.report.text import visible
from offline.report.theme import style_sheet

_FOLDER = Path(__file__).parent


def render(inputs: Inputs) -> str:
    """The HTML document; equal inputs give equal text."""
    parts = ["style.css", "picture.css"], ["page.js", "picture.js"]
    styles, scripts = parts if _pictured(inputs) else (names[:1] for names in parts)
    style = style_sheet() + "".join(_squeezed(_template(name)) for name in styles)
    script = "".join(_template(name) for name in scripts)
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    environment = _environment()
    return environment.get_template("page.html.j2").render(
        inputs=inputs, style=Markup(style), script=Markup(script), policy=policy,
        version=__version__, MEASURES=MEASURES, POSITIONS=POSITIONS,
    )  # fmt: skip


def title(inputs: Inputs) -> str:
    """What the page is about, by name."""
    results = [*inputs.sweeps, *inputs.evaluations, *inputs.baselines]
    names = [subject.name for subject in inputs.subjects] or [result.name for result in results]
    return ", ".join(visible(name) for name in names)


def _pictured(inputs: Inputs) -> bool:
    """Whether any prompt has an image; pages without are as if there were none."""
    records = (record for subject in inputs.subjects for record in subject.records or [])
    return any(record.get("image") is not None for record in records)


def _template(name: str) -> str:
    return (_FOLDER / "templates" / name).read_text()


def _measured(sweep: Sweep) -> list[str]:
    """The measures that any point has."""
    return [name for name in MEASURES if any(point[name] is not None for point in sweep["points"])]


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalised,
    )
    environment.globals |= {
        "facts": facts,
        "figures": figures,
        "examples": examples,
        "title": title,
        "measured": _measured,
        "remarks": remarks,
        "shares": shares,
        "comparison": lambda subjects: comparison(subjects, numbers.number),
    }
    environment.filters |= {
        "number": numbers.number,
        "signed": numbers.signed,
        "whole": numbers.whole,
        "strength": numbers.strength,
        "layers": layers_text,
        "verdict": _verdict,
    }
    return environment


def _finalised(value: Any) -> Any:
    """Nothing invisible or half a character reaches the page, wherever it comes from."""
    if type(value) is str and not value.isprintable():
        return "\n".join(visible(line) for line in value.split("\n"))
    return value


def _verdict(difference: dict[str, Any], higher_is_better: bool | None) -> str:
    """What an interval of a difference says in a word."""
    low, high = difference["low"], difference["high"]
    if low is None or high is None:
        return ""
    if low <= 0 <= high:
        return "no clear difference"
    if higher_is_better is None:
        return "higher" if low > 0 else "lower"
    return "better" if (low > 0) is higher_is_better else "worse"


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _squeezed(css: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"/\*.*?\*/", "", css, flags=re.DOTALL))
