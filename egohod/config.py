"""Read a run's settings: YAML files, command-line overrides, and the checks of all settings together.

A run is described by one YAML file, read by :func:`load`:

* ``_base_: other.yml`` (or a list) merges other files first, relative to the file that names them;
* ``${a.b}`` refers to another key and ``${oc.env:EGO4D_ROOT}`` to an environment variable;
* ``a.b=c`` on the command line overrides both.

A value is what its setting declares, never what YAML guesses: ``2024_01_01``, ``0123``, ``12:30:45``, ``on`` and
``1e3`` are text where the setting is text, in files and on the command line alike. Only ``null``, ``~`` and nothing at
all are the absent value; quoted (``'null'``) they are words too. A key or value that an earlier release called by
another name is accepted with a warning that names the new one (``old_names`` and ``old_values`` of
:func:`egohod.knobs.knob`).

Whatever is wrong (unknown key, wrong type, value out of range, missing file) ends in one :class:`UserError` that names
the file, the key, what is allowed and the nearest right name.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import logging
import math
import os
import re
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from egohod.data.config import DataConfig
from egohod.errors import UserError
from egohod.evaluation.config import EvaluateConfig
from egohod.knobs import allowed_values, knobs, named_sections, out_of_range, part, raw_value, section_of, type_name
from egohod.loss.config import RELEVANCY_LOSSES, LossConfig
from egohod.model.config import ModelConfig
from egohod.training.config import TrainConfig, duration_in_steps

log = logging.getLogger(__name__)

Schema = typing.TypeVar("Schema")

PROJECT = Path(__file__).resolve().parents[1]
"""The checkout, whose configs/ hold the programs' defaults."""


@dataclass
class Config:
    """A whole run."""

    model: ModelConfig = part(ModelConfig)
    data: DataConfig = part(DataConfig)
    loss: LossConfig = part(LossConfig)
    train: TrainConfig = part(TrainConfig)
    evaluate: EvaluateConfig = part(EvaluateConfig)


_ENVIRONMENT = re.compile(r"\$\{oc\.env:(\w+)\}")


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file with its bases, apply ``a.b=c`` overrides and check everything.

    Raises :class:`UserError` with one line per problem: file (or override), key, what is allowed.
    """
    return load_as(Config, path, overrides, check)


def load_as(
    schema: type[Schema],
    path: str | Path,
    overrides: Sequence[str],
    check: Callable[[Schema], list[tuple[str, str]]],
) -> Schema:
    """As :func:`load`, for a dataclass of :func:`knob` fields other than :class:`Config`.

    ``check`` says what is wrong with values, as :func:`check` does.
    """
    config, problems = _load(schema, path, overrides, check)
    if problems:
        raise UserError(*problems)
    return config


def load_leniently(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Config, list[str]]:
    """As :func:`load`, but environment variables that are not set are returned as a list of problems.

    For the dry run, which reports everything that is missing at once; the variable stays in its value as
    ``$NAME``. Raises :class:`UserError` for anything that is wrong rather than missing.
    """
    return _load(Config, path, overrides, check)


def _load(
    schema: type[Schema],
    path: str | Path,
    overrides: Sequence[str],
    check: Callable[[Schema], list[tuple[str, str]]],
) -> tuple[Schema, list[str]]:
    tree, origins = OmegaConf.structured(schema), {}
    for origin, layer in [*_layers(Path(path), ()), *(_override(text, schema) for text in overrides)]:
        layer = _with_new_names(layer, schema, origin)
        tree = _merge(tree, layer, origin, schema)
        origins.update(dict.fromkeys(_leaves(layer), origin))
    problems = []
    raw = OmegaConf.to_container(tree)
    for name, _, _ in knobs(schema, raw):
        for key, text in _texts(name, raw_value(raw, name.split("."))):
            for variable in _ENVIRONMENT.findall(text):
                if variable not in os.environ:
                    text = text.replace(f"${{oc.env:{variable}}}", f"${variable}")
                    try:
                        OmegaConf.update(tree, key, text)
                    except OmegaConfBaseException:  # a number or a switch: no text can stand in for it
                        raise UserError(
                            f"{origins.get(name, path)}: {key} needs the environment variable {variable}, not set"
                        ) from None
                    problems.append(
                        f"{origins.get(name, path)}: {key} needs the environment variable {variable}, "
                        f"which is not set; export {variable}=/your/path"
                    )
    config = _resolve(tree, str(path), schema)
    wrong = [f"{origins.get(name, path)}: {text}" for name, text in check(config)]
    if wrong:
        raise UserError(*problems, *wrong)
    return config, problems


def model_config(name: str, **overrides: Any) -> ModelConfig:
    """The model section from Python, checked like a file. Raises :class:`UserError`."""
    origin = "create_model"
    layer = {"model": {"name": name, **overrides}}
    config = _resolve(_merge(OmegaConf.structured(Config), layer, origin, Config), origin, Config)
    wrong = [f"{origin}: {text}" for _, text in check(config)]
    if wrong:
        raise UserError(*wrong)
    return config.model


def check(config: Config) -> list[tuple[str, str]]:
    """Everything that is out of range or contradicts itself, as (key, what is wrong with it)."""
    problems = out_of_range(config)
    tree = dataclasses.asdict(config)
    if config.loss.local_loss and not config.loss.gather_with_grad:
        problems.append(
            (
                "loss.gather_with_grad",
                "loss.local_loss=true needs loss.gather_with_grad=true: without it the gradient is biased "
                "(cosine 0.92 to the true one on two processes)",
            )
        )
    if config.model.fast.spatial and config.model.patch_dropout > 0:
        problems.append(
            ("model.fast.spatial", "model.fast.spatial=true looks at whole frames, so it needs model.patch_dropout=0")
        )
    for name in ("train.duration", "train.log_every", "train.save_every", "evaluate.every", "train.warmup"):
        text = raw_value(tree, name.split("."))
        try:
            steps = duration_in_steps(text, steps_per_epoch=1, global_batch_size=1, key=name)
            if steps == 0 and name != "train.warmup":
                problems.append((name, f"{name} is '{text}', but must be longer than nothing"))
        except UserError as error:
            problems.append((name, str(error)))
    if config.evaluate.controls and config.model.num_frames < 2:
        problems.append(
            ("evaluate.controls", "evaluate.controls destroy the order of frames, but model.num_frames is 1")
        )
    if len(config.train.betas) != 2 or not all(0 <= beta < 1 for beta in config.train.betas):
        problems.append(
            ("train.betas", f"train.betas is {list(config.train.betas)}, but must be two numbers in [0, 1)")
        )
    if config.train.schedule == "cosine" and config.train.lr_end > config.train.lr:
        problems.append(
            (
                "train.lr_end",
                f"train.lr_end is {config.train.lr_end}, but a cosine falls: at most train.lr={config.train.lr}",
            )
        )
    if (config.loss.name in RELEVANCY_LOSSES) != (config.data.labels.target == "relevancy"):
        problems.append(
            (
                "loss.name",
                f"loss.name={config.loss.name} grades texts by relevancy, so it needs data.labels.target=relevancy"
                if config.loss.name in RELEVANCY_LOSSES
                else f"loss.name={config.loss.name} knows no relevancy; with data.labels.target=relevancy there are "
                + ", ".join(RELEVANCY_LOSSES),
            )
        )
    heads = config.model.heads != "none"
    classes = (heads, config.data.labels.target == "class", config.loss.name == "classes")
    if any(classes) and not all(classes):
        problems.append(
            ("model.heads", "model.heads=joint or parts, data.labels.target=class and loss.name=classes go together")
        )
    columns = [name.removesuffix("_class") for name in config.data.labels.columns]
    if not columns or len(set(columns)) < len(columns):
        what = "names a column twice" if columns else "is empty, but a class is told by at least one column"
        problems.append(("data.labels.columns", f"data.labels.columns={config.data.labels.columns} {what}"))
    elif len(columns) > 1 and "action" in columns:
        problems.append(
            (
                "data.labels.columns",
                "data.labels.columns: what all columns tell together is called action, so none of several can be; "
                "give that column another name",
            )
        )
    for knob_name in ("mixup", "cutmix"):
        if getattr(config.train, knob_name) and config.loss.name != "classes":
            problems.append((f"train.{knob_name}", f"train.{knob_name} mixes labels, so it needs loss.name=classes"))
    if heads and config.model.head_start == "text" and config.model.weights.source == "scratch":
        problems.append(
            ("model.head_start", "model.head_start=text needs a text tower that was trained; set model.weights")
        )
    if heads and config.loss.boxes:
        problems.append(("loss.boxes", "loss.boxes does not go with model.heads: a model with heads tells no boxes"))
    if config.train.trainable == "heads" and not heads:
        problems.append(("train.trainable", "train.trainable=heads needs heads to train; set model.heads"))
    for name in (*config.evaluate.during, *config.evaluate.final):
        if name not in config.evaluate.benchmarks:
            key = "evaluate.during" if name in config.evaluate.during else "evaluate.final"
            known = ", ".join(config.evaluate.benchmarks) or "none"
            problems.append((key, f"{key} names the benchmark '{name}', but evaluate.benchmarks has {known}"))
    measured = [*config.evaluate.during, *(["val"] if config.evaluate.demo_val else [])]
    if measured and config.evaluate.best.partition("/")[0] not in measured:
        problems.append(
            (
                "evaluate.best",
                f"evaluate.best={config.evaluate.best}: while training {' and '.join(measured)} is measured; set "
                f"evaluate.best={measured[0]}/METRIC",
            )
        )
    weighted = [source.weight is not None for source in config.data.train.values()]
    if any(weighted) and not all(weighted):
        name = f"data.train.{list(config.data.train)[weighted.index(False)]}.weight"
        problems.append((name, f"{name} is not set, but other sources have a weight; set it for all or for none"))
    if config.loss.boxes and config.data.train and not any(each.detections for each in config.data.train.values()):
        name = f"data.train.{next(iter(config.data.train))}.detections"
        problems.append((name, f"loss.boxes={config.loss.boxes} needs boxes to learn from; set {name}"))
    if config.model.weights.source != "scratch" and not config.model.weights.path:
        problems.append(
            ("model.weights.path", f"model.weights.source={config.model.weights.source} needs model.weights.path")
        )
    return problems


def to_yaml(config: Any) -> str:
    """The resolved configuration as YAML; reading it back gives the same run."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _layers(path: Path, seen: tuple[Path, ...]) -> list[tuple[str, dict[str, Any]]]:
    """The file and its bases, the deepest base first."""
    if path.resolve() in seen:
        raise UserError(f"{path}: _base_ leads back to the file itself")
    if not path.is_file():
        near = difflib.get_close_matches(str(path), [str(p) for p in path.parent.glob("*.y*ml")], n=1, cutoff=0.5)
        if (PROJECT / path).is_file():
            near = [str(PROJECT / path)]
        raise UserError(f"{path}: no such config file" + (f"; did you mean {near[0]}?" if near else ""))
    try:
        # Bytes, not text: PyYAML then recognises byte order marks and UTF-16.
        loaded = _parse_yaml(path.read_bytes())
    except Exception as error:  # PyYAML raises many kinds; each is the file's fault
        raise UserError(f"{path}: not readable as YAML: {_one_line(error)}") from error
    loaded = {} if loaded is None else loaded
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: a config must be a mapping of sections, such as 'train: ...'")
    bases = loaded.pop("_base_", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise UserError(f"{path}: _base_ must be the name of a config file, or a list of names")
    below: list[tuple[str, dict[str, Any]]] = []
    for base in bases:
        below += _layers(path.parent / base, (*seen, path.resolve()))
    return [*below, (str(path), loaded)]


def _with_new_names(layer: dict[str, Any], schema: type, origin: str) -> dict[str, Any]:
    """The layer with the keys and values of earlier releases replaced by today's, each with a warning."""
    layer = copy.deepcopy(layer)  # its file may be the base of another one, read again
    notice = "%s: %s is now %s; the old name is read for one more release"
    for old, new in _old_keys(schema):
        for path in list(_matches(layer, old.split("."))):
            chosen = iter(key for key, pattern in zip(path, old.split("."), strict=True) if pattern == "NAME")
            target = [next(chosen) if key == "NAME" else key for key in new.split(".")]
            log.warning(notice, origin, ".".join(path), ".".join(target))
            value = raw_value(layer, path[:-1]).pop(path[-1])
            section = layer
            for key in target[:-1]:
                section = section.setdefault(key, {})
            section.setdefault(target[-1], value)
    for name, entry, _ in knobs(schema):
        old_values: dict[str, str] = entry.metadata.get("old_values") or {}
        for path in _matches(layer, name.split(".")) if old_values else ():
            section = raw_value(layer, path[:-1])
            old = section[path[-1]]
            if isinstance(old, str) and old in old_values:
                section[path[-1]] = old_values[old]
                log.warning(notice, origin, f"{'.'.join(path)}={old}", old_values[old])
    return layer


def _old_keys(schema: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(old, new) dotted names of all knobs and sections that were renamed."""
    hints = typing.get_type_hints(schema)
    for entry in dataclasses.fields(schema):
        name, kind = f"{prefix}{entry.name}", hints[entry.name]
        for old in entry.metadata.get("old_names", ()):
            yield (old if "." in old else f"{prefix}{old}"), name
        if section := section_of(kind):
            yield from _old_keys(section, f"{name}.")
        elif named := named_sections(kind):
            yield from _old_keys(named, f"{name}.NAME.")


def _matches(tree: Any, pattern: Sequence[str]) -> Iterator[list[str]]:
    """The paths in a nested dict that a dotted key stands for; NAME is any name."""
    if not pattern:
        yield []
    elif isinstance(tree, dict):
        for key in list(tree) if pattern[0] == "NAME" else [pattern[0]] if pattern[0] in tree else []:
            for rest in _matches(tree[key], pattern[1:]):
                yield [key, *rest]


def _leaves(tree: Any, prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        yield f"{prefix}{key}"


def _texts(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """The strings in a knob's value, with their keys."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _texts(f"{name}.{key}", inner)
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            yield from _texts(f"{name}[{place}]", inner)
    elif isinstance(value, str):
        yield name, value


# No configuration is so large or so deep; aliases that hold themselves or each other are without end.


# No configuration is so large or so deep; aliases that hold themselves or each other are without end.
_MOST_VALUES, _DEEPEST = 100_000, 50


class _TextLoader(yaml.SafeLoader):
    """YAML without guesses: scalars stay as written, but for a plain null, and keys are text that occurs once."""

    # Of PyYAML's guesses only two are put back below: null, and the merge key "<<".
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's, of the class

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Refuse keys that are no text or occur twice; here, because merge keys may repeat some later."""
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be text", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key '{key.value}'", key.start_mark)
            seen.add(key.value)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[typing.Hashable, Any]:
        """As the base class, but a key is what is written: even null and quoted numbers are names."""
        self.flatten_mapping(node)
        return {key.value: self.construct_object(value, deep=deep) for key, value in node.value}


def _construct_text(loader: yaml.SafeLoader, node: yaml.Node) -> str:
    assert isinstance(node, yaml.ScalarNode)
    return node.value


_TextLoader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"(?:~|null|Null|NULL|)\Z"), ["~", "n", "N", ""])
_TextLoader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"<<\Z"), ["<"])
for _tag in ("bool", "int", "float", "timestamp", "merge"):  # written out, as in "!!int 5", or "<<" that is no key
    _TextLoader.add_constructor(f"tag:yaml.org,2002:{_tag}", _construct_text)


def _parse_yaml(content: str | bytes) -> Any:
    """Nested dicts and lists of text and None. Raises yaml.YAMLError, or ValueError for what is without end."""
    tree = yaml.load(content, _TextLoader)
    values, levels = _size(tree, {})
    if values > _MOST_VALUES:
        raise ValueError(f"its aliases stand for more than {_MOST_VALUES:,} values")
    if levels > _DEEPEST:
        raise ValueError(f"nested deeper than {_DEEPEST} levels")
    return tree


def _size(tree: Any, known: dict[int, tuple[float, float]]) -> tuple[float, float]:
    """How many values and levels a tree has once its aliases are written out, infinitely many if one is within itself.

    ``known`` are the sizes by id: what a few lines of aliases of aliases stand for cannot be counted one by one.
    """
    if not isinstance(tree, (dict, list)):
        return 1, 0
    if id(tree) not in known:
        known[id(tree)] = math.inf, math.inf
        inside = [_size(each, known) for each in (tree.values() if isinstance(tree, dict) else tree)]
        known[id(tree)] = 1 + sum(values for values, _ in inside), 1 + max((levels for _, levels in inside), default=0)
    return known[id(tree)]


def _override(text: str, schema: type) -> tuple[str, dict[str, Any]]:
    name, equals, written = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_][\w.]*", name) or name.count(".") > _DEEPEST:
        raise UserError(f"'{text}': overrides are written section.key=value, e.g. train.seed=1")
    keys = name.split(".")
    try:
        value = _text_value(written.strip()) if _is_text(_kind(schema, keys)) else _parse_yaml(written)
    except Exception as error:
        raise UserError(f"override '{text}': {_one_line(error)}") from error
    tree = {keys[-1]: value}
    for key in reversed(keys[:-1]):
        tree = {key: tree}
    return f"override '{text}'", tree


def _text_value(written: str) -> str | None:
    """A text knob's value as the command line spells it: all of it, unless it is null or in quotes."""
    if written in ("null", "~"):
        return None
    if len(written) > 1 and written[0] == written[-1] and written[0] in "'\"":
        value = _parse_yaml(written)
        assert isinstance(value, str)
        return value
    return written


def _kind(schema: Any, keys: Sequence[str]) -> Any:
    """The declared type of a dotted key; None where the schema has no such key."""
    for key in keys:
        if section := section_of(schema):
            schema = typing.get_type_hints(section).get(key)
        else:
            schema = get_args(schema)[1] if get_origin(schema) is dict else None
    return schema


def _is_text(kind: Any) -> bool:
    return kind is str or set(get_args(kind)) == {str, type(None)}


def _merge(tree: DictConfig, layer: dict[str, Any], origin: str, schema: type) -> DictConfig:
    unknown = _unknown(layer, schema, schema)
    if unknown:
        raise UserError(*(f"{origin}: {text}" for text in unknown))
    try:
        return typing.cast(DictConfig, OmegaConf.merge(tree, OmegaConf.create(layer)))
    except OmegaConfBaseException as error:
        raise UserError(f"{origin}: {_explain(error, schema)}") from error


# It is a part of keys, which dots separate, and of file names.
_CHOSEN_NAME = re.compile(r"[\w -]+")


def _unknown(tree: Any, schema: type, whole: type, prefix: str = "") -> list[str]:
    """Keys that no section has; omegaconf would say so too, but without the nearest right name."""
    hints, problems = typing.get_type_hints(schema), []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if key not in hints:
            problems.append(f"unknown key '{name}'{_suggest(key, schema, whole, prefix)}")
            continue
        section, named = section_of(hints[key]), named_sections(hints[key])
        if section:
            problems += _unknown_in(value, section, whole, name)
        elif named and not isinstance(value, dict):
            problems.append(f"'{name}' holds sections with names of your choice, not a value")
        elif named:
            for chosen, inner in value.items():
                if not _CHOSEN_NAME.fullmatch(str(chosen)):
                    problems.append(f"'{name}' has the name '{chosen}'; use letters, digits, spaces, '-' and '_'")
                    continue
                problems += _unknown_in(inner, named, whole, f"{name}.{chosen}")
        else:
            problems += _misshapen(name, value, hints[key])
    return problems


def _misshapen(name: str, value: Any, kind: Any) -> Iterator[str]:
    """Sections and lists where a knob has none; omegaconf lets some of them pass, to fail elsewhere."""
    if isinstance(value, (dict, list)) and get_origin(kind) is not type(value):
        shapes = {list: "a list, such as [a, b]", dict: "a mapping, such as {a: b}"}
        shape = shapes.get(get_origin(kind), "one value")
        yield f"'{name}' is {shape}, not a {type(value).__name__}"
    elif isinstance(value, (dict, list)) and get_args(kind)[-1] is not Any:
        inside = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in inside:
            yield from _misshapen(
                f"{name}.{key}" if isinstance(value, dict) else f"{name}[{key}]", inner, get_args(kind)[-1]
            )


def _unknown_in(tree: Any, section: type, whole: type, name: str) -> list[str]:
    if isinstance(tree, dict):
        return _unknown(tree, section, whole, f"{name}.")
    keys = ", ".join(entry.name for entry in dataclasses.fields(section))
    return [f"'{name}' is a section with the keys {keys}, not a value"]


def _suggest(key: Any, schema: type, whole: type, prefix: str) -> str:
    """The nearest sibling, else the nearest knob anywhere."""
    siblings = [entry.name for entry in dataclasses.fields(schema)]
    everywhere = {full.rpartition(".")[2]: full for full, _, _ in knobs(whole)}
    exact = everywhere.get(str(key))
    near = difflib.get_close_matches(str(key), siblings, n=1, cutoff=0.75)
    far = difflib.get_close_matches(str(key), everywhere, n=1, cutoff=0.6)
    # A neighbour is the likelier slip, but 'train.lrr' may look like a knob of another section.
    best = prefix + near[0] if near else exact or (everywhere[far[0]] if far else None)
    return f"; did you mean '{best}'?" if best else f"; allowed here: {', '.join(siblings)}"


def _resolve(tree: DictConfig, origin: str, schema: type[Schema]) -> Schema:
    try:
        config = typing.cast(Schema, OmegaConf.to_object(tree))
        # Lists and mappings of values are not checked before.
        OmegaConf.structured(config)
        return config
    except OmegaConfBaseException as error:
        raise UserError(f"{origin}: {_explain(error, schema)}") from error


def _explain(error: OmegaConfBaseException, schema: type) -> str:
    name = getattr(error, "full_key", None) or ""
    entry = next(
        ((e, k) for n, e, k in knobs(schema) if re.fullmatch(re.escape(n).replace("NAME", r"[^.]+"), name)), None
    )
    text = _one_line(error)
    if entry:
        allowed = allowed_values(entry[0].metadata)
        if entry[1] is str and "None" in text:
            allowed = "null is no text; write 'null' in quotes for the word"
        text += f" (key {name}: {type_name(entry[1])}{', ' + allowed if allowed else ''})"
    elif name:
        text += f" (key {name})"
    return text


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split("\n    full_key")[0].split())
