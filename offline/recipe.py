"""Recipes: a public data set with everything `grains extract` needs to know about it.

The package's own are in offline/recipes/, docs/recipes.md describes the form, recipe_form.py
checks it.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import jinja2

from offline.errors import InputError
from offline.pairs import (
    Messages,
    NoPreference,
    Pair,
    PairSet,
    digest,
    image_folder,
    require_two_responses,
)
from offline.pictures import picture_of
from offline.recipe_form import JINJA, PLACE, TEMPLATES, Form, Recipe, read_recipe
from offline.sources import read_rows

FOLDER = Path(__file__).parent / "recipes"
Sizes = Mapping[str, int | Literal["rest"]]


def known_recipes() -> list[str]:
    """The names of the package's recipes."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_recipe(name: str) -> Recipe:
    """Reads and validates one of the package's recipes, or a YAML file of one's own.

    Raises:
        InputError: no such recipe, or a broken one.
    """
    own = name.lower().endswith((".yaml", ".yml"))
    if not (Path(name).is_file() if own else name in known_recipes()):
        raise InputError(
            f"--recipe is '{name}': no such recipe, expected {', '.join(known_recipes())} or a "
            ".yaml file"
        )
    return read_recipe(Path(name) if own else FOLDER / f"{name}.yaml")


def require_pairs(recipe: Recipe) -> None:
    """Raises InputError unless steering vectors can be extracted from the recipe's data."""
    if not recipe.pairs:
        tasks = ", ".join(f"--task {task}" for task in recipe.evaluate)
        raise InputError(
            f"recipe '{recipe.name}': its data has no preference pairs to extract from, it only "
            f"evaluates" + (f" (grains evaluate {tasks})" if tasks else "")
        )


def load_splits(
    recipe: Recipe,
    source: str | None = None,
    *,
    split: str | None = None,
    chat: bool | None = None,
    calibration: int | None = None,
    allow_image_urls: bool = False,
) -> dict[str, PairSet]:
    """Reads the recipe's pairs: "calibration", "validation" and "test", no prompt in two of them.

    Args:
        source: a file or data set with the same columns, instead of the recipe's own.
        split: of a folder or hub data set, instead of the recipe's.
        chat: chat or raw prompts, instead of the recipe's.
        calibration: this many calibration pairs instead. Fewer leave the other splits as they
            are.
        allow_image_urls: download images that the data names by http(s) addresses.

    Raises:
        InputError: naming file, row, column or option.
    """
    require_pairs(recipe)
    assert recipe.splits is not None
    as_chat = recipe.format == "chat" if chat is None else chat
    if recipe.images is not None and not as_chat:
        raise InputError(
            f"recipe '{recipe.name}': its prompts hold images, which only chat prompts can"
        )
    forms = [form.columns for form in recipe.pairs]
    data = recipe.data
    try:
        name, sha256, rows = read_rows(
            source or data.hub, split or data.split, None if source else data.config, forms
        )
    except InputError as error:
        hint = "" if source else "; --data takes a file or folder with the same columns instead"
        raise InputError(f"{error}{hint}") from error
    # Not all of a large data set with images has room in memory.
    every = 1 if source else data.every
    folder = image_folder(source or data.hub)
    made: list[Pair | None] = []
    ties: list[NoPreference] = []
    for number, (where, row) in enumerate(rows, 1):
        if (number - 1) % every:
            continue
        try:
            made.append(_pair(recipe, row, where, number, folder, allow_image_urls))
        except NoPreference as error:
            made.append(None)
            ties.append(error)
    bare = [pair for pair in made if pair is not None]
    if ties and not bare:
        raise ties[0]
    if not bare:
        raise InputError(f"{name}: recipe '{recipe.name}' makes no pairs of its {len(made)} rows")
    wanted = calibration or recipe.splits.calibration
    sizes: Sizes = {
        "calibration": max(wanted, recipe.splits.calibration),
        "validation": recipe.splits.validation,
        "test": recipe.splits.test,
    }
    try:
        # Before they are formatted, so that chat and raw vectors come from the same questions.
        drawn = split_pairs(bare, sizes, recipe.splits.seed)
    except InputError as error:
        raise InputError(f"{name}, recipe '{recipe.name}': {error}") from error
    drawn["calibration"] = drawn["calibration"][:wanted]
    facts = {
        "name": recipe.name, "sha256": recipe.sha256, "seed": recipe.splits.seed,
        "sizes": {part: len(pairs) for part, pairs in drawn.items()},
        "skipped_rows": len(made) - len(bare),
    }  # fmt: skip
    sha256 = sha256 or digest([pair.fingerprint for pair in bare])
    return {
        part: PairSet(
            name, sha256, len(bare), [_formatted(recipe, pair, as_chat) for pair in pairs],
            {"recipe": {**facts, "split": part}},
        )
        for part, pairs in drawn.items()
    }  # fmt: skip


def split_pairs(pairs: Sequence[Pair], sizes: Sizes, seed: int) -> dict[str, list[Pair]]:
    """Draws disjoint splits: all pairs with one prompt are in one split.

    Prompts are ordered by a hash of seed and fingerprint, whatever their order in `pairs`, and the
    splits filled one after another; a smaller split is the start of a larger one.

    Args:
        sizes: pairs per split, in the order in which they are filled; "rest" takes what is left.

    Raises:
        InputError: there are too few pairs.
    """
    by_prompt: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_prompt.setdefault(pair.prompt_fingerprint, []).append(pair)
    order = sorted(by_prompt, key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).digest())
    left = iter(order)
    splits = {}
    for name, size in sizes.items():
        members: list[Pair] = []
        limit = len(pairs) if size == "rest" else size
        while len(members) < limit:
            prompt = next(left, None)
            if prompt is None:
                break
            members += by_prompt[prompt]
        if len(members) < (1 if size == "rest" else limit):
            raise InputError(
                f"{len(pairs)} pairs with {len(order)} different prompts are too few for the "
                f"splits {dict(sizes)}; '{name}' gets {len(members)}"
            )
        splits[name] = members[:limit]
    return splits


def _pair(
    recipe: Recipe, row: Any, where: str, number: int, folder: Path, allow_urls: bool
) -> Pair | None:
    """The bare pair of a row, or None where the recipe leaves the row out."""
    form = _form(recipe, row, where)
    empty = [name for name in form.columns if row[name] is None]
    if empty:
        raise InputError(f"{where}: '{empty[0]}' is empty")
    values = {**row, "row": row}
    try:
        if form.keep is not None and not JINJA.compile_expression(form.keep, False)(**values):
            return None
        texts = {
            key: JINJA.from_string(getattr(form, key)).render(**values).strip()
            for key in TEMPLATES
            if getattr(form, key) is not None
        }
    except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise InputError(f"{where}: recipe '{recipe.name}' cannot read it ({error})") from error
    if not texts["prompt"]:
        raise InputError(f"{where}: recipe '{recipe.name}' makes an empty prompt of it")
    picture = None
    if recipe.images is not None:
        picture = picture_of(row[recipe.images], where, folder, allow_urls=allow_urls)
    pair = Pair(
        texts.get("id") or str(number), where, texts["prompt"], texts["chosen"], texts["rejected"],
        picture=picture,
    )  # fmt: skip
    return require_two_responses(pair, "chosen", "rejected")


def _form(recipe: Recipe, row: Any, where: str) -> Form:
    for form in recipe.pairs:
        if isinstance(row, Mapping) and set(form.columns) <= set(row):
            return form
    found = list(row) if isinstance(row, Mapping) else type(row).__name__
    expected = " or ".join(str(form.columns) for form in recipe.pairs)
    raise InputError(f"{where}: its columns are {found}, recipe '{recipe.name}' expects {expected}")


def _formatted(recipe: Recipe, pair: Pair, chat: bool) -> Pair:
    assert isinstance(pair.prompt, str)
    if chat:
        messages: Messages = [{"role": "user", "content": pair.prompt}]
        return replace(pair, prompt=messages)
    start = recipe.raw.prompt.index(PLACE)
    return replace(
        pair,
        prompt=recipe.raw.prompt.replace(PLACE, pair.prompt),
        chosen=recipe.raw.response.replace(PLACE, pair.chosen),
        rejected=recipe.raw.response.replace(PLACE, pair.rejected),
        question=(start, start + len(pair.prompt)),
    )
