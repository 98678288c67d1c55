"""Classification heads that start from the text tower: before the first step they classify as zero-shot does.

The source is Wortsman et al. (2109.01903), who fine-tune CLIP from such a classifier. A class's weights are the mean
feature of its training narrations, of its name if it has none.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from egohod.data.labels import ClassSpace, class_numbers
from egohod.data.table import ClipTable
from egohod.data.text import Tokenizer, trim
from egohod.model.egovideo import DualEncoder

# Narrations that the text tower sees at once.
BATCH = 256


def class_texts(tables: Sequence[ClipTable], space: ClassSpace) -> list[list[str]]:
    """The different narrations of the training clips of each class, in order; its name where it has no clip."""
    found: list[dict[str, None]] = [{} for _ in space.keys]
    for table in tables:
        for row, number in enumerate(class_numbers(table, space)):
            found[number].update(dict.fromkeys(table.row(row).texts))
    return [list(texts) or [name] for texts, name in zip(found, space.names, strict=True)]


@torch.no_grad()
def start_from_text(model: DualEncoder, space: ClassSpace, texts: Sequence[Sequence[str]]) -> None:
    """Set the weights of ``model``'s heads so that their logits are scaled similarities to ``texts`` [C].

    A head for a part, such as the verb, takes the mean over the classes that share it.
    """
    assert model.heads is not None, "the model was built without heads"
    features = _means(model, texts)
    scale = model.logit_scale.exp() / model.geometry.embed_dim**0.5
    for name, head in model.heads.items():
        # One head for all classes is no part of them.
        values, code = space.parts.get(name, (space.keys, np.arange(len(space.keys))))
        member = F.one_hot(torch.from_numpy(code).to(features.device), len(values)).T.to(features)
        assert isinstance(head, nn.Sequential)
        linear = head[-1]
        assert isinstance(linear, nn.Linear)
        linear.weight.copy_(scale * F.normalize(member @ features, dim=1))


def _means(model: DualEncoder, texts: Sequence[Sequence[str]]) -> Tensor:
    """The mean of the texts' features of each class, normalised: [C, E]."""
    device = model.logit_scale.device
    of_class = torch.tensor([number for number, each in enumerate(texts) for _ in each], device=device)
    tokens = Tokenizer()([text for each in texts for text in each])
    features = torch.cat([model.encode_text(trim(part).to(device)) for part in tokens.split(BATCH)])
    # Of unit length in the end, so a sum is as good as a mean.
    return F.normalize(features.new_zeros(len(texts), features.shape[1]).index_add(0, of_class, features), dim=1)
