"""Build the parts of a run from its configuration: model, data, and how a global batch is split; and try them.

A run needs them in the order of this file: the weights, the parameters that are trained, the clips, the split of the
batch. :func:`dry_run` builds all of them, and reports instead of training.
"""

from __future__ import annotations

import copy
import logging
import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from torch import nn

from egohod.config import Config, load_leniently
from egohod.data.config import SourceConfig
from egohod.data.dataset import ClipDataset, Labels, Tokenizer, collate, normalise, tokenizer_for, trim
from egohod.data.formats import read_clips
from egohod.data.labels import (
    RELEVANCY_COLUMNS,
    ClassLabels,
    ClassSpace,
    RelevantTexts,
    class_numbers,
    class_space,
    warn_of_sides,
)
from egohod.data.loader import BatchPlan, MixedPlan, shares
from egohod.data.storage import open_cache
from egohod.data.table import ClipReader, ClipTable
from egohod.distributed import Distributed, inference_precision, is_out_of_memory, pick_precision, setup
from egohod.errors import UserError
from egohod.loss.config import LOSSES
from egohod.model.checkpoints import HeadClasses, WeightFile, base_of, load_weights
from egohod.model.cost import SHARE, Memory, predict
from egohod.model.dual_encoder import DualEncoder, EgoVideo, create_model
from egohod.model.lora import add_low_rank
from egohod.model.vision import attention_order
from egohod.runtime import content_hash
from egohod.training.checkpoint import open_weights
from egohod.training.step import TrainStep, learning_rates
from egohod.training.telemetry import require_trackers, step_flops
from egohod.training.train import MicroBatchRecord, Schedule, TrainingData

log = logging.getLogger(__name__)

# Narrations in one forward pass of the text tower.
BATCH = 256
# Clips of each source and benchmark that a dry run opens: the first, the last, and between.
CLIPS_TO_OPEN = 3
# Tokens of the vision tower in a pass that keep a GPU busy: ten clips of ViT-B/16, not measured.
BUSY_TOKENS = 8192
# Captions of a source whose opposites are counted before a run.
CAPTIONS_TO_TRY = 1000


# --------------------------------------------------------------------------------------------------
# The model, and what of it is trained
# --------------------------------------------------------------------------------------------------


def build_model(
    cfg: Config, dist: Distributed, classes: ClassSpace | None = None, tables: Sequence[ClipTable] | None = None
) -> DualEncoder:
    """The model with its starting weights, on the device; it has heads if there are ``classes`` for them."""
    # Parameters are initialised on the CPU, so that they are the same on every device and process.
    torch.manual_seed(cfg.train.seed)
    model = create_model(cfg.model, cfg.loss, classes.heads(cfg.model.heads) if classes else None)
    start, content = cfg.model.weights, None
    if start.source == "scratch":
        ignored = [name for name in ("adapt", "download") if getattr(start, name)]
        if ignored:
            log.warning("model.weights.source=scratch reads no weights, so model.weights.%s does nothing", ignored[0])
    else:
        content = open_weights(str(start.path), download=start.download, base=start.base)
        if content.family.is_clip != (start.source == "clip"):
            right = "clip" if content.family.is_clip else "checkpoint"
            raise UserError(
                f"{start.path}: is {content.family}, which model.weights.source={start.source} does not mean; "
                f"set model.weights.source={right}"
            )
        if classes:
            content = _with_matching_heads(content, cfg, classes)
        log.info("%s", load_weights(model, content, adapt=start.adapt, projections=start.projections))
    freeze(model, cfg)
    # Checkpoints then hold only what is trained, and name the file that has the rest.
    if cfg.train.trainable != "all" and content is not None:
        model.base = base_of(model, content)
        if model.base and Path(model.base.path).parent.name == "checkpoints":
            # Its own run deletes all but the newest and best checkpoints.
            log.warning(
                "the checkpoints of this run will need %s: keep it when its own run is resumed", model.base.path
            )
    model = model.to(dist.device)
    if dist.device.type == "cuda":
        shape, dtype = model.geometry, pick_precision(cfg.train.precision, dist.device)
        kernels, line = attention_order(
            cfg.model.attention, dist.device, dtype, shape.vision_width // shape.vision_heads
        )
        log.info("%s", line)
        model.visual.set_attention(kernels)
    # Heads that a file brings trained are kept.
    if classes and cfg.model.head_start == "text" and (content is None or content.heads is None):
        texts = class_texts(tables or read_tables(cfg), classes)
        start_from_text(model, classes, texts, tokenizer_for(cfg.model))
    return model


def _with_matching_heads(content: WeightFile, cfg: Config, classes: ClassSpace) -> WeightFile:
    """``content``, without heads that are for other classes; :class:`UserError` unless ``model.weights.adapt``."""
    has_heads = any(name.startswith("heads.") for name in content.tensors)
    if not has_heads or content.heads == HeadClasses(cfg.model.heads, classes.keys):
        return content
    if content.heads is None:
        problem = "heads but not their classes, which a run or checkpoint folder records"
    elif content.heads.kind != cfg.model.heads:
        problem = f"model.heads={content.heads.kind}"
    else:
        # Of the same number, perhaps: every output would then mean another class without any error.
        problem = "a head for other classes than the data"
    path = cfg.model.weights.path
    if not cfg.model.weights.adapt:
        raise UserError(
            f"{path}: has {problem}; train it with the same, or let model.weights.adapt=true start the heads "
            "from new weights"
        )
    log.warning("%s: has %s; they start from new weights", path, problem)
    return content.without_heads()


def freeze(model: DualEncoder, cfg: Config) -> None:
    """Freeze all but the parameters of ``train.trainable``, low-rank parts being added for ``lora``.

    Raises :class:`UserError` if the model has no such part.
    """
    if cfg.train.trainable == "adapters" and not isinstance(model, EgoVideo):
        raise UserError(f"train.trainable=adapters needs a ..._Slowfast model; model.name is {cfg.model.name}")
    if cfg.train.trainable == "lora":
        add_low_rank(model, cfg.train.lora)
    model.freeze(cfg.train.trainable, cfg.train.last_blocks)


def trainable(model: DualEncoder) -> str:
    """How many parameters are trained, in one phrase."""
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    total, trained = sum(count for count, _ in counts), sum(count for count, is_trained in counts if is_trained)
    return f"{trained / 1e6:.1f} of {total / 1e6:.1f} M parameters are trainable"


def class_texts(tables: Sequence[ClipTable], space: ClassSpace) -> list[list[str]]:
    """The different narrations of the training clips of each class, in order; its name where it has no clip."""
    # Dictionaries keep the order, and the text tower need not embed a narration twice.
    texts_of: list[dict[str, None]] = [{} for _ in space.keys]
    for table in tables:
        for row, number in enumerate(class_numbers(table, space)):
            texts_of[number].update(dict.fromkeys(table.row(row).texts))
    return [list(texts) or [name] for texts, name in zip(texts_of, space.names, strict=True)]


@torch.no_grad()
def start_from_text(
    model: DualEncoder, space: ClassSpace, texts: Sequence[Sequence[str]], tokenizer: Tokenizer
) -> None:
    """Set the weights of ``model``'s heads so that their logits are scaled similarities to ``texts`` [C].

    Before the first step they classify as zero-shot does (Wortsman et al., 2109.01903). A class's weights are the mean
    feature of its texts; a head for a part, such as the verb, takes the mean over the classes that share it.
    """
    assert model.heads is not None, "the model was built without heads"
    device = model.logit_scale.device
    of_class = torch.tensor([number for number, each in enumerate(texts) for _ in each], device=device)
    tokens = tokenizer([text for each in texts for text in each])
    # As an evaluation would embed them, which does not use TF32.
    with inference_precision(device, torch.float32):
        of_text = torch.cat([model.encode_text(trim(part).to(device)) for part in tokens.split(BATCH)])
    # Of unit length in the end, so a sum is as good as a mean.
    features = F.normalize(of_text.new_zeros(len(texts), of_text.shape[1]).index_add(0, of_class, of_text), dim=1)
    # A head's input is sqrt(E) times the unit feature of zero-shot (DualEncoder.classify).
    scale = model.logit_scale.exp() / model.geometry.embed_dim**0.5
    for name, head in model.heads.items():
        # A joint head is not among the parts: each class is its own.
        values, code = space.parts.get(name, (space.keys, np.arange(len(space.keys))))
        member = F.one_hot(torch.from_numpy(code).to(features.device), len(values)).T.to(features)
        assert isinstance(head, nn.Sequential)
        linear = head[-1]
        assert isinstance(linear, nn.Linear)
        linear.weight.copy_(scale * F.normalize(member @ features, dim=1))


# --------------------------------------------------------------------------------------------------
# The clips, their labels and their order
# --------------------------------------------------------------------------------------------------


def active_sources(cfg: Config) -> dict[str, SourceConfig]:
    """The sources a run draws from. Raises :class:`UserError` if there is none."""
    sources = {name: source for name, source in cfg.data.train.items() if source.weight != 0}
    if not sources:
        raise UserError("data.train names no source of clips; set data.train.NAME.metadata and data.train.NAME.root")
    return sources


def read_tables(cfg: Config) -> list[ClipTable]:
    """The training clips of each source. A run reads them once, for its classes, its heads and its batches."""
    # Of the columns that training does not read, memory holds only those that group clips and those of labels.
    extra = list(cfg.data.hard_negatives.group_by) if cfg.data.hard_negatives.share > 0 else []
    if cfg.data.labels.target == "class":
        columns = cfg.data.labels.columns
        # The words beside numbers of classes, as EPIC-KITCHENS has verb beside verb_class, name them.
        extra += [*columns, *(name.removesuffix("_class") for name in columns if name.endswith("_class"))]
    elif cfg.data.labels.target == "relevancy":
        extra += RELEVANCY_COLUMNS
    tables = []
    for source in active_sources(cfg).values():
        of_source = [*filter(None, [source.opposite_column, source.replacement_column]), *source.tag_columns]
        tables.append(read_clips(source, strict=cfg.data.strict, extra=[*extra, *of_source]))
    return tables


def build_classes(cfg: Config, tables: Sequence[ClipTable] | None = None) -> ClassSpace | None:
    """The classes of the training clips and of ``data.labels.classes``, if the model is to have heads for them."""
    if cfg.model.heads == "none":
        return None
    labels = cfg.data.labels
    # Without warnings: they come when the training clips get their labels.
    return class_space(tables or read_tables(cfg), list(labels.columns), list(labels.classes), warn=False)


def build_labels(cfg: Config, tables: Sequence[ClipTable]) -> list[Labels] | None:
    """Labels of the clips of each source; None where clips are matched with their own narrations."""
    config = cfg.data.labels
    if config.target == "relevancy":
        labels = [RelevantTexts(table, config.threshold, config.sentences) for table in tables]
        if cfg.data.flip > 0:
            for each in labels:
                each.warn_of_sides(cfg.data.flip)
        # A batch has clips of all sources, so their vectors of noun classes have one width.
        width = max(each.noun_classes for each in labels)
        return [each.widened(width) for each in labels]
    if config.target == "class":
        space = class_space(tables, list(config.columns), list(config.classes))
        # A mirrored clip keeps its class, which is wrong for "left hand".
        if cfg.data.flip > 0:
            warn_of_sides(space, cfg.data.flip)
        return [ClassLabels(table, space, cfg.model.heads) for table in tables]
    return None


def build_dataset(cfg: Config, size: int, tables: Sequence[ClipTable] | None = None) -> ClipDataset:
    """The training clips at ``size`` pixels, of ``tables`` if they were read already."""
    sources, kind = active_sources(cfg), LOSSES[cfg.loss.name]
    for name, source in sources.items():
        if source.detections and not cfg.loss.boxes:
            log.warning("data.train.%s.detections does nothing while loss.boxes is 0", name)
        if source.opposite_column and not cfg.loss.has_opposites:
            log.warning("data.train.%s.opposite_column does nothing while loss.opposites is 0", name)
        for key, has_effect in (("replacement_column", kind.has_replacements), ("tag_columns", kind.has_tags)):
            if getattr(source, key) and not has_effect:
                log.warning("data.train.%s.%s does nothing with loss.name=%s", name, key, cfg.loss.name)
    tables = tables or read_tables(cfg)
    dataset = ClipDataset(
        list(zip(tables, sources.values(), strict=True)),
        size=size, num_frames=cfg.model.num_frames,
        tokenizer=tokenizer_for(cfg.model), labels=build_labels(cfg, tables),
        decoder=cfg.data.decoder, cache=open_cache(cfg.data.cache, cfg.data.cache_gb), frame_cache=cfg.data.frame_cache,
        boxes=cfg.loss.boxes > 0, seed=cfg.train.seed, train=True, crop_scale_min=cfg.data.crop_scale_min,
        flip=cfg.data.flip,
        opposites=cfg.loss.has_opposites, replacements=cfg.loss.replacements if kind.has_replacements else 0,
        tags=kind.has_tags, read_ahead=cfg.data.read_ahead,
    )  # fmt: skip
    _check_texts(cfg, dataset)
    return dataset


def _check_texts(cfg: Config, dataset: ClipDataset) -> None:
    """Log how many captions have what the loss needs.

    Raises :class:`UserError` where none has it, or a column is missing.
    """
    kind, generator, verbs = LOSSES[cfg.loss.name], np.random.default_rng(0), dataset.verbs
    # What a caption needs, its columns, whether it has it, and what to do if none has.
    checks: list[tuple[str, str, Callable[[ClipReader, int, str], Any], str]] = []
    if cfg.loss.has_opposites:
        cure = (
            "so loss.opposites and loss.separation do nothing; set them to 0, or name a column with opposites in "
            "data.train.NAME.opposite_column"
        )
        checks.append(("an opposite", "opposite_column", ClipReader.opposite, cure))
    if kind.has_tags:
        cure = f"by which loss.name={cfg.loss.name} finds positives; name columns in data.train.NAME.tag_columns"
        checks.append(("a verb and a noun", "tag_columns", lambda *clip: all(ClipReader.tags(*clip)), cure))
    if verbs is not None:
        cure = f"which loss.name={cfg.loss.name} needs; name a column in data.train.NAME.replacement_column"
        draw = partial(ClipReader.replacements, count=1, verbs=verbs, rng=generator)
        checks.append(("a replacement of the verb", "replacement_column", draw, cure))
    for what, key, has, cure in checks:
        counts = []
        for source in dataset.sources:
            table, columns = source.table, getattr(source.config, key) or []
            for column in [columns] if isinstance(columns, str) else columns:
                if column not in table.column_names:
                    have = ", ".join(table.column_names)
                    raise UserError(f"{table.path}: no column '{column}' for {key}; there are {have}")
            # Of millions of captions some are enough to see whether rules fit them.
            rows = np.unique(np.linspace(0, len(table) - 1, CAPTIONS_TO_TRY).astype(int)).tolist()
            counts.append(sum(bool(has(source, row, table.row(row).texts[0])) for row in rows))
            log.info("%s: %.0f %% of the captions have %s", table.path, 100 * counts[-1] / len(rows), what)
        if not any(counts):
            raise UserError(f"{dataset.sources[0].table.path}: no caption has {what}, {cure}")


def build_plan(cfg: Config, dataset: ClipDataset) -> BatchPlan | MixedPlan:
    """The order of the clips: one shuffled list, or a fixed number of each source in every batch if they have weights.

    Raises :class:`UserError` if a source has fewer clips than its weight asks for.
    """
    hard, batch_size, seed = cfg.data.hard_negatives, cfg.train.global_batch_size, cfg.train.seed
    tables = [source.table for source in dataset.sources]
    plan = partial(BatchPlan, seed=seed, share=hard.share, group_size=hard.group_size)
    codes = None
    if hard.share > 0:
        codes = [table.group_codes(list(hard.group_by), hard.window_seconds) for table in tables]
        for table, code in zip(tables, codes, strict=True):
            if not (np.bincount(code) >= hard.group_size).any():
                log.warning(
                    "%s: no %d clips agree in %s, so data.hard_negatives does nothing for it",
                    table.path, hard.group_size, ", ".join(hard.group_by),
                )  # fmt: skip

    names, weights = zip(*((name, source.weight) for name, source in active_sources(cfg).items()), strict=True)
    if len(tables) == 1 or weights[0] is None:
        if codes:
            # Clips of two sources are never hard negatives of each other, so their groups get other numbers.
            codes = [code + first for code, first in zip(codes, dataset.starts, strict=False)]
        return plan(len(dataset), batch_size, groups=np.concatenate(codes) if codes else None)
    counts = shares([float(weight or 0) for weight in weights], batch_size)
    for name, table, count in zip(names, tables, counts, strict=True):
        if len(table) < count:
            raise UserError(
                f"data.train.{name} has {len(table)} clips, but its weight asks for {count} in each batch of "
                f"{batch_size}; lower data.train.{name}.weight"
            )
    plans = [
        plan(len(table), count, groups=codes[number] if codes else None)
        for number, (table, count) in enumerate(zip(tables, counts, strict=True))
    ]
    return MixedPlan(plans, dataset.starts[:-1].tolist(), seed)


def build_data(
    cfg: Config, dist: Distributed, model: DualEncoder, tables: Sequence[ClipTable] | None = None
) -> TrainingData:
    """Everything that feeds the loop; logs what will be trained, on what, and in which batches."""
    # M parameters by part of the model: what a wrong train.trainable freezes shows here, before hours of training.
    parts: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        tower, _, rest = name.partition(".")
        part = "motion adapters" if ".adapter." in name else f"{tower} blocks" if ".resblocks." in name else tower
        part = "motion stem" if ".motion_stem." in name else f"{tower} low-rank" if ".lora." in name else part
        part = f"{tower}, rest" if part == tower and rest and tower != "heads" else part
        counts = parts.setdefault(part, [0, 0])
        counts[0] += parameter.numel()
        counts[1] += parameter.numel() if parameter.requires_grad else 0
    lines = [f"{part:<22}{total / 1e6:>10.3f}{trained / 1e6:>10.3f}" for part, (total, trained) in parts.items()]
    log.info("trainable parameters\n%s", "\n".join([f"{'M parameters':<22}{'all':>10}{'trainable':>10}", *lines]))

    # Before clips are read, which may take minutes: whether the batch can be shared at all.
    record = micro_batch_record(cfg, dist)
    micro_batch, accumulation = micro_batches(cfg, dist, model, record)
    dataset = build_dataset(cfg, model.geometry.image_size, tables)
    data = TrainingData(dataset, build_plan(cfg, dataset), micro_batch, accumulation, record)
    log.info(
        "%s, precision %s, decoder %s; %s; %s clips, global batch %d = %d x %d x %d accumulated",
        dist, str(pick_precision(cfg.train.precision, dist.device)).removeprefix("torch."), dataset.decoder,
        trainable(model), f"{len(dataset):,}", cfg.train.global_batch_size, dist.world_size, micro_batch, accumulation,
    )  # fmt: skip
    return data


# --------------------------------------------------------------------------------------------------
# How a global batch is split
# --------------------------------------------------------------------------------------------------


def micro_batches(
    cfg: Config, dist: Distributed, model: DualEncoder, record: MicroBatchRecord | None = None
) -> tuple[int, int]:
    """Clips per forward pass of one process, and forward passes per step.

    With ``record`` the number is what an earlier start of this run recorded, or is tried on a GPU and recorded.
    Raises :class:`UserError` if the batch cannot be shared, if not one clip fits, or if clips to mix are an odd number.
    """
    size, mixes = cfg.train.global_batch_size, bool(cfg.train.mixup or cfg.train.cutmix)
    # First whether the processes can share the batch at all: to predict the memory takes much longer.
    split_batch(size, dist.world_size, largest=1)
    sharing(cfg, dist)
    if cfg.model.checkpoint_blocks == "auto":
        # Before the micro-batch is tried; the same for a resumed run, since it depends on what the record does.
        memory = min(dist.gather_objects(device_memory(dist)))
        blocks, clips = fewest_blocks(cfg, dist.world_size, partial(clips_that_fit, cfg, dist, model, memory))
        model.set_grad_checkpointing(blocks)
        log.info(
            "model.checkpoint_blocks=auto: %d of %d blocks are checkpointed, for %d clips at a time in %.0f GB",
            blocks, model.geometry.vision_layers, clips, memory / 1e9,
        )  # fmt: skip
    largest = cfg.train.max_batch_per_process
    if largest is None and record is not None:
        # One process reads: the others' copies of a shared disk may be older.
        largest = dist.gather_objects(record.read() if dist.is_main else None)[0]
        if largest is not None:
            log.info("%s: %d clips at a time, as tried before on this device", record.path, largest)
    if largest is None:
        largest, peak = largest_batch(cfg, dist, model), 0
        if record is not None and dist.device.type == "cuda" and cfg.train.sharding == "none":
            # Not on a CPU: where its memory runs out, the system ends a process without an exception. Nor where weights
            # will be split: they are whole here.
            largest, peak = try_batch(cfg, dist, model, largest)
        if record is not None and dist.is_main:
            record.write(largest, peak_gb=round(peak / 1e9, 2))
    micro_batch, accumulation = split_batch(size, dist.world_size, largest, even=mixes)
    if mixes and micro_batch % 2:
        raise UserError(
            f"train.mixup and train.cutmix mix pairs, but {micro_batch} clips are held at a time; choose a "
            "train.global_batch_size (or train.max_batch_per_process) that makes it an even number"
        )
    return micro_batch, accumulation


def split_batch(global_batch_size: int, world_size: int, largest: int, even: bool = False) -> tuple[int, int]:
    """Clips per forward pass of one process (an even number if asked for and possible), and forward passes per step.

    Raises :class:`UserError` if the processes cannot share the batch evenly.
    """
    if global_batch_size % world_size:
        raise UserError(
            f"train.global_batch_size={global_batch_size} cannot be shared evenly by {world_size} processes; "
            f"the nearest sizes are {global_batch_size // world_size * world_size or world_size} and "
            f"{(global_batch_size // world_size + 1) * world_size}"
        )
    share = global_batch_size // world_size
    # All micro-batches have one size, so that a compiled model is compiled once.
    fitting = [size for size in range(min(share, largest), 0, -1) if share % size == 0]
    micro_batch = next((size for size in fitting if even and size % 2 == 0), fitting[0])
    return micro_batch, share // micro_batch


def sharing(cfg: Config, dist: Distributed) -> int:
    """Over how many processes ``train.sharding`` splits the weights, 1 without it. Collective.

    Raises :class:`UserError` as :func:`egohod.training.sharding.mesh_shape` does.
    """
    if cfg.train.sharding == "none":
        return 1
    # Imported here: most runs do without.
    from egohod.training.sharding import mesh_shape

    return mesh_shape(cfg.train.sharding, cfg.train.shard_processes, dist)[1]


def fewest_blocks(cfg: Config, world_size: int, fits: Callable[[int], int]) -> tuple[int, int]:
    """How many blocks ``model.checkpoint_blocks=auto`` checkpoints, and for how many clips at a time.

    ``fits`` gives the clips at a time that fit the memory with so many blocks checkpointed.

    A block that is computed again costs a third of its time, and a second pass over the batch costs that of all
    blocks. So a process's share of the batch is one pass if it fits with all blocks checkpointed. If it does not, the
    passes are only as large as keeps a GPU busy.
    """
    shape, batch, largest = cfg.model.geometry(), cfg.train.global_batch_size, cfg.train.max_batch_per_process
    depth, share = shape.vision_layers, batch // world_size
    if largest is None and fits(depth) < share:
        largest = math.ceil(BUSY_TOKENS / (1 + cfg.model.num_frames * shape.patches_per_frame))
    clips, _ = split_batch(batch, world_size, largest or share)
    # More blocks never need more memory. Most often it is none, which is then the only prediction.
    return 0 if fits(0) >= clips else bisect_left(range(depth), clips, lo=1, key=fits), clips


def predict_memory(cfg: Config, dist: Distributed, model: DualEncoder, blocks: int | None = None) -> Memory:
    """Device memory of one step of this run, with as many ``blocks`` checkpointed (None: as in ``model``)."""
    dtype = pick_precision(cfg.train.precision, dist.device)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    # AdamW keeps two moments of every trained weight, SGD its momentum.
    averages, ema = {"adamw": 2, "sgd": 1}[cfg.train.optimizer], cfg.train.ema > 0
    return predict(
        cfg.model, dtype=dtype, loss=cfg.loss, heads=model.classes, learning=trained, averages=averages, ema=ema,
        blocks=model.visual.transformer.checkpoint_blocks if blocks is None else blocks,
        on_gpu=dist.device.type == "cuda", lora=cfg.train.lora if cfg.train.trainable == "lora" else None,
        processes=sharing(cfg, dist),
    )  # fmt: skip


def device_memory(dist: Distributed) -> int:
    """Bytes of the GPU of this process, or its share of the machine's memory."""
    if dist.device.type == "cuda":
        return int(torch.cuda.get_device_properties(dist.device).total_memory)
    memory = int(psutil.virtual_memory().total)
    # A container is often allowed less than the machine has; without a limit the file reads "max".
    with suppress(OSError, ValueError):
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return memory // max(1, dist.world_size)


def clips_that_fit(cfg: Config, dist: Distributed, model: DualEncoder, memory: int, blocks: int | None = None) -> int:
    """Clips at a time with which a step fits ``memory`` bytes by prediction; ``blocks`` as of predict_memory."""
    predicted = predict_memory(cfg, dist, model, blocks)
    clips = predicted.fits(memory)
    several_passes = clips < cfg.train.global_batch_size // dist.world_size
    if dist.world_size > 1 and several_passes and cfg.train.sharding == "none":
        # Several passes: under no_sync their gradients add up outside of DDP's buckets, which are in memory too.
        clips = predicted.fits(memory - trained_bytes(model) / SHARE)
    return clips


def largest_batch(cfg: Config, dist: Distributed, model: DualEncoder) -> int:
    """Clips at a time that fit the smallest device of the run."""
    memory = device_memory(dist)
    # All processes need the same number of passes, or their collectives would not meet.
    smallest = min(dist.gather_objects(clips_that_fit(cfg, dist, model, memory)))
    if smallest < 1:
        raise UserError(
            f"not one clip fits the memory of {dist.device} ({memory / 1e9:.0f} GB): try "
            "model.checkpoint_blocks=all, fewer model.num_frames or a smaller model.name, "
            "or set train.max_batch_per_process=1 to try all the same"
        )
    return smallest


def trained_bytes(model: DualEncoder) -> int:
    """Bytes of the gradients of all trainable parameters, and of one of the optimizer's averages."""
    return sum(4 * parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def micro_batch_record(cfg: Config, dist: Distributed) -> MicroBatchRecord | None:
    """Where this run records its micro-batch; None if ``train.max_batch_per_process`` sets it."""
    if cfg.train.max_batch_per_process:
        return None
    train = {name: getattr(cfg.train, name) for name in ("global_batch_size", "precision", "trainable", "last_blocks")}
    train |= {"optimizer": cfg.train.optimizer, "ema": cfg.train.ema > 0}
    train |= {"lora": vars(cfg.train.lora)} if cfg.train.trainable == "lora" else {}
    if cfg.train.sharding != "none":  # or records from before it existed would not count
        train |= {"sharding": cfg.train.sharding, "shard_processes": cfg.train.shard_processes}
    device = torch.cuda.get_device_properties(dist.device) if dist.device.type == "cuda" else None
    setting = {
        "device": [device.name, device.total_memory] if device else ["cpu", int(psutil.virtual_memory().total)],
        "processes": dist.world_size,
        # All of the model and the loss: a forward pass depends on most of it.
        "settings_sha256": content_hash(repr((vars(cfg.model) | {"weights": None}, vars(cfg.loss), train)), length=12),
    }
    return MicroBatchRecord(Path(cfg.train.output) / "micro_batch.json", setting)


def try_batch(
    cfg: Config, dist: Distributed, model: DualEncoder, predicted: int, attempt: Callable[..., int] | None = None
) -> tuple[int, int]:
    """The largest of ``predicted``, half of it, a quarter ... clips with which a step runs on all devices.

    Also gives the peak bytes of the fullest device. ``attempt`` stands in for :func:`step_peak` in tests. Raises
    :class:`UserError` on all processes if one clip is too many. Collective.
    """
    size = predicted
    while True:
        # As it will be used: a divisor of the share.
        size, passes = split_batch(cfg.train.global_batch_size, dist.world_size, size)
        peak, failure = 0, ""
        try:
            peak = (attempt or step_peak)(model, cfg, dist, size, passes)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            failure = str(error).splitlines()[0]
        if dist.device.type == "cuda":
            # Fragments of this trial would be in the way of the next one, or of the run, whose own peak is logged.
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(dist.device)
        # One failure counts for all: the run's collectives need the same number of passes everywhere.
        peaks, failures = zip(*dist.gather_objects((peak, failure)), strict=True)
        if not any(failures):
            log.info("tried %d clips at a time on %s: %.1f GB at the peak", size, dist.device, max(peaks) / 1e9)
            return size, max(peaks)
        log.warning("%d clips at a time do not fit: %s", size, next(filter(None, failures)))
        if size == 1:
            raise UserError(
                f"a step with one clip at a time does not fit the memory of {dist.device}: set "
                "model.checkpoint_blocks=all, fewer model.num_frames or a smaller model.name; do other programs "
                "use the device?"
            )
        size //= 2


def step_peak(model: DualEncoder, cfg: Config, dist: Distributed, clips: int, passes: int) -> int:
    """Peak bytes on the device of a training step with ``clips`` at a time, 0 on a CPU; the model stays as it is.

    Forward and backward passes of the model on random clips, two of them where a step has several ``passes``, beside
    empty memory of the size that the rest of a step takes. The model is not compiled yet, which usually takes more. No
    collectives: a process that fails must not leave the others waiting. Raises ``torch.OutOfMemoryError``.
    """
    device, on_gpu = dist.device, dist.device.type == "cuda"
    geometry, frames, share = model.geometry, cfg.model.num_frames, cfg.train.global_batch_size // dist.world_size
    rest = {"adamw": 2, "sgd": 1}[cfg.train.optimizer] * trained_bytes(model)
    rest += sum(4 * parameter.numel() for parameter in model.parameters()) if cfg.train.ema else 0
    # DDP's buckets; without no_sync they are the gradients themselves.
    rest += trained_bytes(model) if dist.world_size > 1 and passes > 1 else 0
    # Similarities of the loss, their softmax and gradients, in both directions; with several passes they are alone.
    rest += 6 * 4 * share * cfg.train.global_batch_size if passes == 1 else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
        # NCCL, cuBLAS and fragments take what the allocator does not count.
        rest += torch.cuda.get_device_properties(device).total_memory // 20
    dtype = pick_precision(cfg.train.precision, device)
    try:
        held = torch.empty(rest, dtype=torch.uint8, device=device)
        with torch.random.fork_rng([device] if on_gpu else []):
            for _ in range(min(passes, 2)):
                video = torch.randint(
                    256, (clips, 3, frames, geometry.image_size, geometry.image_size), dtype=torch.uint8, device=device
                )
                # Texts of full length, which captions rarely have; more with opposites and replacements.
                texts = clips * (1 + cfg.loss.negatives)
                tokens = torch.ones(texts, geometry.context_length, dtype=torch.long, device=device)
                with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                    output = model(normalise(video, model.image_stats), tokens)
                sum(value.float().sum() for value in output.values() if value.requires_grad).backward()
        del held
        return torch.cuda.max_memory_allocated(device) if on_gpu else 0
    finally:
        model.zero_grad(set_to_none=True)


# --------------------------------------------------------------------------------------------------
# Dry run
# --------------------------------------------------------------------------------------------------


def dry_run(path: str, overrides: Sequence[str], evaluators: Callable[..., Sequence[Any]]) -> None:
    """Build everything, open three clips, take one step, and report; writes nothing.

    Continues past what is missing, so that one dry run names every problem; raises one :class:`UserError` of all.
    ``evaluators(cfg, dist, name, classes=...)`` builds the benchmarks of a set ("val", "test"), for heads of these
    classes if there are any; three clips of each are opened, none is evaluated.
    """
    cfg, problems = load_leniently(path, overrides)
    dist, run = setup(cfg.train.device, deterministic=cfg.train.deterministic), Path(cfg.train.output)
    sharding = cfg.train.sharding
    if dist.world_size == 1:
        # Splitting needs several processes, and a dry run is most often one.
        cfg.train.sharding = "none"
    precision = str(pick_precision(cfg.train.precision, dist.device)).removeprefix("torch.")
    _report("config", f"{path}{' ' + ' '.join(overrides) if overrides else ''}")
    _report("device", f"{dist}, precision {precision}")
    if sharding != cfg.train.sharding:
        _report("sharding", f"{sharding}, which this one process tries without; memory below is that of whole weights")
    classes = None
    try:
        require_trackers(cfg)
        classes = build_classes(cfg)
    except UserError as error:
        problems.append(str(error))
    model = _try_model(cfg, dist, classes, problems)

    peak, start, end = learning_rates(cfg.train)
    text = f"{cfg.train.optimizer}, {peak:g}"
    if not cfg.train.warmup.lstrip().startswith("0 "):
        text += f" after a warm-up of {cfg.train.warmup} from {start:g}"
    if cfg.train.schedule == "cosine":
        text += f", then a cosine down to {end:g}"
    if reference := cfg.train.lr_reference_batch:
        text += f" (train.lr={cfg.train.lr:g} is for {reference} clips, a step has {cfg.train.global_batch_size})"
    _report("lr", text)

    try:
        _try_data(cfg, dist, model, problems)
    except UserError as error:
        problems.append(str(error))
    for name in ("val", "test"):
        try:
            for each in evaluators(cfg, dist, name, classes=classes):
                rows = torch.linspace(0, len(each.dataset) - 1, CLIPS_TO_OPEN).long().tolist()
                problems += [fault for row in rows if (fault := each.dataset[row]["fault"])]
                _report("evaluate", f"{name}: {len(each.dataset):,} clips, {CLIPS_TO_OPEN} opened")
        except UserError as error:
            problems.append(str(error))
    trackers = "".join(f"{name}, " for name in cfg.train.trackers)
    files = f"checkpoints/, metrics.jsonl, {trackers}config.yml, environment.json, results.json, report.html"
    _report("writes", f"{run}/: {files}")
    if (run / "checkpoints").is_dir():
        _report("resume", f"{run}/checkpoints exists; train.resume={cfg.train.resume}")
    # A missing file is a problem of several parts; an error may have several lines, one for each problem.
    problems = list(dict.fromkeys(line for text in problems for line in text.splitlines()))
    _report("verdict", f"{len(problems)} problem(s)" if problems else "ready to run")
    if problems:
        raise UserError(*problems)


def _report(name: str, text: str) -> None:
    log.info("%-10s %s", name, text)


def _try_model(cfg: Config, dist: Distributed, classes: ClassSpace | None, problems: list[str]) -> DualEncoder:
    """Build the model and report its size and cost; with random weights where its own cannot be used."""
    start = cfg.model.weights.source
    if cfg.model.heads != "none" and classes is None:
        # The classes are missing, which is reported already; whether the weights fit shows without heads too.
        cfg = copy.deepcopy(cfg)
        cfg.model.heads, cfg.model.head_start, cfg.train.trainable = "none", "random", "all"
        start += ", without the heads of unknown classes"
    try:
        model = build_model(cfg, dist, classes)
    except UserError as error:
        problems.append(str(error))
        model = create_model(cfg.model, cfg.loss).to(dist.device)
        if cfg.train.trainable == "lora":
            # Its memory is reported, which would be that of training everything.
            freeze(model, cfg)
        start = f"random, because {cfg.model.weights.path} cannot be used"
    geometry, frames = model.geometry, cfg.model.num_frames
    towers: dict[str, nn.Module | None] = {"vision": model.visual, "text": model.textual, "heads": model.heads}
    count = {name: sum(p.numel() for p in each.parameters()) / 1e6 for name, each in towers.items() if each is not None}
    parts = ", ".join(f"{part} {number:.1f} M" for part, number in count.items())
    _report("model", f"{cfg.model.name} from {start}: {sum(count.values()):.1f} M parameters ({parts})")
    _report("training", trainable(model))
    patches = f"{geometry.patches_per_frame} patches ({geometry.image_size} px in steps of {geometry.patch_size})"
    prefix, pool = geometry.prefix_tokens, geometry.pool
    first = "one CLS" if (prefix, pool) == (1, "token") else f"{prefix} prefix tokens, pooling '{pool}'"
    _report("tokens", f"{prefix + frames * geometry.patches_per_frame} a clip: {frames} frames of {patches}, {first}")
    # With heads the text tower computes nothing.
    texts = geometry.context_length if model.heads is None else 0
    flops, texts = step_flops(cfg, model), texts * (1 + cfg.loss.negatives)
    _report("compute", f"{flops / 1e9:.1f} GFLOP a clip for forward and backward, with {texts} text tokens")
    memory = predict_memory(cfg, dist, model)
    state = f"{memory.state / 1e9:.1f} GB for weights, gradients and averages"
    # How many auto needs is known when the batch is split, further down.
    blocks = " with all blocks checkpointed" if cfg.model.checkpoint_blocks == "auto" else ""
    _report("memory", f"{memory.per_clip / 1e6:.0f} MB a clip kept for the backward pass{blocks}, {state}")
    return model


def _try_data(cfg: Config, dist: Distributed, model: DualEncoder, problems: list[str]) -> None:
    """Open clips, split the batch and take one step. Raises :class:`UserError` for what nothing after it can do."""
    try:
        dataset = build_dataset(cfg, model.geometry.image_size)
    except UserError:
        # The videos too, which nobody looked for without the clips.
        roots = [source.root for source in active_sources(cfg).values()]
        missing = [root for root in roots if "://" not in root and not Path(root).exists()]
        problems += [f"{root}: no such folder of videos" for root in missing]
        raise
    for source in dataset.sources:
        _report("data", f"{source.table.path}: {source.table.report}, decoder {dataset.decoder}")
    clips = []
    for first, end in pairwise(dataset.starts.tolist()):
        for index in torch.linspace(first, end - 1, CLIPS_TO_OPEN).long().tolist():
            clip = dataset[(0, index)]
            if clip["fault"]:
                problems.append(clip["fault"])
            else:
                clips.append(clip)
                texts = " / ".join(dataset.row(index).texts)
                _report("clip", f"{dataset.where(index)}: video {list(clip['video'].shape)}, '{texts[:90]}'")
    plan = build_plan(cfg, dataset)
    micro_batch, accumulation = micro_batches(cfg, dist, model)
    schedule = Schedule.of(cfg, plan.steps_per_epoch)
    batch = f"{dist.world_size} process(es) x {micro_batch} x {accumulation}"
    _report("batch", f"{cfg.train.global_batch_size} clips = {batch}")
    intervals = f"evaluation every {schedule.evaluate}, checkpoint every {schedule.save or cfg.train.save_every}"
    _report("length", f"{plan.steps_per_epoch} steps an epoch, {schedule.total} in all; {intervals}")
    # Without its classes the model has no heads to try.
    if clips and (cfg.model.heads == "none" or model.heads is not None):
        # Two clips, or one: enough to go through every layer and the loss.
        step = TrainStep(model, cfg, dist, total_steps=schedule.total, steps_per_epoch=plan.steps_per_epoch)
        loss = step(1, [collate(clips[:2])])["loss"].item()
        _report("one step", f"forward, backward and update on {len(clips[:2])} clip(s): loss {loss:.4f}")
