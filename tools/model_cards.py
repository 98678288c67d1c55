"""Print docs/models.md: the models of egohod.list_models(), and the published weights for them.

    python tools/model_cards.py                     # the page
    python tools/model_cards.py > docs/models.md    # after a change of the models
    python tools/model_cards.py DEMO                # the same for some models

Costs are counted on tensors without content: a minute on one core, no GPU, nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Sequence

from _common import markdown_table, run_tool, tool_parser

from egohod import cli
from egohod.model.cards import list_models, model_info

PAGE = """# Models

Written by `python tools/model_cards.py > docs/models.md` from `egohod.model_info` (`tests/tools/test_model_cards.py` \
compares them). `egohod.list_models()` gives the names, `egohod.model_info(name, num_frames=...)` the same numbers for \
other frames or settings of the section `model`.

## Sizes and cost

{sizes}

Frames are those of the published recipes. Tokens are those of a clip in the vision tower, CLS included; a slow-fast \
model has a slow path of 4 frames and a fast path of all. GFLOPs are 10^9 operations, two per multiply-add of the \
matrix products, of one forward pass: the vision tower for one clip, the text tower for 77 tokens. A training step \
takes three times as many, on the fast path twice.

## Published weights

Licences are quoted from where they are stated; this project gives no opinion on whether they hold for the weights, \
whose training data have terms of their own. *unknown*: nothing was stated where the weights are published. \
[checkpoints.md](checkpoints.md) says how each file is loaded.

{weights}

There are no published weights for the other models.
"""


def main(arguments: Sequence[str]) -> int:
    parser = tool_parser(__doc__)
    parser.add_argument("names", metavar="NAME", nargs="*", help="models (default: those of egohod.list_models())")
    print(page(parser.parse_args(arguments).names), end="")
    return cli.DONE


def page(names: Sequence[str] = ()) -> str:
    """The page about the models ``names``, all if there are none. Raises :class:`UserError`."""
    cards = [model_info(name) for name in names or list_models()]
    sizes = [
        (
            f"`{card.name}`",
            f"{card.vision_parameters / 1e6:.1f} M",
            f"{card.text_parameters / 1e6:.1f} M",
            f"{card.frames} x {card.resolution} px",
            f"{card.patch_size} px",
            f"{card.tokens:,}",
            str(card.embed_dim),
            f"{card.gflops:,.{1 if card.gflops >= 10 else 2}f}",
            f"{card.text_gflops:.{1 if card.text_gflops >= 1 else 2}f}",
        )
        for card in cards
    ]
    head = ["name", "vision", "text", "clip", "patch", "tokens", "shared space", "GFLOPs a clip", "a text"]
    weights = [(f"`{card.name}`", *each[:3], each.stated) for card in cards for each in card.weights]
    sources = ["model", "weights", "source", "licence", "stated in"]
    return PAGE.format(
        sizes="\n".join(markdown_table(head, sizes)), weights="\n".join(markdown_table(sources, weights))
    )


if __name__ == "__main__":
    run_tool(main)
