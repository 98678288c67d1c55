"""The registry of objectives, their settings, and how one is built from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from egohod.knobs import knob

if TYPE_CHECKING:
    from torch import Tensor

Loss = Callable[..., "dict[str, Tensor]"]
"""Takes the output of the dual encoder by name; returns scalars ``loss`` and ``accuracy`` on the features' device."""


class LossKind(NamedTuple):
    """A registered loss: its class, and what it needs of the data and the model."""

    path: str
    """``module.Class`` in egohod/loss; as text, so that reading a configuration does not import PyTorch."""
    target: str = "narration"
    """The ``data.labels.target`` that it learns from."""
    has_temperature: bool = False
    """Whether ``logit_scale`` gets a gradient where ``loss.learn_temperature`` is set."""
    has_bias: bool = False
    """Whether the model has a learned ``logit_bias``."""
    margin: float = 0.0
    """Default of ``loss.margin``, in cosine similarity; 0 for losses without a margin."""
    has_negatives: bool = False
    """Whether every other item of the batch is a negative, whatever its caption is; see ``loss.mask_duplicates``."""
    has_tags: bool = False
    """Whether it needs the verbs and nouns of captions."""
    has_replacements: bool = False
    """Whether it needs captions with another verb, ``loss.replacements`` for each clip."""


# A new loss is a class and a line here. It is built as Class(config, rank=..., world_size=...) and called with what the
# model returns, by name. Margins are those of their sources.
LOSSES = {
    "infonce": LossKind("contrastive.ContrastiveLoss", has_temperature=True, has_negatives=True),
    "sigmoid": LossKind("contrastive.SigmoidLoss", has_temperature=True, has_bias=True, has_negatives=True),
    "max_margin": LossKind("retrieval.RetrievalLoss", target="relevancy", margin=0.2, has_negatives=True),
    "adaptive_max_margin": LossKind("retrieval.RetrievalLoss", target="relevancy", margin=0.4, has_negatives=True),
    "sms": LossKind("retrieval.RetrievalLoss", target="relevancy", margin=0.6),
    "soft_infonce": LossKind("retrieval.RetrievalLoss", target="relevancy", has_temperature=True),
    "egonce": LossKind("egonce.EgoNCE", has_temperature=True, has_negatives=True, has_tags=True),
    "egonce_pp": LossKind(
        "egonce.EgoNCE", has_temperature=True, has_negatives=True, has_tags=True, has_replacements=True
    ),
    "classes": LossKind("classification.ClassificationLoss", target="class"),
}


@dataclass
class LossConfig:
    """The training objective, over the batch of all processes."""

    name: str = knob(
        "infonce",
        "infonce: symmetric cross-entropy over the batch, the published recipe; sigmoid: a binary loss for every pair "
        "(SigLIP), less sensitive to the batch size; egonce: infonce with captions of the same verb and noun as "
        "positives (EgoVLP); egonce_pp: captions with another verb as negatives, clips of the same noun as positives "
        "(EgoNCE++); docs/pretraining.md. For data.labels.target=relevancy: max_margin (AVION), "
        "adaptive_max_margin (EgoVLP), sms (best known on EK100-MIR), soft_infonce; docs/finetuning.md. "
        "For data.labels.target=class: classes, cross-entropy of the heads",
        choices=tuple(LOSSES),
    )
    margin: float | None = knob(
        None,
        "of the three margin losses, in cosine similarity; null is the value of their papers' code: 0.2 for "
        "max_margin, 0.4 for adaptive_max_margin, 0.6 for sms",
        above=0,
    )
    tau: float = knob(
        0.1, "sms: tolerated difference of equally relevant items, in cosine similarity; the authors' value", low=0
    )
    label_smoothing: float = knob(
        0.0,
        "classes: probability that is spread evenly over all classes; AVION fine-tunes with 0.1",
        low=0,
        high=0.9,
    )
    mask_duplicates: bool = knob(
        False,
        "clips with the same caption, in the batch of all processes, are no negatives of each other; of infonce, "
        "sigmoid, egonce, egonce_pp, max_margin and adaptive_max_margin (sms, soft_infonce grade them by relevancy); "
        "false as published",
    )
    local_loss: bool = knob(
        True, "infonce: each process computes its own rows only: exact and cheapest together with gather_with_grad"
    )
    gather_with_grad: bool = knob(
        True, "gradients flow to the features of other processes; False with local_loss is biased and refused"
    )
    temperature: float = knob(0.07, "initial softmax temperature, constant unless learned", above=0)
    learn_temperature: bool = knob(False, "upstream keeps it at 0.07; margin losses and heads have no temperature")
    bias: float = knob(-10.0, "sigmoid: initial value of the learned bias of all similarities, as in SigLIP")
    max_logit_scale: float = knob(100.0, "upper bound of a learned 1/temperature, as in CLIP", above=0)
    boxes: float = knob(
        0.0,
        "weight of an auxiliary loss: boxes of hands and active object in every frame, predicted from the patch tokens "
        "(the fast path's, if there is one); needs data.train.NAME.detections; 0 leaves it out, as published",
        low=0,
    )
    replacements: int = knob(
        10,
        "egonce_pp: captions of each clip with its verb replaced, as published; each costs a text in the text tower",
        low=1,
    )
    # Frame order: nothing in a batch of other clips asks for it (docs/motion.md).
    opposites: float = knob(
        0.0,
        "weight of a ranking loss: a clip's caption before the same with its motion run backwards ('opens', 'closes'); "
        "0.5 to 1 where motion is to be learned; 0, as published, costs nothing",
        low=0,
    )
    separation: float = knob(
        0.0,
        "weight of the cosine between captions and their opposites above loss.separation_margin: a text tower gives "
        "both almost the same feature, and then the video has nothing to learn; 1 to 5 beside loss.opposites",
        low=0,
    )
    separation_margin: float = knob(
        0.3, "cosine that opposite captions may keep: they share their hands and objects", low=-1, high=1
    )
    opposites_schedule: str = knob(
        "constant",
        "weights of opposites and separation over the run: constant, or falling once motion is learned",
        choices=("constant", "linear", "cosine"),
    )
    opposites_hold: float = knob(0.5, "share of the run before they fall", low=0, high=0.99)
    opposites_end: float = knob(0.0, "share of both weights that is left at the end of the run", low=0, high=1)

    @property
    def has_opposites(self) -> bool:
        """Whether a term reads the opposites of captions."""
        return self.opposites > 0 or self.separation > 0

    @property
    def negatives(self) -> int:
        """Further captions of each clip that are false of it: its opposite first, then those with another verb."""
        return self.has_opposites + (self.replacements if LOSSES[self.name].has_replacements else 0)


def build_loss(config: LossConfig, *, rank: int = 0, world_size: int = 1) -> Loss:
    """The loss ``config.name``, over the features of all processes, and the auxiliary losses that have a weight."""

    def load(path: str) -> Any:
        module, _, name = path.partition(".")
        return getattr(import_module(f"egohod.loss.{module}"), name)

    loss: Loss = load(LOSSES[config.name].path)(config, rank=rank, world_size=world_size)
    if config.has_opposites:
        loss = load("opposites.WithOpposites")(loss, config, world_size=world_size)
    if config.boxes:
        loss = load("classification.WithBoxes")(loss, config.boxes)
    return loss
