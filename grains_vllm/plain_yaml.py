"""YAML that says no more than JSON can, in which nothing is said twice.

PyYAML by itself keeps the last of two equal keys, makes dates, sets and bytes of some texts, and
multiplies whatever aliases name.
"""

from typing import Any, ClassVar

import yaml

from grains_vllm.checks import short

# More than any list of vectors; PyYAML takes some ten seconds for as much.
MAX_BYTES = 2**21
MAX_VALUES = 200_000
# Values that aliases may stand for, all together.
MAX_REPEATED = 100_000
_LONGEST_NUMBER, _LONGEST_PROBLEM = 100, 200  # characters
_TAG = "tag:yaml.org,2002:"
_KINDS = ("str", "int", "float", "bool", "null", "seq", "map")


class PlainYAMLError(ValueError):
    """Text that is no YAML of this kind; the message is one line and says where."""


def load(payload: bytes) -> Any:
    """What the one document says: text, numbers, True, False, None, lists and dicts of them.

    Raises:
        PlainYAMLError: also for a key that cannot be one, or that stands twice in its mapping.
    """
    try:
        return _Loader(payload.decode()).get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = ", ".join(filter(None, (error.context, error.problem)))
        raise PlainYAMLError(place + problem[:_LONGEST_PROBLEM]) from error
    # ValueError and OverflowError: escapes and versions that PyYAML converts without a look.
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise PlainYAMLError(" ".join(str(error).split())[:_LONGEST_PROBLEM]) from error
    except RecursionError as error:
        raise PlainYAMLError("it is nested too deeply") from error


def _refusal(problem: str, node: Any) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def _unknown(_: Any, node: Any) -> None:
    value = short(node.value) if isinstance(node, yaml.ScalarNode) else "this"
    kind = node.tag.removeprefix(_TAG)
    raise _refusal(f"{value} is a {short(kind)}, expected one of {', '.join(_KINDS)}", node)


class _Loader(yaml.SafeLoader):
    yaml_constructors: ClassVar[dict[str | None, Any]] = {
        **{_TAG + kind: yaml.SafeLoader.yaml_constructors[_TAG + kind] for kind in _KINDS},
        None: _unknown,
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.deep_construct = True  # at once, so that a list that holds itself is found
        self._sizes: dict[int, int] = {}
        self._values = self._repeated = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        alias = self.check_event(yaml.AliasEvent)
        mark, before = self.peek_event().start_mark, self._values
        node = super().compose_node(parent, index)
        if alias:
            # Of one that is still open the size is not known, nor needed: it is refused later.
            repeated = self._sizes.get(id(node), 0)
            self._repeated += repeated
            self._values += repeated
            if self._repeated > MAX_REPEATED:
                raise yaml.composer.ComposerError(
                    None, None, f"aliases stand for more than {MAX_REPEATED} values", mark
                )
        else:
            self._values += 1
            if self._values - self._repeated > MAX_VALUES:
                raise yaml.composer.ComposerError(
                    None, None, f"it holds more than {MAX_VALUES} values", mark
                )
            self._sizes[id(node)] = self._values - before
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        kind = node.tag.removeprefix(_TAG)
        if kind in ("int", "float") and len(node.value) > _LONGEST_NUMBER:
            raise _refusal(f"{short(node.value)} is too long for a number", node)
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, ArithmeticError) as error:
            raise _refusal(f"{short(node.value)} cannot be read as {kind}", node) from error

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        if not isinstance(node, yaml.MappingNode):
            raise _refusal("expected a mapping", node)
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == _TAG + "merge":  # `<<: *base`, which may be overridden
                continue
            key = self.construct_object(key_node)
            if isinstance(key, list | dict):
                raise _refusal("a list or a mapping cannot be a key", key_node)
            if key in seen:
                raise _refusal(f"the key {short(key)} stands here twice", key_node)
            seen.add(key)
        return super().construct_mapping(node, deep)
