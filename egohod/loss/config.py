"""Settings of the objective."""

from __future__ import annotations

from dataclasses import dataclass

from egohod.knobs import knob

# The registry: a new loss is a class of egohod/loss, built as Class(config, rank=..., world_size=...) and called with
# what the model returns, by name. As text, so that reading a configuration does not import PyTorch.
LOSSES = {
    "infonce": "contrastive.ContrastiveLoss",
    "sigmoid": "contrastive.SigmoidLoss",
    **dict.fromkeys(("max_margin", "adaptive_max_margin", "sms", "soft_infonce"), "retrieval.RetrievalLoss"),
    "classes": "classification.ClassificationLoss",
}
# Those that need the relevancy of each text to each clip.
RELEVANCY_LOSSES = tuple(name for name, place in LOSSES.items() if place.startswith("retrieval."))
# What their sources use, in cosines. These losses have no temperature.
DEFAULT_MARGINS = {"max_margin": 0.2, "adaptive_max_margin": 0.4, "sms": 0.6}


@dataclass
class LossConfig:
    """The training objective, over the batch of all processes."""

    name: str = knob(
        "infonce",
        "infonce: symmetric cross-entropy over the batch, the published recipe; sigmoid: a binary loss for every pair "
        "(SigLIP), less sensitive to the batch size. For data.labels.target=relevancy: max_margin (AVION), "
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
