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
from offline.report import facts, figures, remarks
from offline.report.comparison import comparison
from offline.report.examples import examples
from offline.report.inputs import Inputs
from offline.report.text import visible
from offline.report.theme import style_sheet

_FOLDER = Path(__file__).parent
_MINUS = "\N{MINUS SIGN}"


def render(inputs: Inputs) -> str:
    """The HTML document; equal inputs give equal text."""
    style = style_sheet() + _squeezed((_FOLDER / "templates/style.css").read_text())
    script = (_FOLDER / "templates/page.js").read_text()
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
        "comparison": lambda subjects: comparison(subjects, _number),
    }
    environment.filters |= {
        "number": _number,
        "signed": _signed,
        "whole": _whole,
        "strength": _strength,
        "layers": layers_text,
        "verdict": _verdict,
    }
    return environment


def _finalised(value: Any) -> Any:
    """Nothing invisible or half a character reaches the page, wherever it comes from."""
    if type(value) is str and not value.isprintable():
        return "\n".join(visible(line) for line in value.split("\n"))
    return value


def _number(value: float | None, sign: str = "") -> str:
    """Three decimals where that says enough, with a real minus; a dash for nothing."""
    if value is None:
        return "\N{EN DASH}"
    size, sign = abs(value), sign if value else ""
    if size and (size < 0.001 or size >= 1e6):
        text = f"{value:{sign}.2g}"
    else:
        text = f"{value:{sign}.{3 if size < 10 else 2 if size < 100 else 1}f}"
    return text.replace("-", _MINUS)


def _signed(value: float | None) -> str:
    return _number(value, "+")


def _whole(value: float | None) -> str:
    return "\N{EN DASH}" if value is None else f"{value:g}" if value % 1 else f"{value:.0f}"


def _strength(value: float) -> str:
    return f"{value:g}".replace("-", _MINUS)


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
