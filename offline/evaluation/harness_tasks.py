"""Loading tasks of lm-evaluation-harness: its own, and ours with their local files."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from offline.errors import InputError

# Our name: lm-eval's, its folder there (None: ours, `tasks`), and who reads a local file.
KNOWN = {
    "truthfulqa-mc1": ("truthfulqa_mc1", "truthfulqa", "truthfulqa"),
    "truthfulqa-mc2": ("truthfulqa_mc2", "truthfulqa", "truthfulqa"),
    "truthfulqa-gen": ("truthfulqa_gen", "truthfulqa", "truthfulqa"),
    "toxigen": ("grains_toxigen", None, "toxigen"),
    "faitheval": ("grains_faitheval", None, "faitheval"),
}
GOALS = tuple(KNOWN)
_OURS = Path(__file__).parent / "tasks"
_PREFIX = "lm-eval:"


def require_harness() -> None:
    """Raises InputError, saying what to install, without lm-eval and what its clients need."""
    missing = [name for name in ("lm_eval", "tenacity", "aiohttp") if find_spec(name) is None]
    if missing:
        raise InputError(
            f"{', '.join(missing)} is not installed, which lm-eval tasks need: "
            "pip install 'grains-vllm[eval]'"
        )


def load(name: str, data: str | None) -> dict[str, Any]:
    """What lm-eval's TaskManager loads: `tasks` and `groups` by name.

    Raises:
        InputError: no such task, or its data cannot be read.
    """
    import datasets
    import lm_eval.tasks

    from offline.evaluation.tasks import documents

    datasets.disable_progress_bars()
    known = KNOWN.get(name)
    with quiet():
        try:
            if known is None:
                if data is not None:
                    raise InputError(
                        f"--task-data: lm-eval's task '{name}' reads its own data; files can be "
                        f"given for {', '.join(GOALS)}"
                    )
                manager = _everything()
                own = name.removeprefix(_PREFIX)
                if own not in manager.all_tasks:
                    raise InputError(
                        f"--task is '{name}', which is neither ours ({', '.join(GOALS)}) nor among "
                        "lm-eval's (`lm-eval ls tasks` lists them)"
                    )
                loaded = manager.load([own])
                return {"tasks": loaded["tasks"], "groups": loaded.get("groups", {})}
            own, folder, reader = known
            place = _OURS if folder is None else Path(lm_eval.tasks.__file__).parent / folder
            manager = lm_eval.tasks.TaskManager(include_path=str(place), include_defaults=False)
            spec: Any = own
            if data is not None:
                found = getattr(documents, reader)(data)
                # A group's member may replace where its documents come from, and nothing else.
                member = {"task": own, "custom_dataset": _splits(found), "dataset_name": None}
                spec = {"group": f"{own}_local", "task": [member]}
            return {"tasks": manager.load([spec])["tasks"], "groups": {}}
        except InputError:
            raise
        except Exception as error:  # lm-eval and `datasets` raise many kinds while loading
            raise InputError(
                f"task '{name}' cannot be loaded ({type(error).__name__}: {error}). Its data comes "
                "from the Hugging Face hub: load it once where there is a network"
                + ("" if known is None else f", or give a file with --task-data {name}=FILE")
            ) from error


@cache
def _everything() -> Any:
    """All of lm-eval's tasks; reading some 14 000 descriptions takes many seconds."""
    import lm_eval.tasks

    return lm_eval.tasks.TaskManager()


def _splits(found: list[dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    import datasets

    data = datasets.Dataset.from_list(found)
    return lambda **_: {"validation": data, "test": data}


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps lm-eval's log off the screen."""
    logger = logging.getLogger("lm_eval")
    before = logger.propagate
    logger.propagate = False
    logger.addHandler(silent := logging.NullHandler())
    try:
        yield
    finally:
        logger.removeHandler(silent)
        logger.propagate = before
