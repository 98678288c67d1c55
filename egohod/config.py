"""Read a run's settings: YAML files, command-line overrides, and the checks of all settings together.

A run is described by one YAML file, read by :func:`load`:

* ``_base_: other.yml`` (or a list) merges other files first, relative to the file that names them;
* ``${a.b}`` refers to another key and ``${oc.env:EGO4D_ROOT}`` to an environment variable;
* ``a.b=c`` on the command line overrides both.

A value is what its setting declares, never what YAML guesses: ``2024_01_01``, ``0123``, ``12:30:45``, ``on`` and
``1e3`` are text where the setting is text, in files and on the command line alike. Only ``null``, ``~`` and nothing at
all are the absent value; quoted (``'null'``) they are words too. What an earlier release called by another
name is accepted with a warning that names the new one: a section with a static method ``convert_old_keys`` translates
its own keys and values.

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
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from egohod.data.config import DataConfig
from egohod.errors import UserError
from egohod.evaluation.config import EvaluateConfig
from egohod.knobs import allowed_values, knobs, named_sections, out_of_range, part, section_of, type_name
from egohod.loss.config import LOSSES, LossConfig
from egohod.model.config import ModelConfig, checkpointed_blocks, image_stats
from egohod.training.config import TrainConfig, clock_seconds, duration_in_steps

log = logging.getLogger(__name__)

Schema = typing.TypeVar("Schema")

_PACKAGE = Path(__file__).resolve().parent
# A wheel carries both folders inside the package. That place comes first: in site-packages a folder of such a name may
# belong to another project.
PROJECT = _PACKAGE if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent
"""The folder that holds configs/ and tools/: the checkout, or the package itself where a wheel is installed."""
IS_CHECKOUT = PROJECT != _PACKAGE
"""Whether PROJECT is a checkout, where requirements.txt and .mediapipe are; nothing is written into a package."""


@dataclass
class Config:
    """A whole run."""

    model: ModelConfig = part(ModelConfig)
    data: DataConfig = part(DataConfig)
    loss: LossConfig = part(LossConfig)
    train: TrainConfig = part(TrainConfig)
    evaluate: EvaluateConfig = part(EvaluateConfig)


_ENVIRONMENT = re.compile(r"\$\{oc\.env:(\w+)\}")
# Such a name is a part of keys, which dots separate, and of file names.
_CHOSEN_NAME = r"[\w -]+"


# --------------------------------------------------------------------------------------------------
# Loading
# --------------------------------------------------------------------------------------------------


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
    missing: list[str] | None = None,
) -> Schema:
    """As :func:`load`, for a dataclass of knobs other than :class:`Config`, with a ``check`` like this module's.

    With a list ``missing``, environment variables that are not set are problems to append to it instead of errors.
    """
    tree, origins = OmegaConf.structured(schema), dict[str, str]()
    for origin, layer in [*_layers(config_path(path), ()), *(_override(text, schema) for text in overrides)]:
        layer = _convert_old_keys(layer, schema, origin, OmegaConf.to_container(tree))
        # Layer by layer, so that a wrong type is reported with the file or override that has it.
        tree = _merge(tree, layer, origin, schema)
        origins.update({name: origin for name, _ in _walk(layer)})

    # Variables that are not set are all reported at once, with the key that needs them and the file it is in.
    problems = []
    for key, text in list(_walk(OmegaConf.to_container(tree))):
        for variable in _ENVIRONMENT.findall(text) if isinstance(text, str) else ():
            if variable not in os.environ:
                where = f"{origins.get(key, path)}: {key} needs the environment variable {variable}"
                text = text.replace(f"${{oc.env:{variable}}}", f"${variable}")
                try:
                    OmegaConf.update(tree, key, text)
                except OmegaConfBaseException:  # a number or a switch: no text can stand in for it
                    raise UserError(f"{where}, not set") from None
                problems.append(f"{where}, which is not set; export {variable}=/your/path")

    config = _resolve(tree, str(path), schema)
    # A value that nobody wrote is a default, whose check can only fail together with the file's own values.
    wrong = [f"{origins.get(name, path)}: {text}" for name, text in check(config)]
    if wrong or (problems and missing is None):
        raise UserError(*problems, *wrong)
    if missing is not None:
        missing += problems
    return config


def load_leniently(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Config, list[str]]:
    """As :func:`load`, but environment variables that are not set are returned as a list of problems.

    For the dry run, which reports everything that is missing at once; the variable stays in its value as
    ``$NAME``. Raises :class:`UserError` for anything that is wrong rather than missing.
    """
    missing: list[str] = []
    return load_as(Config, path, overrides, check, missing), missing


def model_config(name: str, **overrides: Any) -> ModelConfig:
    """The model section from Python, checked like a file. Raises :class:`UserError`."""
    origin = "create_model"
    tree = OmegaConf.structured(Config)
    layer = _convert_old_keys({"model": {"name": name, **overrides}}, Config, origin, OmegaConf.to_container(tree))
    config = _resolve(_merge(tree, layer, origin, Config), origin, Config)
    if wrong := [f"{origin}: {text}" for _, text in check(config)]:
        raise UserError(*wrong)
    return config.model


def to_yaml(config: Any) -> str:
    """The resolved configuration as YAML; reading it back gives the same run."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def config_path(path: str | Path) -> Path:
    """A configuration of the working directory, else the project's of that name (configs/demo.yml), which is logged."""
    path = Path(path)
    # Only there: in a wheel the project's folder is the package, whose other files are no configurations.
    if path.exists() or path.parts[:1] != ("configs",) or not (PROJECT / path).is_file():
        return path
    log.info("%s is not in the working directory; reading the project's, %s", path, PROJECT / path)
    return PROJECT / path


def program(name: str) -> list[str]:
    """The start of a command line that runs pretrain, finetune or eval in a process of its own."""
    script = PROJECT / f"main_{name}.py"
    # A checkout need not be installed, and a wheel has no scripts.
    return [sys.executable, *([str(script)] if script.is_file() else ["-m", "egohod", name])]


def _layers(path: Path, seen: tuple[Path, ...]) -> list[tuple[str, dict[str, Any]]]:
    """The file and its bases, the deepest base first."""
    if path.resolve() in seen:
        raise UserError(f"{path}: _base_ leads back to the file itself")
    if not path.is_file():
        near = difflib.get_close_matches(str(path), [str(p) for p in path.parent.glob("*.y*ml")], n=1, cutoff=0.5)
        raise UserError(f"{path}: no such config file" + (f"; did you mean {near[0]}?" if near else ""))
    try:
        # Bytes, not text: PyYAML then recognises byte order marks and UTF-16.
        content = parse_yaml(path.read_bytes())
    except Exception as error:  # PyYAML raises many kinds; each is the file's fault
        raise UserError(f"{path}: not readable as YAML: {_one_line(error)}") from error
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise UserError(f"{path}: a config must be a mapping of sections, such as 'train: ...'")
    # Not a knob: it belongs to the file, and is gone before keys are checked.
    bases = content.pop("_base_", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise UserError(f"{path}: _base_ must be the name of a config file, or a list of names")
    below = [layer for base in bases for layer in _layers(path.parent / base, (*seen, path.resolve()))]
    return [*below, (str(path), content)]


def _override(text: str, schema: type) -> tuple[str, dict[str, Any]]:
    """A ``a.b=c`` of the command line as one more layer."""
    name, equals, written = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_][\w.]*", name) or name.count(".") > _DEEPEST:
        raise UserError(f"'{text}': overrides are written section.key=value, e.g. train.seed=1")
    keys = name.split(".")
    kind: Any = schema
    for key in keys:
        if section := section_of(kind):
            kind = typing.get_type_hints(section).get(key)
        else:
            kind = get_args(kind)[1] if get_origin(kind) is dict else None
    try:
        # By the type of the knob: where it is text, YAML must not have its say.
        if kind is str or set(get_args(kind)) == {str, type(None)}:
            # All that is written, also "a: b" and "[x", unless it is null or in quotes.
            written = written.strip()
            is_quoted = len(written) > 1 and written[0] == written[-1] and written[0] in "'\""
            value = None if written in ("null", "~") else parse_yaml(written) if is_quoted else written
        else:
            value = parse_yaml(written)
    except Exception as error:
        raise UserError(f"override '{text}': {_one_line(error)}") from error
    tree: dict[str, Any] = {keys[-1]: value}
    for key in reversed(keys[:-1]):
        tree = {key: tree}
    return f"override '{text}'", tree


def _walk(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every value in nested dicts and lists with its dotted key, the outer ones first."""
    yield name, value
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _walk(inner, f"{name}.{key}" if name else f"{key}")
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _walk(inner, f"{name}[{number}]")


def _convert_old_keys(layer: dict[str, Any], schema: type, origin: str, below: Any) -> dict[str, Any]:
    """The layer with the keys and values of earlier releases replaced by today's, each with a warning.

    ``below`` holds the values that the layer is merged into: an old key may stand for several new ones.
    """
    layer = copy.deepcopy(layer)  # its file may be the base of another one, read again
    for name, kind in typing.get_type_hints(schema).items():
        convert = getattr(kind, "convert_old_keys", None)
        if convert is not None and isinstance(layer.get(name), dict):
            for old, new in convert(layer[name], below[name]):
                log.warning("%s: %s is now %s; the old name is read for one more release", origin, old, new)
    return layer


# --------------------------------------------------------------------------------------------------
# YAML without guesses
# --------------------------------------------------------------------------------------------------

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


def parse_yaml(content: str | bytes) -> Any:
    """Nested dicts and lists of text and None. Raises yaml.YAMLError, or ValueError for what is without end."""
    tree = yaml.load(content, _TextLoader)
    values, levels = _size(tree, {})
    if values > _MOST_VALUES:
        raise ValueError(f"its aliases stand for more than {_MOST_VALUES:,} values")
    if levels > _DEEPEST:
        raise ValueError(f"nested deeper than {_DEEPEST} levels")
    return tree


def _size(tree: Any, sizes: dict[int, tuple[float, float]]) -> tuple[float, float]:
    """How many values and levels a tree has once its aliases are written out, infinitely many if one is within itself.

    ``sizes`` are the sizes by id: what a few lines of aliases of aliases stand for cannot be counted one by one.
    """
    if not isinstance(tree, (dict, list)):
        return 1, 0
    if id(tree) not in sizes:
        sizes[id(tree)] = math.inf, math.inf
        inside = [_size(each, sizes) for each in (tree.values() if isinstance(tree, dict) else tree)]
        sizes[id(tree)] = 1 + sum(values for values, _ in inside), 1 + max((levels for _, levels in inside), default=0)
    return sizes[id(tree)]


# --------------------------------------------------------------------------------------------------
# Merging, and the messages about keys and types
# --------------------------------------------------------------------------------------------------


def _merge(tree: DictConfig, layer: dict[str, Any], origin: str, schema: type) -> DictConfig:
    # Before omegaconf sees it: afterwards an unknown key and a wrong type look alike.
    if problems := list(_misshapen(layer, schema, schema)):
        raise UserError(*(f"{origin}: {text}" for text in problems))
    try:
        return typing.cast(DictConfig, OmegaConf.merge(tree, OmegaConf.create(layer)))
    except OmegaConfBaseException as error:
        raise UserError(f"{origin}: {_explain(error, schema)}") from error


def _misshapen(value: Any, kind: Any, whole: type, name: str = "") -> Iterator[str]:
    """Unknown keys, and values where a section belongs or the other way round.

    omegaconf reports unknown keys without the nearest right name, and lets some wrong shapes pass, to fail elsewhere.
    """
    if section := section_of(kind):
        if not isinstance(value, dict):
            keys = ", ".join(entry.name for entry in dataclasses.fields(section))
            yield f"'{name}' is a section with the keys {keys}, not a value"
            return
        hints, prefix = typing.get_type_hints(section), f"{name}." if name else ""
        for key, inner in value.items():
            if key in hints:
                yield from _misshapen(inner, hints[key], whole, f"{prefix}{key}")
            else:
                yield f"unknown key '{prefix}{key}'{_suggest(key, section, whole, prefix)}"
    elif named := named_sections(kind):
        if not isinstance(value, dict):
            yield f"'{name}' holds sections with names of your choice, not a value"
            return
        for chosen, inner in value.items():
            if re.fullmatch(_CHOSEN_NAME, str(chosen)):
                yield from _misshapen(inner, named, whole, f"{name}.{chosen}")
            else:
                yield f"'{name}' has the name '{chosen}'; use letters, digits, spaces, '-' and '_'"
    elif isinstance(value, (dict, list)) and get_origin(kind) is not type(value):
        shapes = {list: "a list, such as [a, b]", dict: "a mapping, such as {a: b}"}
        yield f"'{name}' is {shapes.get(get_origin(kind), 'one value')}, not a {type(value).__name__}"
    elif isinstance(value, dict) and get_args(kind)[-1] is not Any:
        for key, inner in value.items():
            yield from _misshapen(inner, get_args(kind)[-1], whole, f"{name}.{key}")
    elif isinstance(value, list) and get_args(kind)[-1] is not Any:
        for number, inner in enumerate(value):
            yield from _misshapen(inner, get_args(kind)[-1], whole, f"{name}[{number}]")


def _suggest(key: Any, schema: type, whole: type, prefix: str) -> str:
    """The nearest sibling, else the nearest knob anywhere."""
    siblings = [entry.name for entry in dataclasses.fields(schema)]
    everywhere = {full.rpartition(".")[2]: full for full, _, _ in knobs(whole)}
    # A key of the right name in the wrong section.
    exact = everywhere.get(str(key))
    near = difflib.get_close_matches(str(key), siblings, n=1, cutoff=0.75)
    far = difflib.get_close_matches(str(key), everywhere, n=1, cutoff=0.6)
    # A neighbour is the likelier slip, but 'train.lrr' may look like a knob of another section.
    best = prefix + near[0] if near else exact or (everywhere[far[0]] if far else None)
    return f"; did you mean '{best}'?" if best else f"; allowed here: {', '.join(siblings)}"


def _resolve(tree: DictConfig, origin: str, schema: type[Schema]) -> Schema:
    try:
        # To dataclasses: the rest of the program knows neither omegaconf nor interpolations such as ${a.b}, which are
        # resolved here, and may fail.
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
    # omegaconf names the key and its own type, but neither the range nor what null means.
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


# --------------------------------------------------------------------------------------------------
# Contradictions
# --------------------------------------------------------------------------------------------------


def check(config: Config) -> list[tuple[str, str]]:
    """Everything that is out of range or contradicts itself, as (key, what is wrong with it)."""
    problems = out_of_range(config)
    model, data, loss, train, evaluate = config.model, config.data, config.loss, config.train, config.evaluate

    def wrong(key: str, text: str) -> None:
        problems.append((key, text))

    if loss.local_loss and not loss.gather_with_grad:
        wrong(
            "loss.gather_with_grad",
            "loss.local_loss=true needs loss.gather_with_grad=true: without it the gradient is biased "
            "(cosine 0.92 to the true one on two processes)",
        )
    if model.fast.spatial and model.patch_dropout > 0:
        wrong("model.fast.spatial", "model.fast.spatial=true looks at whole frames, so it needs model.patch_dropout=0")

    try:
        shape = model.geometry()
        if model.image_stats != "auto":
            image_stats(model.image_stats)
        if model.rope_time and not shape.rope:
            wrong("model.rope_time", f"model.rope_time=true needs rotary positions, which {model.name} does not have")
    except UserError as error:
        wrong("model.name", str(error))
    try:
        checkpointed_blocks(model.checkpoint_blocks, depth=1)
    except UserError as error:
        wrong("model.checkpoint_blocks", str(error))
    for name in ("train.duration", "train.log_every", "train.save_every", "evaluate.every", "train.warmup"):
        text = attrgetter(name)(config)
        try:
            seconds = clock_seconds(text) if name == "train.save_every" else None
            if seconds is None:
                steps = duration_in_steps(text, steps_per_epoch=1, global_batch_size=1, key=name)
            else:
                steps = int(seconds > 0)
            if steps == 0 and name != "train.warmup":
                wrong(name, f"{name} is '{text}', but must be longer than nothing")
        except UserError as error:
            wrong(name, str(error))
    if len(train.betas) != 2 or not all(0 <= beta < 1 for beta in train.betas):
        wrong("train.betas", f"train.betas is {list(train.betas)}, but must be two numbers in [0, 1)")
    if train.profile and (len(train.profile) != 2 or train.profile[0] > train.profile[1]):
        wrong("train.profile", f"train.profile is {list(train.profile)}, but must be a first and a last step, or []")
    if train.schedule == "cosine" and train.lr_end > train.lr:
        wrong("train.lr_end", f"train.lr_end is {train.lr_end}, but a cosine falls: at most train.lr={train.lr}")

    # A loss that grades texts needs a relevancy of every pair, and one that does not would ignore it.
    target = LOSSES[loss.name].target
    graded, relevancy = target == "relevancy", data.labels.target == "relevancy"
    names = ", ".join(name for name, kind in LOSSES.items() if kind.target == "relevancy")
    if graded and not relevancy:
        wrong("loss.name", f"loss.name={loss.name} grades texts by relevancy, so it needs data.labels.target=relevancy")
    if relevancy and not graded:
        wrong("loss.name", f"loss.name={loss.name} ignores relevancy; data.labels.target=relevancy goes with {names}")

    if loss.mask_duplicates and not LOSSES[loss.name].has_negatives:
        names = ", ".join(name for name, kind in LOSSES.items() if kind.has_negatives)
        wrong("loss.mask_duplicates", f"loss.mask_duplicates goes with {names}; loss.name={loss.name} has no negatives")

    # Heads, their labels and their loss make sense together only.
    heads = model.heads != "none"
    classes = (heads, data.labels.target == "class", target == "class")
    if any(classes) and not all(classes):
        wrong("model.heads", "model.heads, data.labels.target=class and loss.name=classes go together")
    # A column verb_class is called verb in heads and metrics.
    columns, key = [name.removesuffix("_class") for name in data.labels.columns], "data.labels.columns"
    if not columns:
        wrong(key, f"{key}=[] is empty, but a class is given by at least one column")
    elif len(set(columns)) < len(columns):
        wrong(key, f"{key}={data.labels.columns} names a column twice")
    elif len(columns) > 1 and "action" in columns:
        wrong(key, f"{key}: all columns together are called action; give the column of that name another one")
    if model.heads == "all" and len(columns) < 2:
        wrong("model.heads", f"model.heads=all needs several data.labels.columns, or its heads are alike: {columns}")
    for key in ("mixup", "cutmix"):
        if getattr(train, key) and target != "class":
            wrong(f"train.{key}", f"train.{key} mixes labels, so it needs loss.name=classes")
    if heads and model.head_start == "text" and model.weights.source == "scratch":
        wrong("model.head_start", "model.head_start=text needs a text tower that was trained; set model.weights")
    if heads and loss.boxes:
        wrong("loss.boxes", "loss.boxes does not go with model.heads: a model with heads predicts no boxes")
    opposites = [name for name in ("opposites", "separation") if getattr(loss, name)]
    if heads and opposites:
        wrong(f"loss.{opposites[0]}", f"loss.{opposites[0]} compares captions, but a model with model.heads reads none")
    for key, chosen in (("train.lora.layers", train.lora.layers), ("train.lora.towers", train.lora.towers)):
        if not chosen:
            wrong(key, f"{key}=[] names nothing that is trained")
    freezes_text = train.trainable in ("vision", "last_blocks")
    if train.trainable == "lora" and "textual" not in train.lora.towers:
        freezes_text = True
    if loss.separation and freezes_text:
        wrong(
            "loss.separation",
            f"loss.separation separates captions in the text tower, which train.trainable={train.trainable} freezes"
            f"{' without textual in train.lora.towers' if train.trainable == 'lora' else ''}; set it to 0",
        )
    for name, source in data.train.items():
        if source.opposite_column and data.labels.target == "relevancy":
            key = f"data.train.{name}.opposite_column"
            wrong(
                key,
                f"{key} has the opposites of the clips' own captions, but data.labels.target=relevancy draws others",
            )
        if len(source.tag_columns) not in (0, 2):
            key = f"data.train.{name}.tag_columns"
            wrong(key, f"{key}={list(source.tag_columns)} must name two columns, of verbs and of nouns, or none")
    if train.trainable == "heads" and not heads:
        wrong("train.trainable", "train.trainable=heads needs heads to train; set model.heads")

    # Found now rather than after the first epoch, or at the very end.
    for key, chosen in (("evaluate.during", evaluate.during), ("evaluate.final", evaluate.final)):
        for name in chosen:
            if name not in evaluate.benchmarks:
                names = ", ".join(evaluate.benchmarks) or "none"
                wrong(key, f"{key} names the benchmark '{name}', but evaluate.benchmarks has {names}")
    measured = evaluate.during
    if measured and (evaluate.best or "").partition("/")[0] not in measured:
        wrong(
            "evaluate.best",
            f"evaluate.best={evaluate.best}: while training {' and '.join(measured)} is measured; set "
            f"evaluate.best={measured[0]}/METRIC",
        )
    levels = evaluate.supervision
    if (levels or evaluate.submission) and (len(levels) != 3 or not all(0 <= level <= 5 for level in levels)):
        wrong(
            "evaluate.supervision",
            f"evaluate.supervision={levels}: a challenge wants three levels from 0 to 5, of pretraining, training "
            "labels and training data; docs/evaluation.md#challenges says which",
        )
    for key in ("ensemble", "flip", "dual_softmax", "submission"):
        if evaluate.rerank.path and getattr(evaluate, key):
            wrong(
                f"evaluate.{key}",
                f"evaluate.{key} cannot be used with evaluate.rerank.path: a reranker orders the candidates of one "
                "model's own similarities, to each clip and to each text another way",
            )
    if evaluate.controls and model.num_frames < 2:
        wrong("evaluate.controls", "evaluate.controls destroy the order of frames, but model.num_frames is 1")
    # Weights are relative to each other: a source without one has no place among them.
    weighted = [source.weight is not None for source in data.train.values()]
    if any(weighted) and not all(weighted):
        name = f"data.train.{list(data.train)[weighted.index(False)]}.weight"
        wrong(name, f"{name} is not set, but other sources have a weight; set it for all or for none")
    if loss.boxes and data.train and not any(each.detections for each in data.train.values()):
        name = f"data.train.{next(iter(data.train))}.detections"
        wrong(name, f"loss.boxes={loss.boxes} needs boxes to learn from; set {name}")
    if model.weights.source != "scratch" and not model.weights.path:
        wrong(
            "model.weights.path",
            f"model.weights.source={model.weights.source} needs model.weights.path; for random weights set "
            "model.weights.source=scratch",
        )
    return problems
